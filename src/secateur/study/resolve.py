"""What a study depends on outside its file: text, tasks and existing checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.config import fingerprint
from secateur.data.chat import check_format
from secateur.data.corpus import open_corpus
from secateur.data.shards import TokenStore
from secateur.data.sources import open_source
from secateur.data.tokenizer import id_bound, load_tokenizer
from secateur.errors import UserError
from secateur.evaluation.lm_eval.task_files import examples_file, task_file
from secateur.evaluation.protocols import text_source
from secateur.files import sha256_file, sha256_tree
from secateur.hub import cached_positions, is_hub_name
from secateur.model.shapes import Shape
from secateur.study.sections import EvaluationSpec, ParentSpec
from secateur.study.spec import StudySpec

__all__ = ["SHARDS", "ResolvedParent", "ResolvedStudy", "resolve", "split_paths"]

SHARDS, TEXT = "shards:", "text:"


@dataclass(frozen=True)
class ResolvedParent:
    """A parent's sizes and, for a checkpoint, the identity of its weights."""

    shape: Shape
    identity: str = ""  #: digest of a local checkpoint and its masks, name and revision on the Hub; empty if pretrained
    positions: int | None = None  #: of a checkpoint; None where its configuration is not here or sets no limit


@dataclass(frozen=True)
class ResolvedStudy:
    """The identities of all that stages depend on besides the study file."""

    corpus: str  #: digest of the text source
    parents: Mapping[str, ResolvedParent]
    suite: Mapping[str, Any] = field(default_factory=dict)  #: measurements besides the held-out loss, with digests
    calibration: Mapping[tuple[str, str | None], str] = field(default_factory=dict)  #: source, field -> digest


def resolve(study: StudySpec) -> ResolvedStudy:
    """Look up the sources and checkpoints that a study file names, without a network.

    Raises:
        UserError: if a source or a checkpoint is missing, or differs from the file.
    """
    parents = {name: _parent(study, name, parent) for name, parent in study.all_parents.items()}
    corpus = _corpus(study, parents)
    return ResolvedStudy(corpus, parents, _suite(study.evaluation), _calibration(study))


def _calibration(study: StudySpec) -> dict[tuple[str, str | None], str]:
    """The digests of the texts, besides the corpus, that methods are scored on."""
    specs = [study.calibration_of(entry) for entry in study.methods]
    return {
        (spec.source, spec.field): open_source(spec.source, field=spec.field, format=spec.format).digest()
        for spec in specs
        if spec.source is not None
    }


def _suite(evaluation: EvaluationSpec) -> dict[str, Any]:
    """The texts and tasks of a suite, each with the digest of its local file; None for one on the Hub."""
    suite, identities = evaluation.measurements, {}
    if suite.texts:
        data = evaluation.text_data
        identities["texts"] = {text.name: text_source(text, data).digest() if data else None for text in suite.texts}
    if suite.tasks:
        identities |= _tasks(evaluation)
    return identities


def _tasks(evaluation: EvaluationSpec) -> dict[str, Any]:
    """The single tasks of a suite, each with the digest of its local file, and their settings.

    Default settings have no entry, so that new settings leave the identity of old measurements unchanged.
    """
    tasks, data = evaluation.measurements.task_list("evaluation."), evaluation.tasks_data
    settings = {m.name: {"changes": dict(m.changes), "metric": m.metric} for m in tasks.members}
    examples = {m.name: examples_file(data, m.name) for m in tasks.members} if data else {}
    optional = {
        "few_shot": evaluation.few_shot,
        "settings": {name: values for name, values in settings.items() if any(values.values())},
        "examples": {name: sha256_file(path) for name, path in examples.items() if path.is_file()},
        "groups": [asdict(group) for group in tasks.groups],
    }
    return {
        "tasks": {member.name: _digest(data, member.name) for member in tasks.members},
        "task_limit": evaluation.task_limit,
        **{key: value for key, value in optional.items() if value not in (None, {}, [])},
    }


def _digest(folder: str | None, task: str) -> str | None:
    if folder is None:
        return None
    path = task_file(folder, task)
    if not path.is_file():
        raise UserError(f"evaluation.tasks_data: {path} is missing; put it there, or leave {task} out of the suite")
    return sha256_file(path)


def split_paths(corpus: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split a corpus into its identity without paths and the paths, since local files are identified by content.

    Args:
        corpus: the identity of a ``CorpusSpec``.
    """
    source, tokenizer = corpus["source"], corpus["tokenizer"]
    paths: dict[str, str] = {}
    content = dict(corpus)
    scheme = next((scheme for scheme in (TEXT, SHARDS) if source.startswith(scheme)), None)
    if scheme:
        paths["source"], content["source"] = source, scheme
    if tokenizer is not None and not is_hub_name(tokenizer):
        paths["tokenizer"], content["tokenizer"] = tokenizer, "local"
    return content, paths


def _corpus(study: StudySpec, parents: Mapping[str, ResolvedParent]) -> str:
    """The digest of the corpus."""
    spec = study.text
    rows = min(parent.shape.vocabulary for parent in parents.values())
    if spec.source.startswith(SHARDS):
        tokens = TokenStore(Path(spec.source.removeprefix(SHARDS)))
        if tokens.vocabulary > rows and (largest := tokens.largest_id) >= rows:
            raise UserError(
                f"corpus.source: {spec.source} has ids up to {largest}, but the parent's embedding has {rows} rows; "
                f"set corpus.vocabulary to {largest + 1} or more, or name other shards"
            )
        return tokens.fingerprint
    digest = open_corpus(spec).digest()
    if spec.tokenizer is None or is_hub_name(spec.tokenizer):
        return digest
    from secateur.model.companions import tokenizer_files

    folder = Path(spec.tokenizer)
    tokenizer = load_tokenizer(folder)
    check_format(tokenizer, spec.format)
    bound = id_bound(tokenizer)
    if bound > rows and any(parent.checkpoint is None for parent in study.all_parents.values()):
        raise UserError(
            f"corpus.tokenizer: {folder} has ids up to {bound - 1}, but the parent's embedding has {rows} rows; "
            f"set corpus.vocabulary to {bound} or more"
        )  # a checkpoint may have fewer rows than its tokenizer ids, which counts where text uses them
    return fingerprint([digest, sha256_tree(folder, tokenizer_files(folder))])


def _parent(study: StudySpec, name: str, parent: ParentSpec) -> ResolvedParent:
    where = "parent" if study.parent else f"parents.{name}"
    shape = parent.shape(study.corpus.vocabulary)
    if parent.checkpoint is None:
        assert shape is not None
        return ResolvedParent(shape)
    if is_hub_name(parent.checkpoint):
        if shape is None:
            raise UserError(
                f"{where}: {parent.checkpoint} is on the Hub; give the sizes, so that the study can be planned offline"
            )
        return ResolvedParent(shape, parent.checkpoint, cached_positions(parent.checkpoint))
    from secateur.model.checkpoint import Checkpoint, max_positions

    checkpoint = Checkpoint(parent.checkpoint)
    if shape is not None and shape.as_dict() != checkpoint.shape.as_dict():
        raise UserError(
            f"{where}: {parent.checkpoint} has {checkpoint.shape}, not the sizes in the file; leave them out"
        )
    masks, positions = checkpoint.masks_digest, max_positions(checkpoint.config)
    digest = fingerprint([checkpoint.digest, masks]) if masks else checkpoint.digest
    return ResolvedParent(checkpoint.shape, digest, positions)
