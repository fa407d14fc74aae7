"""What a study depends on that lies outside its file: text, tasks, and checkpoints that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.config import fingerprint
from secateur.data.shards import TokenStore
from secateur.data.sources import open_source
from secateur.data.tokenizer import check_vocabulary, load_tokenizer
from secateur.errors import UserError
from secateur.evaluation.lm_eval.task_files import examples_file, task_file
from secateur.evaluation.protocols import text_source
from secateur.files import sha256_file, sha256_tree
from secateur.model.shapes import Shape
from secateur.study.spec import EvaluationSpec, ParentSpec, StudySpec

__all__ = ["SHARDS", "ResolvedParent", "ResolvedStudy", "resolve", "split_places"]

HUB, SHARDS, TEXT = "hf:", "shards:", "text:"


@dataclass(frozen=True)
class ResolvedParent:
    """A parent's sizes; and, of a checkpoint, what identifies its weights."""

    shape: Shape
    identity: str = ""  #: digest of a local one, name and revision of one of the Hub; empty for one that is pretrained


@dataclass(frozen=True)
class ResolvedStudy:
    """What stages depend on besides the study file."""

    corpus: str  #: identifies the content of the text source
    parents: Mapping[str, ResolvedParent]
    suite: Mapping[str, Any] = field(default_factory=dict)  #: what is measured besides the held-out loss, with digests


def resolve(study: StudySpec) -> ResolvedStudy:
    """Look up what a study file names; no network is asked.

    Raises:
        UserError: if a source or a checkpoint is missing, or is not as the file says.
    """
    parents = {name: _parent(study, name, parent) for name, parent in study.all_parents.items()}
    corpus = _corpus(study, min(parent.shape.vocabulary for parent in parents.values()))
    return ResolvedStudy(corpus, parents, _suite(study.evaluation))


def _suite(measured: EvaluationSpec) -> dict[str, Any]:
    """The texts and tasks, each with the digest of its local file; None where it is of the Hub."""
    asked, found = measured.asked, {}
    if asked.texts:
        data = measured.text_data
        found["texts"] = {text.name: text_source(text, data).digest() if data else None for text in asked.texts}
    if asked.tasks:
        found |= _tasks(measured)
    return found


def _tasks(measured: EvaluationSpec) -> dict[str, Any]:
    """The single tasks that the suite comes to, each with the digest of its local file; and what else identifies them.

    What is as usual has no entry: the same measurement has the same identity whatever else can be asked for by now.
    """
    listed, data = measured.asked.task_list("evaluation."), measured.tasks_data
    changes = {m.name: {"changes": dict(m.changes), "metric": m.metric} for m in listed.members}
    examples = {m.name: examples_file(data, m.name) for m in listed.members} if data else {}
    more = {
        "few_shot": measured.few_shot,
        "settings": {name: told for name, told in changes.items() if any(told.values())},
        "examples": {name: sha256_file(path) for name, path in examples.items() if path.is_file()},
        "groups": [asdict(group) for group in listed.groups],
    }
    return {
        "tasks": {member.name: _digest(data, member.name) for member in listed.members},
        "task_limit": measured.task_limit,
        **{key: value for key, value in more.items() if value not in (None, {}, [])},
    }


def _digest(folder: str | None, task: str) -> str | None:
    if folder is None:
        return None
    path = task_file(folder, task)
    if not path.is_file():
        raise UserError(f"evaluation.tasks_data: {path} is missing; put it there, or leave {task} out of the suite")
    return sha256_file(path)


def split_places(asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A corpus without the places of its local files, which are known by what they hold; and these places.

    Args:
        asked: the identity of a ``CorpusSpec``.
    """
    source, tokenizer = asked["source"], asked["tokenizer"]
    places: dict[str, str] = {}
    kept = dict(asked)
    scheme = next((scheme for scheme in (TEXT, SHARDS) if source.startswith(scheme)), None)
    if scheme:
        places["source"], kept["source"] = source, scheme
    if tokenizer is not None and not tokenizer.startswith(HUB):
        places["tokenizer"], kept["tokenizer"] = tokenizer, "local"
    return kept, places


def _corpus(study: StudySpec, rows: int) -> str:
    """What identifies the corpus; ``rows`` are those of the smallest embedding."""
    spec = study.text
    if spec.source.startswith(SHARDS):
        tokens = TokenStore(Path(spec.source.removeprefix(SHARDS)))
        if tokens.vocabulary > rows:
            raise UserError(
                f"corpus.source: {spec.source} has ids up to {tokens.vocabulary - 1}, but the parent's embedding has "
                f"{rows} rows; set corpus.vocabulary to {tokens.vocabulary} or more, or name other shards"
            )
        return tokens.fingerprint
    digest = open_source(spec.source, field=spec.field, split=spec.split).digest()
    if spec.tokenizer is None or spec.tokenizer.startswith(HUB):
        return digest
    from secateur.model.checkpoint import TOKENIZER_FILES

    folder = Path(spec.tokenizer)
    check_vocabulary(load_tokenizer(folder), rows, "corpus.tokenizer")
    return fingerprint(
        [digest, sha256_tree(folder, [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()])]
    )


def _parent(study: StudySpec, name: str, parent: ParentSpec) -> ResolvedParent:
    where = "parent" if study.parent else f"parents.{name}"
    said = parent.shape(study.corpus.vocabulary)
    if parent.checkpoint is None:
        assert said is not None
        return ResolvedParent(said)
    if parent.checkpoint.startswith(HUB):
        if said is None:
            raise UserError(
                f"{where}: give the sizes of {parent.checkpoint}, so that it can be planned without a network"
            )
        return ResolvedParent(said, parent.checkpoint)
    from secateur.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(parent.checkpoint)
    if said is not None and said.as_dict() != checkpoint.shape.as_dict():
        raise UserError(f"{where}: {parent.checkpoint} has {checkpoint.shape}, not the sizes given; leave them out")
    return ResolvedParent(checkpoint.shape, checkpoint.digest)
