"""Tasks of lm-evaluation-harness: documents, requests and the metric that counts.

Prompts, choices, examples and metrics are the harness's own. Documents come from the Hugging Face Hub, or from a local
folder that holds ``<task>.jsonl``: one document a line, with the fields of the task's dataset on the Hub. The harness
is an optional dependency: ``pip install 'secateur[tasks]'``.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secateur import progress
from secateur.config import fingerprint
from secateur.errors import UserError, first_line
from secateur.evaluation.lm_eval.harness import folder_manager, import_harness, silence
from secateur.evaluation.lm_eval.task_files import local_changes, task_file
from secateur.formatting import plural

__all__ = ["METRICS", "Requests", "Task", "is_accuracy"]

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

_SEED = 1234  # the harness's own, for drawing examples


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness. Its documents are read once, when they are first needed.

    Args:
        name: the harness's name, e.g. ``winogrande``.
        data: a folder with ``<name>.jsonl``; None for the dataset on the Hub.
        limit: number of documents, from the first; None for all.
        few_shot: examples in each prompt; None for the task's own number, mostly 0. As in the harness, a task that is
            configured with 0 examples keeps 0.
        changes: changes of its configuration, by the groups around it.
        metric: the metric that counts, e.g. ``acc``, maybe with the filter of answers, as in
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
        """The requests to a model.

        Raises:
            UserError: if lm-eval is not installed or has no such task; if the task needs pictures, sound or to run
                programs that a model writes; if its file is missing, malformed or has other fields; or if the Hub does
                not provide it.
        """
        return _build(self)

    def record(self) -> dict[str, Any]:
        """The identity of the measurement: versions, metric, number of documents, source.

        Raises:
            UserError: as :attr:`requests`.
        """
        return {"name": self.name, **self.requests.record()}


@dataclass(frozen=True)
class Requests:
    """The requests of one task, built once and answered by every model."""

    harness_task: Any  #: the harness's ``Task``
    documents: list[list[Any]]  #: the requests of each document, e.g. one for each choice
    key: str  #: the metric that counts, with the filter of answers, as in ``acc_norm,none``
    source: dict[str, str]  #: ``sha256`` of the local file, or ``dataset`` on the Hub

    @cached_property
    def instances(self) -> list[Any]:
        """Every request as often as it is answered, document by document."""
        return [request for document in self.documents for request in document for _ in range(request.repeats)]

    @property
    def keys(self) -> list[str]:
        """Every metric of the task with every filter of answers."""
        return _metric_keys(self.harness_task)

    @property
    def metric(self) -> str:
        """The metric that counts, with the filter of answers unless it is the usual one."""
        return self.key.removesuffix(",none")

    def record(self) -> dict[str, Any]:
        """Version of the task and of the harness, metric, number of documents, source."""
        return {
            "version": self.harness_task.VERSION,
            "lm_eval": import_harness("lm_eval").__version__,
            "metric": self.metric,
            "documents": len(self.documents),
            **self.source,
        }

    def protocol(self) -> dict[str, Any]:
        """The record, number of examples, and a fingerprint of the metric, the documents and all requests.

        Another version of the harness that builds the same requests gives the same fingerprint.
        """
        few_shot = self.harness_task.config.num_fewshot or 0
        return {**self.record(), "few_shot": few_shot, "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        texts = [[_json_value(request.args[:2]) for request in requests] for requests in self.documents]
        name = self.harness_task.config.task
        return fingerprint({"task": name, "metric": self.metric, "documents": self.digests, "asked": texts})

    @cached_property
    def digests(self) -> list[str]:
        """The identity of each document: the first half of the SHA-256 of its fields, in hexadecimal."""
        return [fingerprint(_json_value(requests[0].doc))[:32] for requests in self.documents]


def _json_value(value: Any) -> Any:
    """Convert a value to JSON types; anything else becomes text."""
    return json.loads(json.dumps(value, default=str))


def _build(task: Task) -> Requests:
    name = task.name
    if task.limit is not None and task.limit < 1:
        raise UserError(f"{name}: a limit of {task.limit} leaves no document; make it 1 or more")
    if task.few_shot is not None and task.few_shot < 0:
        raise UserError(f"{name}: {task.few_shot} examples in a prompt are not possible; make it 0 or more")
    config = {**folder_manager(name).task_index[name].cfg, **task.changes, "task": name}
    _check_text_only(name, config.get("unsafe_code"), config.get("doc_to_image") or config.get("doc_to_audio"))
    few_shot = _few_shot(task, config)
    if task.data is None:
        dataset = ":".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key)) or name
        progress.notify(f"{name}: asking the Hugging Face Hub for {dataset}")
        local, source = {}, {"dataset": dataset}
        failure = f"{name}: {dataset} cannot be loaded from the Hugging Face Hub"
        hint = f"connect to the network, or name a folder that holds {name}.jsonl"
    else:
        local, source = local_changes(config, task.data, few_shot)
        failure = f"{task_file(task.data, name)}: {name} cannot be built from it"
        hint = "it must have the fields of the task's dataset on the Hugging Face Hub, including the answers"
    changes = {**task.changes, "task": name, "num_fewshot": few_shot, **local}
    try:
        with silence(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            harness_task, documents = _load(name, changes, task.limit)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{name}: lm-eval's code for it does not run here ({error}); leave it out") from None
    except Exception as error:  # templates, functions of tasks and the Hub's client raise any class
        reason = f"{type(error).__name__}: {first_line(error).rstrip('.')[:200]}"
        raise UserError(f"{failure} ({reason}); {hint}") from None
    return Requests(harness_task, documents, _pick_key(task, _metric_keys(harness_task)), source)


def _load(name: str, changes: dict[str, Any], limit: int | None) -> tuple[Any, list[list[Any]]]:
    """Load the harness's task with changes of its configuration, and build the requests of each document."""
    # The harness changes the configuration of a task only where a group names it.
    loaded = folder_manager(name).load({"group": "secateur", "task": [changes]})["tasks"][name]
    _check_text_only(name, getattr(loaded, "UNSAFE_CODE", False), getattr(loaded, "MULTIMODAL", False))
    _check_metrics(name, loaded)
    loaded.set_fewshot_seed(_SEED)
    loaded.build_all_requests(limit=limit)
    documents: dict[int, list[Any]] = defaultdict(list)
    for request in loaded.instances:
        documents[request.doc_id].append(request)
    _check_answers(loaded, [requests[0].doc for requests in documents.values()])

    def clear_answers(**_: Any) -> None:
        for request in loaded.instances:
            request.resps = []

    loaded.build_all_requests = clear_answers  # lm_eval.evaluate would build the requests again for every model
    return loaded, list(documents.values())


