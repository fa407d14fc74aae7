"""Tasks of lm-evaluation-harness: their documents, what a model is asked, and what its answers are worth.

Prompts, choices and metrics are the harness's own, without examples in the prompt (zero-shot). Its documents come from
the Hugging Face Hub, or from a local folder that holds ``<task>.jsonl``, one document a line in the fields of the
task's dataset on the Hub. The harness is an optional dependency: ``pip install 'secateur[tasks]'``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from secateur import progress
from secateur.errors import UserError, did_you_mean
from secateur.spec import fingerprint

__all__ = ["METRICS", "Requests", "Task", "import_harness", "place_of", "silenced"]

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
            "lm_eval": import_harness("lm_eval").__version__,
            "metric": self.metric,
            "documents": len(self.documents),
            **self.source,
        }

    def protocol(self) -> dict[str, Any]:
        """What identifies a figure: the record, and a fingerprint of the metric and of all that is asked.

        Another version of the harness that asks the same gives the same fingerprint.
        """
        asked = [[request.args[:2] for request in requests] for requests in self.documents]
        content = {"task": self.harness.config.task, "metric": self.metric, "documents": self.digests, "asked": asked}
        return {**self.record(), "few_shot": 0, "fingerprint": fingerprint(content)}

    @cached_property
    def digests(self) -> list[str]:
        """For each document the first half of the SHA-256 of its fields, in hexadecimal: what it is known by."""
        return [fingerprint(_plain(requests[0].doc))[:32] for requests in self.documents]

    def score(self, answers: list[tuple[float, bool]]) -> tuple[float, list[float]]:
        """The task's accuracy, and that of each document.

        Args:
            answers: the log-likelihood of each request's continuation, and whether it is greedy.
        """
        for request, answer in zip(self.harness.instances, answers, strict=True):
            request.resps = [answer]
        with silenced():
            self.harness.apply_filters()
            (key, *_) = self.harness.instances[0].filtered_resps
            values = [
                self.harness.process_results(requests[0].doc, [request.filtered_resps[key] for request in requests])
                for requests in self.documents
            ]
            every = [value[self.metric] for value in values]
            return float(self.harness.aggregation()[self.metric](every)), [float(value) for value in every]


def _plain(value: Any) -> Any:
    """A document's fields as JSON has them; what it has no form for, as text."""
    return json.loads(json.dumps(value, default=str))


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
        with silenced(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
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
    folder = place_of(name)
    with silenced():
        return import_harness("lm_eval.tasks").TaskManager(include_defaults=False, include_path=folder)


def place_of(name: str) -> Path:
    """The folder that a task's configuration lies in; the harness itself is not imported, which takes seconds.

    Raises:
        UserError: if lm-eval is not installed, or knows no such task.
    """
    found = importlib.util.find_spec("lm_eval")
    origin = found.origin if found else import_harness("lm_eval").__file__
    places = _places(Path(str(origin)).parent / "tasks")
    if name not in places:
        near = difflib.get_close_matches(name, places, n=1, cutoff=0.5)
        raise UserError(f"lm-eval has no single task {name!r}{did_you_mean(name, near or METRICS)}")
    return places[name]


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


def import_harness(module: str) -> Any:
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
def silenced() -> Iterator[None]:
    """Without the log messages of the harness, ``datasets`` and transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
