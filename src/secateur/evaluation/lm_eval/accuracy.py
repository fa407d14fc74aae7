"""Figures of tasks, document by document: lm-evaluation-harness evaluates a model that answers its requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from secateur.data.tokenizer import load_tokenizer
from secateur.errors import UserError, first_line
from secateur.evaluation.lm_eval.harness import import_harness, silence
from secateur.evaluation.lm_eval.tasks import Requests, Task, is_accuracy
from secateur.evaluation.loss import perplexity
from secateur.evaluation.results import Measurement, MeasurementKind
from secateur.formatting import plural
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.evaluation.lm_eval.likelihoods import Likelihoods

__all__ = ["check_tasks", "language_model", "measure_task", "report_truncation"]


def measure_task(model: Likelihoods, task: Task, *, advance: Callable[[float], None] | None = None) -> Measurement:
    """Measure a model on a task; all processes together.

    Args:
        advance: called with the number of answered requests after each batch.

    Raises:
        UserError: if the task cannot be built (see :attr:`Task.requests`), a choice has no token of its own, a
            log-likelihood is NaN or infinite, or the harness cannot score the answers.
    """
    requests = task.requests
    model.start(task.name, advance)
    kind, value, items, details = _figure(requests, *_evaluate(model, task))
    for item, digest, document in zip(items, requests.digests, requests.documents, strict=True):
        answers = [answer for request in document for answer in request.resps]
        texts = [answer for answer in answers if isinstance(answer, str)]
        numbers = [
            answer[0] if isinstance(answer, tuple) else answer for answer in answers if not isinstance(answer, str)
        ]
        fields = {"document": digest, "loglikelihoods": numbers, "written": texts}
        item |= {key: value for key, value in fields.items() if value}
    details["truncated"] = {"requests": model.truncated_requests, "choices": model.truncated_choices}
    return Measurement(task.name, kind, value, requests.protocol(), "documents", items, details)


def _evaluate(model: Likelihoods, task: Task) -> tuple[dict[str, float], list[Any]]:
    """Let the harness evaluate a model.

    Returns:
        Every finite metric by its key, and for each document the value of the metric that counts.
    """
    requests = task.requests
    tasks = {"tasks": {task.name: requests.harness_task}}
    try:
        with silence():
            results = import_harness("lm_eval").evaluate(lm=model, task_dict=tasks, limit=task.limit, bootstrap_iters=0)
    except Exception as error:  # functions of tasks, and metrics that are fetched, raise any class
        if isinstance(error, UserError) or model.answered < len(requests.instances):
            raise
        raise _scoring_error(task, f"{type(error).__name__}: {first_line(error)[:200]}") from None
    totals, samples = results["results"][task.name], results["samples"][task.name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    keys = sorted(requests.keys, key=lambda key: filters.index(key.partition(",")[2]))
    metrics = {key: float(totals[key]) for key in keys if _is_finite(totals.get(key))}
    if requests.key not in metrics:
        raise _scoring_error(task, "it gives no number")
    metric, _, answer_filter = requests.key.partition(",")
    rows = [sample for sample in samples if sample["filter"] == answer_filter]
    return metrics, [row[metric] for row in rows if metric in row]


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _scoring_error(task: Task, reason: str) -> UserError:
    return UserError(
        f"{task.name}: lm-eval cannot score the answers by {task.requests.metric} ({reason}); leave the task out"
    )


def _figure(
    requests: Requests, metrics: dict[str, float], values: list[Any]
) -> tuple[MeasurementKind, float, list[dict[str, Any]], dict[str, Any]]:
    """Kind and value of the metric that counts, the items of the documents, and details."""
    value, key, task = metrics[requests.key], requests.key, requests.harness_task
    details: dict[str, Any] = {"metrics": metrics}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        # each value: log-likelihood of the document, and its number of words or bytes
        items = [{"value": -total / count, "tokens": count} for total, count in values]
        loss = -sum(total for total, _ in values) / sum(count for _, count in values)
        unit = "word" if key.startswith("word") else "byte"
        return "loss", loss, items, {**details, "perplexity": perplexity(loss), "per": unit}
    if not task.higher_is_better().get(key.partition(",")[0], True):
        details["lower_is_better"] = True
    is_mean = len(values) == len(requests.documents) and all(isinstance(v, Real) for v in values)
    if not is_mean or not math.isclose(sum(values) / len(values), value, abs_tol=1e-9):
        return "score", value, [{"value": None} for _ in requests.documents], details
    kind: MeasurementKind = "accuracy" if is_accuracy(key) and all(0 <= v <= 1 for v in values) else "score"
    return kind, value, [{"value": float(v)} for v in values], details


def check_tasks(checkpoint: Checkpoint, tasks: Sequence[Task]) -> None:
    """Check that a model can answer the requests of tasks, before anything is computed.

    Raises:
        UserError: if the checkpoint has no tokenizer, or one that the harness cannot use, or if it has no positions
            for a question beside the tokens that a task lets a model write.
    """
    if not tasks:
        return
    _tokenizer(checkpoint)
    normalize = import_harness("lm_eval.models.utils").normalize_gen_kwargs
    positions = max_positions(checkpoint.config)
    for task in tasks:
        generated = [r for r in task.requests.instances if r.request_type == "generate_until"]
        length = max((normalize(request.args[1])["max_gen_toks"] for request in generated), default=0)
        if positions is not None and length >= positions:
            raise UserError(
                f"{checkpoint.directory}: {task.name} lets a model write {plural(length, 'token')}, and this one takes "
                f"{positions} with the question; leave the task out"
            )


def language_model(checkpoint: Checkpoint, model: PreTrainedModel, batch: int | None = None) -> Likelihoods:
    """Wrap a model for the harness, with the checkpoint's own tokenizer.

    Args:
        model: in evaluation mode, on its device.
        batch: rows at once; None for what suits the device.

    Raises:
        UserError: if lm-eval is not installed, or the checkpoint has no tokenizer, or one that the harness cannot use.
    """
    tokenizer = _tokenizer(checkpoint)
    with silence():
        import_harness("lm_eval.models.huggingface")
        likelihoods: Any = import_harness("secateur.evaluation.lm_eval.likelihoods")
        return likelihoods.Likelihoods(model, tokenizer, name=str(checkpoint.directory), batch=batch)


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(checkpoint.directory)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{checkpoint.directory}: its tokenizer has neither a BOS nor an EOS token, and lm-eval needs one; "
            "name one in tokenizer_config.json"
        )
    return tokenizer


def report_truncation(model: Likelihoods, task: Task) -> None:
    """Notify about requests of the last measurement that were longer than the model's positions."""
    if model.truncated_requests:
        notify(
            f"{task.name}: left out the beginning of {model.truncated_requests:,} of "
            f"{plural(len(task.requests.instances), 'request')}, longer than the {model.max_length} tokens that the "
            "model takes"
        )
    if model.truncated_choices:
        notify(
            f"{task.name}: in {model.truncated_choices:,} of them the choice alone is longer, so that only its last "
            f"{model.max_length} tokens are scored, where lm-eval itself would give up"
        )
