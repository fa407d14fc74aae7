"""What a model answers to the tasks of lm-evaluation-harness, and how good that is, document by document."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.data.tokenizer import check_vocabulary, load_tokenizer
from secateur.errors import UserError
from secateur.evaluation.lm_eval.harness import import_harness, silence
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.results import Measurement
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.evaluation.lm_eval.likelihoods import Likelihoods

__all__ = ["answers", "check_tasks", "language_model", "measure_task", "say_truncation"]


def measure_task(
    asked: Likelihoods, task: Task, directory: Path, *, advance: Callable[[float], None] | None = None
) -> Measurement:
    """Measure the figure of a task; all processes together.

    Args:
        asked: the model, from :func:`language_model`.
        task: what to measure.
        directory: the model's, for errors.
        advance: told the number of requests after each batch.

    Raises:
        UserError: if the task cannot be had (see :attr:`Task.requests`), the model cannot be asked or its
            log-likelihoods are NaN or infinite (see :func:`answers`), or the harness fails to score what it answers.
    """
    requests = task.requests
    asked.beheaded = asked.clipped = 0
    asked.advance = advance or (lambda _: None)
    found = answers(asked, task, directory)
    try:
        score = requests.score(found)
    except Exception as error:  # functions of tasks, and metrics that are fetched, raise any class
        told = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise UserError(
            f"{task.name}: lm-eval cannot score the answers by {requests.metric} ({type(error).__name__}: {told}); "
            "leave the task out"
        ) from None
    say_truncation(asked, task)
    replies = iter(found)
    items = [
        {
            "document": digest,
            **item,
            **_replies([next(replies) for request in document for _ in range(request.repeats)]),
        }
        for digest, item, document in zip(requests.digests, score.items, requests.documents, strict=True)
    ]
    details = {**score.details, "truncated": {"requests": asked.beheaded, "choices": asked.clipped}}
    return Measurement(task.name, score.kind, score.value, requests.protocol(), "documents", items, details)


def check_tasks(checkpoint: Checkpoint, tasks: Sequence[Task]) -> None:
    """See that a model can be asked, before anything is computed.

    Raises:
        UserError: if the checkpoint has no tokenizer, or one that the harness cannot use, or if it has no positions
            for a question beside what a task lets a model write.
    """
    if not tasks:
        return
    _tokenizer(checkpoint)
    normalize = import_harness("lm_eval.models.utils").normalize_gen_kwargs
    room = max_positions(checkpoint.config)
    for task in tasks:
        writing = [r for r in task.requests.instances if r.request_type == "generate_until"]
        most = max((normalize(request.args[1])["max_gen_toks"] for request in writing), default=0)
        if room is not None and most >= room:
            raise UserError(
                f"{checkpoint.directory}: {task.name} lets a model write {most} tokens, and this one takes {room} with "
                "the question; leave the task out"
            )


def _replies(found: Sequence[Any]) -> dict[str, Any]:
    """What a model answered about one document, as its item keeps it."""
    likelihoods = [reply[0] if isinstance(reply, tuple) else reply for reply in found if not isinstance(reply, str)]
    written = [reply for reply in found if isinstance(reply, str)]
    return {**({"loglikelihoods": likelihoods} if likelihoods else {}), **({"written": written} if written else {})}


def answers(asked: Likelihoods, task: Task, directory: Path) -> list[Any]:
    """The answer to each request, as often as it is to be answered; all processes together.

    Returns:
        By the kind of request: the log-likelihood of a continuation (nats) and whether it is greedy, the
        log-likelihood of a text, or what the model writes.

    Raises:
        UserError: if a choice has no token of its own, or a log-likelihood is NaN or infinite.
    """
    instances = task.requests.instances
    kinds: dict[str, list[int]] = {}
    for number, instance in enumerate(instances):
        kinds.setdefault(instance.request_type, []).append(number)
    found: list[Any] = [None] * len(instances)
    for kind, numbers in kinds.items():
        try:
            with silence():
                replies = getattr(asked, kind)([instances[number] for number in numbers])
        except ValueError:
            if kind != "loglikelihood":
                raise
            told = f"{task.name} has a choice without a token of its own"
            raise UserError(f"{directory}: {told}; use another task") from None
        for number, reply in zip(numbers, replies, strict=True):
            found[number] = reply
            value = reply[0] if isinstance(reply, tuple) else reply
            if not isinstance(value, str) and not math.isfinite(value):
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
    tokenizer = _tokenizer(checkpoint)
    with silence():
        import_harness("lm_eval.models.huggingface")
        made: Any = import_harness("secateur.evaluation.lm_eval.likelihoods")
        return made.Likelihoods(model, tokenizer, batch=batch)


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{checkpoint.directory}: its tokenizer has neither a BOS nor an EOS token, and lm-eval needs one; "
            "name one in tokenizer_config.json"
        )
    return tokenizer


def say_truncation(asked: Likelihoods, task: Task) -> None:
    """Tell what the model had no positions for."""
    total = len(task.requests.instances)
    if asked.beheaded:
        notify(
            f"{task.name}: {asked.beheaded:,} of {total:,} requests are longer than the {asked.max_length} tokens that "
            "the model takes; their beginning is left out"
        )
    if asked.clipped:
        notify(
            f"{task.name}: in {asked.clipped:,} of them the choice alone is longer, so that only its last "
            f"{asked.max_length} tokens are scored, where lm-eval itself would give up"
        )
