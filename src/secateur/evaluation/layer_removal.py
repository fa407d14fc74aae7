"""Accuracy on a task with some of a model's layers left out, for pruning by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from secateur import progress
from secateur.errors import UserError
from secateur.evaluation.lm_eval.accuracy import answers, language_model, say_truncation
from secateur.evaluation.lm_eval.tasks import Task
from secateur.model.checkpoint import Checkpoint

__all__ = ["removal_accuracies"]


def removal_accuracies(
    checkpoint: Checkpoint, length: int, task: Task, *, device: str, batch: int | None = None
) -> tuple[float, list[float]]:
    """The accuracy with each contiguous run of ``length`` blocks bypassed.

    The whole model is held in memory in float32, in every process, and each candidate takes one pass of it over all
    requests, which the processes share.

    Args:
        checkpoint: the model, with its tokenizer.
        length: of the runs, in blocks.
        task: what to measure.
        device: where to compute.
        batch: rows of requests at once; execution only, but sums are rounded in another order.

    Returns:
        The full model's accuracy, and that of each candidate, by the index of the run's first block.

    Raises:
        UserError: if the task cannot be had (see :attr:`Task.requests`), the checkpoint has no tokenizer or one that
            the harness cannot use, the model's log-likelihoods are NaN or infinite, or the task has no accuracy.
    """
    requests = task.requests  # before the model takes its time
    if not requests.is_accuracy:
        raise UserError(f"{task.name}: is measured by {requests.metric}; name a task with an accuracy, like winogrande")
    model = checkpoint.load().to(device)  # type: ignore[arg-type]
    asked = language_model(checkpoint, model, batch)

    def accuracy() -> float:
        return requests.score(answers(asked, task, checkpoint.directory)).value

    layers: nn.ModuleList = model.get_submodule(checkpoint.family.layers)  # type: ignore[assignment]
    candidates = range(len(layers) - length + 1)
    with progress.track(f"score by {task.name}", 1 + len(candidates)) as bar:
        full = accuracy()
        say_truncation(asked, task)
        bar.advance(1, f"full model {full:.3f}")
        without = []
        for first in candidates:
            with _bypassed(layers, first, length):
                without.append(accuracy())
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
