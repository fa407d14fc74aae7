"""Accuracy on tasks of lm-evaluation-harness, of a model and of the same model without some of its layers.

Prompts, choices and metrics are the harness's own, without examples in the prompt (zero-shot). Its documents come from
the Hugging Face Hub, or from a local folder that holds ``<task>.jsonl``, one document a line in the fields of the
task's dataset on the Hub. The harness is an optional dependency: ``pip install 'secateur[tasks]'``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import io
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur import progress
from secateur.checkpoint import Checkpoint
from secateur.data.tokenizer import check_vocabulary, load_tokenizer
from secateur.errors import UserError, did_you_mean

__all__ = ["METRICS", "Task", "removal_accuracies"]

#: The accuracy that is usually reported for a task; ``acc_norm`` divides log-likelihoods by the choices' lengths.
METRICS: Mapping[str, str] = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
    "sciq": "acc",
    "winogrande": "acc",
}

_SCORED = ("loglikelihood", "multiple_choice")  # output types that compare likelihoods; the others generate text
_NAME = re.compile(rb"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#\[{][^"'#\r\n]*?)["']?[ \t]*(?:#.*)?\r?$""", re.M)


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness. Its documents are read when they are first needed, and once.

    Args:
        name: as the harness calls it, e.g. ``winogrande``; groups of tasks are not taken.
        data: a folder with ``<name>.jsonl``; None for the dataset of the Hub.
        limit: how many documents to take, from the first; None for all.
    """

    name: str
    data: str | None = None
    limit: int | None = None

    @cached_property
    def requests(self) -> Requests:
        """What a model is asked.

        Raises:
            UserError: if lm-eval is not installed or knows no such task, if the task asks for generated text or reports
                no accuracy, if its file is missing, malformed or of another schema, or if the Hub does not give it.
        """
        return _build(self)

    def record(self) -> dict[str, Any]:
        """What identifies the measurement: versions, metric, documents and where they are from.

        Raises:
            UserError: as :attr:`requests`.
        """
        return {"name": self.name, **self.requests.record()}


@dataclass(frozen=True)
class Requests:
    """The requests of one task, built once and answered by every model."""

    harness: Any  #: the harness's task
    documents: list[list[Any]]  #: for each document its requests, one for each choice
    metric: str
    source: dict[str, str]  #: ``sha256`` of the local file, or ``dataset`` on the Hub

    def record(self) -> dict[str, Any]:
        """Version of the task and of the harness, metric, number of documents, source."""
        return {
            "version": self.harness.VERSION,
            "lm_eval": _import("lm_eval").__version__,
            "metric": self.metric,
            "documents": len(self.documents),
            **self.source,
        }

    def accuracy(self, answers: list[tuple[float, bool]]) -> float:
        """The task's accuracy, given the log-likelihood of each request's continuation and whether it is greedy."""
        for request, answer in zip(self.harness.instances, answers, strict=True):
            request.resps = [answer]
        with _silenced():
            self.harness.apply_filters()
            (key, *_) = self.harness.instances[0].filtered_resps
            values = [
                self.harness.process_results(requests[0].doc, [request.filtered_resps[key] for request in requests])
                for requests in self.documents
            ]
        return float(self.harness.aggregation()[self.metric]([value[self.metric] for value in values]))


def removal_accuracies(
    checkpoint: Checkpoint, length: int, task: Task, *, device: str, batch: int | None = None
) -> tuple[float, list[float]]:
    """The accuracy with each contiguous run of ``length`` blocks bypassed.

    The whole model is held in memory in float32, and each candidate takes one pass of it over all requests.

    Args:
        checkpoint: the model, with its tokenizer.
        length: of the runs, in blocks.
        task: what to measure.
        device: where to compute.
        batch: requests at once (8 unless told); execution only, but sums are rounded in another order.

    Returns:
        The full model's accuracy, and that of each candidate, by the index of the run's first block.

    Raises:
        UserError: if the task cannot be had (see :attr:`Task.requests`), the checkpoint has no tokenizer or one that
            the harness cannot use, or the model's log-likelihoods are NaN or infinite.
    """
    requests = task.requests
    language_model = _language_model(checkpoint, device, batch or 8)
    layers: nn.ModuleList = language_model.model.get_submodule(checkpoint.family.layers)
    candidates = range(len(layers) - length + 1)
    _warn_of_truncation(language_model, requests, task.name)
    with progress.task(f"score by {task.name}", 1 + len(candidates)) as bar:
        full = _accuracy(language_model, requests, task.name, checkpoint.directory)
        bar.advance(1, f"full model {full:.3f}")
        without = []
        for first in candidates:
            with _bypassed(layers, first, length):
                without.append(_accuracy(language_model, requests, task.name, checkpoint.directory))
            bar.advance(1, f"best {max(without):.3f} of {full:.3f}")
    return full, without


class _Bypass(nn.Module):
    """Stands in for a block and keeps its place, so that the others keep theirs, and with it their attention's kind."""

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states


