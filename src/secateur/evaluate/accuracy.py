"""Accuracy of a model on tasks of lm-evaluation-harness, document by document."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint import Checkpoint
from secateur.data.tokenizer import check_vocabulary, load_tokenizer
from secateur.errors import UserError
from secateur.evaluate.results import Measurement
from secateur.evaluate.tasks import Task, import_harness, silenced
from secateur.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.evaluate.likelihoods import Likelihoods

__all__ = ["answers", "language_model", "measure_task", "say_truncation"]


def measure_task(
    asked: Likelihoods, task: Task, directory: Path, *, advance: Callable[[int], None] | None = None
) -> Measurement:
    """Measure the accuracy on a task; all processes together.

    Args:
        asked: the model, from :func:`language_model`.
        task: what to measure.
        directory: the model's, for errors.
        advance: told the number of requests after each batch.

    Raises:
        UserError: if the task cannot be had (see :attr:`Task.requests`), a choice has no token of its own, or the
            model's log-likelihoods are NaN or infinite.
    """
    requests = task.requests
    asked.beheaded = asked.clipped = 0
    asked.advance = advance or (lambda _: None)
    found = answers(asked, task, directory)
    accuracy, values = requests.score(found)
    say_truncation(asked, task)
    likelihoods = iter(found)
    items = [
        {
            "document": digest,
            "value": value,
            "loglikelihoods": [next(likelihoods)[0] for _ in document],
        }
        for digest, value, document in zip(requests.digests, values, requests.documents, strict=True)
    ]
    details = {"truncated": {"requests": asked.beheaded, "choices": asked.clipped}}
    return Measurement(task.name, "accuracy", accuracy, requests.protocol(), "documents", items, details)


def answers(asked: Likelihoods, task: Task, directory: Path) -> list[tuple[float, bool]]:
    """The log-likelihood of each request's continuation (nats), and whether it is greedy; all processes together.

    Raises:
        UserError: if a choice has no token of its own, or a log-likelihood is NaN or infinite.
    """
    try:
        with silenced():
            found = asked.loglikelihood(task.requests.harness.instances)
    except ValueError:
        raise UserError(f"{directory}: {task.name} has a choice without a token of its own; use another task") from None
    if not all(math.isfinite(value) for value, _ in found):
        raise UserError(f"{directory}: the log-likelihoods on {task.name} are NaN or infinite")
    return found


def language_model(checkpoint: Checkpoint, model: PreTrainedModel, batch: int | None = None) -> Likelihoods:
    """The model as the harness asks it, with the checkpoint's own tokenizer.

    Args:
        checkpoint: where the tokenizer is.
        model: in evaluation mode, on its device.
        batch: rows at once; None for what suits the device.

    Raises:
        UserError: if lm-eval is not installed, or the checkpoint has no tokenizer, or one that the harness cannot use.
    """
    tokenizer = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{checkpoint.directory}: its tokenizer has neither a BOS nor an EOS token, and lm-eval needs one; "
            "name one in tokenizer_config.json"
        )
    with silenced():
        import_harness("lm_eval.models.huggingface")
        made: Any = import_harness("secateur.evaluate.likelihoods")
        return made.Likelihoods(model, tokenizer, batch=batch)


def say_truncation(asked: Likelihoods, task: Task) -> None:
    """Tell what the model had no positions for."""
    total = len(task.requests.harness.instances)
    if asked.beheaded:
        say(
            f"{task.name}: {asked.beheaded:,} of {total:,} requests are longer than the {asked.max_length} tokens that "
            "the model takes; their beginning is left out"
        )
    if asked.clipped:
        say(
            f"{task.name}: in {asked.clipped:,} of them the choice alone is longer, so that only its last "
            f"{asked.max_length} tokens are scored, where lm-eval itself would give up"
        )
