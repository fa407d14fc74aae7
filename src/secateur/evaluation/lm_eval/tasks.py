"""Tasks of lm-evaluation-harness: their documents, what a model is asked, and what its answers are worth.

Prompts, choices, examples and metrics are the harness's own. Its documents come from the Hugging Face Hub, or from a
local folder that holds ``<task>.jsonl``, one document a line in the fields of the task's dataset on the Hub. The
harness is an optional dependency: ``pip install 'secateur[tasks]'``.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

from secateur import progress
from secateur.config import fingerprint
from secateur.errors import UserError
from secateur.evaluation.lm_eval.harness import import_harness, manager_of, silence
from secateur.evaluation.lm_eval.task_files import local_changes, task_file
from secateur.evaluation.loss import perplexity
from secateur.evaluation.results import MeasurementKind

__all__ = ["METRICS", "Requests", "Score", "Task"]

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

_SEED = 1234  # of the harness, by which it draws examples


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness. Its documents are read when they are first needed, and once.

    Args:
        name: as the harness calls it, e.g. ``winogrande``.
        data: a folder with ``<name>.jsonl``; None for the dataset of the Hub.
        limit: how many documents to take, from the first; None for all.
        few_shot: examples in each prompt; None for as many as the task itself says, which is mostly none. A task that
            says 0 has none whatever is asked for, as in the harness.
        changes: of its configuration, by a group that it is in.
        metric: what counts, as the harness calls it, e.g. ``acc``, or with the filter of answers
            ``exact_match,strict-match``; empty for the usual one.
    """

    name: str
    data: str | None = None
    limit: int | None = None
    few_shot: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    metric: str = ""

    @cached_property
    def requests(self) -> Requests:
        """What a model is asked.

        Raises:
            UserError: if lm-eval is not installed or knows no such task, if the task needs pictures, sound or to run
                what a model writes, if its file is missing, malformed or of another schema, or if the Hub does not give
                it.
        """
        return _build(self)

    def record(self) -> dict[str, Any]:
        """What identifies the measurement: versions, metric, documents and where they are from.

        Raises:
            UserError: as :attr:`requests`.
        """
        return {"name": self.name, **self.requests.record()}


@dataclass(frozen=True)
class Score:
    """What the answers to a task are worth."""

    kind: MeasurementKind
    value: float
    items: list[dict[str, Any]]  #: for each document its ``value``, None if it has none of its own, maybe ``tokens``
    details: dict[str, Any]  #: ``metrics``: all that the harness reports