@contextlib.contextmanager
def _bypassed(layers: nn.ModuleList, first: int, length: int) -> Iterator[None]:
    blocks = list(layers)
    try:
        for index in range(first, first + length):
            layers[index] = _Bypass()
        yield
    finally:
        for index in range(first, first + length):
            layers[index] = blocks[index]


def _accuracy(language_model: Any, requests: Requests, name: str, directory: Path) -> float:
    try:
        with _silenced():
            answers = language_model.loglikelihood(requests.harness.instances, disable_tqdm=True)
    except (AssertionError, IndexError):  # what it takes for granted of the tokens of a continuation
        raise UserError(
            f"{directory}: {name} has a choice without a token of its own, or of more tokens than the "
            f"{language_model.max_length} that the model takes; use another task"
        ) from None
    if not all(math.isfinite(value) for value, _ in answers):
        raise UserError(f"{directory}: the log-likelihoods on {name} are NaN or infinite")
    return requests.accuracy(answers)


def _language_model(checkpoint: Checkpoint, device: str, batch: int) -> Any:
    """The checkpoint as the harness wants it."""
    tokenizer = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{checkpoint.directory}: its tokenizer has neither a BOS nor an EOS token, and lm-eval needs one; "
            "name one in tokenizer_config.json"
        )
    model = checkpoint.load().to(device)  # type: ignore[arg-type]
    model.config.use_cache = False
    with _silenced():
        wrapper = _import("lm_eval.models.huggingface").HFLM
        return wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)


def _warn_of_truncation(language_model: Any, requests: Requests, name: str) -> None:
    texts = ["".join(request.args[:2]) for request in requests.harness.instances]
    rows = language_model.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    long = sum(len(row) - 1 > language_model.max_length for row in rows)
    if long:
        progress.say(
            f"{name}: {long:,} of {len(rows):,} requests are longer than the {language_model.max_length} tokens that "
            "the model takes; their beginning is left out"
        )