def _few_shot(task: Task, config: Mapping[str, Any]) -> int:
    """The number of examples in each prompt; as in the harness, a task that is configured with 0 keeps 0."""
    default = config.get("num_fewshot")
    if task.few_shot and default == 0:
        progress.notify(f"{task.name}: prompts have no examples, since the task is configured with 0")
    return (default or 0) if task.few_shot is None or default == 0 else task.few_shot


def _check_text_only(name: str, runs_code: Any, is_multimodal: Any) -> None:
    """Refuse a task that runs programs which a model writes, or that needs pictures or sound."""
    if runs_code:
        raise UserError(f"{name}: runs programs that the model writes, which is refused; leave it out")
    if is_multimodal:
        raise UserError(f"{name}: asks about pictures or sound; leave it out")


def _check_metrics(name: str, loaded: Any) -> None:
    """Refuse a task with a metric that could not be fetched; the harness would fail only after the model has run."""
    if callable(loaded.config.process_results):  # which brings its metrics along
        return
    absent = [metric for metric, function in getattr(loaded, "_metric_fn_list", {}).items() if function is None]
    if absent:
        raise UserError(
            f"{name}: lm-eval fetches its metric {absent[0]} with the package evaluate, and could not; install that "
            "package and connect to the network, or leave the task out"
        )


def _check_answers(loaded: Any, documents: list[dict[str, Any]]) -> None:
    """Check that texts are not empty and right answers are among the choices; withheld answers are often -1.

    Raises:
        ValueError: for the first document that fails.
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
        for right in answer if isinstance(answer, list) else [answer]:
            if isinstance(right, int) and not 0 <= right < len(choices):
                raise ValueError(f"document {number} has the answer {right}, but {plural(len(choices), 'choice')}")
            if isinstance(right, str) and right not in choices:
                raise ValueError(f"document {number} has the answer {right!r}, which is none of its choices")


def _metric_keys(loaded: Any) -> list[str]:
    filters = [entry["name"] for entry in loaded.config.filter_list or ()] or ["none"]
    return [f"{metric},{name}" for metric in loaded.aggregation() for name in filters]


def is_accuracy(key: str) -> bool:
    """Whether a metric is the share of right answers."""
    return key.startswith(("acc", "exact_match"))


def _pick_key(task: Task, keys: Sequence[str]) -> str:
    """The metric that counts: the usual one, that of the task's group, or the first accuracy."""
    for metric in (METRICS.get(task.name), task.metric):
        for key in keys:
            if metric and metric in (key, key.partition(",")[0]):
                return key
    return next((key for key in keys if is_accuracy(key)), keys[0])