@dataclass(frozen=True)
class Requests:
    """The requests of one task, built once and answered by every model."""

    harness: Any  #: the harness's task
    documents: list[list[Any]]  #: for each document its requests, e.g. one for each choice
    key: str  #: the metric that counts, and the filter of answers that it is taken behind, as ``acc_norm,none``
    source: dict[str, str]  #: ``sha256`` of the local file, or ``dataset`` on the Hub

    @cached_property
    def instances(self) -> list[Any]:
        """Every request as often as it is to be answered, one document after the other."""
        return [request for document in self.documents for request in document for _ in range(request.repeats)]

    @property
    def keys(self) -> list[str]:
        """All that the harness reports: each metric with each filter of answers."""
        return _keys(self.harness)

    @property
    def metric(self) -> str:
        """The metric that counts, with the filter where it is not the usual one."""
        return self.key.removesuffix(",none")

    @property
    def is_accuracy(self) -> bool:
        """Whether what counts is the share of right answers."""
        return _is_accuracy(self.key)

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
        return {**self.record(), "few_shot": self.harness.config.num_fewshot or 0, "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        asked = [[_plain(request.args[:2]) for request in requests] for requests in self.documents]
        content = {"task": self.harness.config.task, "metric": self.metric, "documents": self.digests, "asked": asked}
        return fingerprint(content)

    @cached_property
    def digests(self) -> list[str]:
        """For each document the first half of the SHA-256 of its fields, in hexadecimal: what it is known by."""
        return [fingerprint(_plain(requests[0].doc))[:32] for requests in self.documents]

    def score(self, answers: Sequence[Any]) -> Score:
        """What the answers are worth, by the harness's own metrics.

        Args:
            answers: to :attr:`instances`: log-likelihood and whether it is greedy; log-likelihood; or text.

        Raises:
            ValueError: if what counts comes to no finite number; and whatever functions of the task raise.
        """
        for document in self.documents:
            for request in document:
                request.resps = []
        for request, answer in zip(self.instances, answers, strict=True):
            request.resps.append(answer)
        metrics: dict[str, float] = {}
        own: list[Any] = []
        with silence(), contextlib.redirect_stderr(io.StringIO()):
            self.harness.apply_filters()
            for name in self.documents[0][0].filtered_resps:
                found = [
                    self.harness.process_results(
                        requests[0].doc, [request.filtered_resps[name] for request in requests]
                    )
                    for requests in self.documents
                ]
                for metric, aggregate in self.harness.aggregation().items():
                    values = [value[metric] for value in found if metric in value]
                    if values and isinstance(total := aggregate(values), Real) and math.isfinite(total):
                        metrics[f"{metric},{name}"] = float(total)
                    if f"{metric},{name}" == self.key:
                        own = values
        return self._score(metrics, own)

    def _score(self, metrics: dict[str, float], values: list[Any]) -> Score:
        if self.key not in metrics:
            raise ValueError("it gives no number")
        value = metrics[self.key]
        details: dict[str, Any] = {"metrics": metrics}
        if self.harness.OUTPUT_TYPE == "loglikelihood_rolling":
            # Of each document its log-likelihood, and of how many words or bytes it is the sum.
            items = [{"value": -total / count, "tokens": count} for total, count in values]
            mean = -sum(total for total, _ in values) / sum(count for _, count in values)
            unit = "word" if self.key.startswith("word") else "byte"
            return Score("loss", mean, items, {**details, "perplexity": perplexity(mean), "per": unit})
        if not self.harness.higher_is_better().get(self.key.partition(",")[0], True):
            details["lower_is_better"] = True
        single = len(values) == len(self.documents) and all(isinstance(v, Real) for v in values)
        if not single or not math.isclose(sum(values) / len(values), value, abs_tol=1e-9):
            return Score("score", value, [{"value": None} for _ in self.documents], details)
        kind: MeasurementKind = "accuracy" if _is_accuracy(self.key) and all(0 <= v <= 1 for v in values) else "score"
        return Score(kind, value, [{"value": float(v)} for v in values], details)


def _plain(value: Any) -> Any:
    """A document's fields as JSON has them; what it has no form for, as text."""
    return json.loads(json.dumps(value, default=str))


def _build(task: Task) -> Requests:
    name = task.name
    if task.limit is not None and task.limit < 1:
        raise UserError(f"{name}: a limit of {task.limit} leaves no document; make it 1 or more")
    if task.few_shot is not None and task.few_shot < 0:
        raise UserError(f"{name}: {task.few_shot} examples in a prompt are not possible; make it 0 or more")
    inside = "::" in name  # defined within a group, which changes all of it
    manager = manager_of(None if inside else name)
    config = {**({} if inside else manager.task_index[name].cfg), **task.changes, "task": name}
    _check_safe(name, config.get("unsafe_code"), config.get("doc_to_image") or config.get("doc_to_audio"))
    few_shot = _few_shot(task, config)
    if task.data is None:
        where = ":".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key)) or name
        progress.notify(f"{name}: asking the Hugging Face Hub for {where}")
        local, source = {}, {"dataset": where}
        failed = f"{name}: {where} cannot be had from the Hugging Face Hub"
        hint = f"connect to the network, or name a folder that holds {name}.jsonl"
    else:
        local, source = local_changes(config, task.data, few_shot)
        failed = f"{task_file(task.data, name)}: {name} cannot be built from it"
        hint = "it must have the fields of the task's dataset on the Hugging Face Hub, the answers among them"
    changes = {**task.changes, "task": name, "num_fewshot": few_shot, **local}
    # A group of one is how the harness lets a task's own configuration be changed.
    whole = {**config, **changes} if inside else {"group": "secateur", "task": [changes]}
    try:
        with silence(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            loaded = manager.load(whole)["tasks"][name]
            _check_safe(name, getattr(loaded, "UNSAFE_CODE", False), getattr(loaded, "MULTIMODAL", False))
            _check_metrics(name, loaded)
            loaded.set_fewshot_seed(_SEED)
            loaded.build_all_requests(limit=task.limit)
            documents: dict[int, list[Any]] = defaultdict(list)
            for request in loaded.instances:
                documents[request.doc_id].append(request)
            _check_answers(loaded, [requests[0].doc for requests in documents.values()])
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{name}: lm-eval's code for it does not run here ({error}); leave it out") from None
    except Exception as error:  # templates, functions of tasks and the Hub's client raise any class
        told = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")[:200]
        raise UserError(f"{failed} ({type(error).__name__}: {told}); {hint}") from None
    return Requests(loaded, list(documents.values()), _key(task, _keys(loaded)), source)


def _few_shot(task: Task, config: Mapping[str, Any]) -> int:
    """How many examples each prompt has: as many as are asked for, unless the task says 0, as the harness has it."""
    own = config.get("num_fewshot")
    if task.few_shot and own == 0:
        progress.notify(f"{task.name}: has no examples in its prompts, as it says itself, whatever is asked for")
    return (own or 0) if task.few_shot is None or own == 0 else task.few_shot


def _check_safe(name: str, runs_code: Any, shows: Any) -> None:
    """Refuse what a language model cannot be asked, or should not be without a sandbox.

    Raises:
        UserError: if the task shows pictures or plays sound, or runs what a model writes.
    """
    if runs_code:
        raise UserError(f"{name}: runs programs that the model writes, which is refused; leave it out")
    if shows:
        raise UserError(f"{name}: asks about pictures or sound; leave it out")


def _check_metrics(name: str, loaded: Any) -> None:
    """The harness goes on without a metric that it could not fetch, and fails after all has been computed.

    Raises:
        UserError: if one is not there.
    """
    if callable(loaded.config.process_results):  # which brings its metrics along
        return
    absent = [metric for metric, function in getattr(loaded, "_metric_fn_list", {}).items() if function is None]
    if absent:
        raise UserError(
            f"{name}: lm-eval fetches its metric {absent[0]} by the package evaluate, and has not got it; install that "
            "package and connect to the network, or leave the task out"
        )


def _check_answers(loaded: Any, documents: list[dict[str, Any]]) -> None:
    """Splits whose answers are withheld often give -1; every model would be wrong on them.

    Raises:
        ValueError: for the first document whose right choice is not among its choices, or whose text is empty.
    """
    if loaded.OUTPUT_TYPE == "loglikelihood_rolling":
        empty = [number for number, document in enumerate(documents) if not loaded.doc_to_target(document)]
        if empty:
            raise ValueError(f"document {empty[0]} is empty")
    if loaded.OUTPUT_TYPE != "multiple_choice":
        return
    for number, document in enumerate(documents):
        # Where the choices are contexts and not continuations, the harness keeps the answer's index in place of a text.
        answer = loaded.doc_to_text(document) if loaded.multiple_input else loaded.doc_to_target(document)
        choices = loaded.doc_to_choice(document)
        for one in answer if isinstance(answer, list) else [answer]:
            if isinstance(one, int) and not 0 <= one < len(choices):
                raise ValueError(f"document {number} has the answer {one}, but {len(choices)} choices")
            if isinstance(one, str) and one not in choices:
                raise ValueError(f"document {number} has the answer {one!r}, which is none of its choices")


def _keys(loaded: Any) -> list[str]:
    """All that a task reports, metric by metric, each with the filters of answers that it is taken behind."""
    filters = [found.name for found in getattr(loaded, "_filters", ())] or ["none"]
    return [f"{metric},{name}" for metric in loaded.aggregation() for name in filters]


def _is_accuracy(key: str) -> bool:
    return key.startswith(("acc", "exact_match"))


def _key(task: Task, reported: Sequence[str]) -> str:
    """The metric that counts: the usual one, that of the task's group, or the first accuracy there is."""
    for wanted in (METRICS.get(task.name), task.metric):
        for key in reported:
            if wanted and wanted in (key, key.partition(",")[0]):
                return key
    return next((key for key in reported if _is_accuracy(key)), reported[0])