def _build(task: Task) -> Requests:
    name = task.name
    if task.limit is not None and task.limit < 1:
        raise UserError(f"{name}: a limit of {task.limit} leaves no document; make it 1 or more")
    manager = _manager(name)
    config = manager.task_index[name].cfg
    if config.get("output_type") not in _SCORED:
        raise UserError(
            f"{name}: is not answered by comparing likelihoods; name a task that is, like {', '.join(METRICS)}"
        )
    changes = {"task": name, "num_fewshot": 0}
    if task.data is None:
        where = ":".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
        source = {"dataset": where}
        progress.say(f"{name}: asking the Hugging Face Hub for {where}")
        hint = f"connect to the network, or name a folder that holds {name}.jsonl"
        failed = f"{name}: {where} cannot be had from the Hugging Face Hub"
    else:
        path = Path(task.data).expanduser() / f"{name}.jsonl"
        rows, digest = _read(path)
        source = {"sha256": digest}
        changes |= _only(rows)
        hint = "it must have the fields of the task's dataset on the Hugging Face Hub, the answers among them"
        failed = f"{path}: {name} cannot be built from it"
    try:
        with _silenced(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            # A group of one is how the harness lets a task's own configuration be changed.
            loaded = manager.load({"group": "secateur", "task": [changes]})["tasks"][name]
            loaded.build_all_requests(limit=task.limit)
            documents: dict[int, list[Any]] = defaultdict(list)
            for request in loaded.instances:
                documents[request.doc_id].append(request)
            _check_answers(loaded, [requests[0].doc for requests in documents.values()])
    except Exception as error:  # templates, functions of tasks and the Hub's client raise any class
        told = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")[:200]
        raise UserError(f"{failed} ({type(error).__name__}: {told}); {hint}") from None
    return Requests(loaded, list(documents.values()), _metric(name, loaded.aggregation()), source)


def _manager(name: str) -> Any:
    """The harness's index of the one folder that ``name`` lies in; that of all its folders takes ten seconds."""
    places = _places(Path(_import("lm_eval.tasks").__file__).parent)
    if name not in places:
        near = difflib.get_close_matches(name, places, n=1, cutoff=0.5)
        raise UserError(f"lm-eval has no single task {name!r}{did_you_mean(name, near or METRICS)}")
    with _silenced():
        return _import("lm_eval.tasks").TaskManager(include_defaults=False, include_path=places[name])


@cache
def _places(root: Path) -> Mapping[str, Path]:
    """Each of the harness's tasks -> the folder that its configuration lies in."""
    places: dict[str, Path] = {}
    for path in sorted(root.glob("**/*.yaml"), key=Path.as_posix):
        if found := _NAME.search(path.read_bytes()):
            places.setdefault(found[1].decode(), path.parent)
    return places


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The documents of a local task, and the file's SHA-256."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the data of a task is a folder that holds <task>.jsonl") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", getattr(error, "reason", error))
            raise UserError(f"{path}:{number}: not valid JSON: {reason}; mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; each line is one document")
        if rows and row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise UserError(f"{path}:{number}: differs from the first document in its fields: {odd}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no documents")
    return rows, hashlib.sha256(data).hexdigest()


def _only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The changes of a task's configuration that leave it ``rows``, whichever split they are, and no examples."""
    import datasets  # takes a second

    return {
        "custom_dataset": lambda **_: {"local": datasets.Dataset.from_list(rows)},
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "local",
        "fewshot_split": None,
        "fewshot_config": None,
    }


def _check_answers(loaded: Any, documents: list[dict[str, Any]]) -> None:
    """Splits whose answers are withheld often give -1; every model would be wrong on them.

    Raises:
        ValueError: for the first document whose right choice is not among its choices.
    """
    if loaded.OUTPUT_TYPE != "multiple_choice":
        return
    for number, document in enumerate(documents):
        # Where the choices are contexts and not continuations, the harness keeps the answer's index in place of a text.
        answer = loaded.doc_to_text(document) if loaded.multiple_input else loaded.doc_to_target(document)
        choices = len(loaded.doc_to_choice(document))
        if isinstance(answer, int) and not 0 <= answer < choices:
            raise ValueError(f"document {number} has the answer {answer}, but {choices} choices")


def _metric(name: str, reported: Mapping[str, Any]) -> str:
    if METRICS.get(name) in reported:
        return METRICS[name]
    for metric in reported:
        if metric.startswith("acc") or metric == "exact_match":
            return metric
    raise UserError(f"{name}: reports {', '.join(reported)} and no accuracy; name another task, like winogrande")


def _import(module: str) -> Any:
    """A module of the harness, which is not always installed.

    Raises:
        UserError: if it is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"tasks are measured with lm-eval, which cannot be imported ({error}); pip install 'secateur[tasks]'"
        ) from None


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without the log messages of the harness, ``datasets`` and transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
