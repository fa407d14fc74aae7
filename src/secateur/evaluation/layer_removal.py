"""Accuracy on a task with some of a model's layers left out, for pruning by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from secateur import progress
from secateur.errors import UserError
from secateur.evaluation.lm_eval.accuracy import language_model, measure_task, report_truncation
from secateur.evaluation.lm_eval.tasks import Task, is_accuracy
from secateur.model.checkpoint import Checkpoint

__all__ = ["removal_accuracies"]


def removal_accuracies(
    checkpoint: Checkpoint, length: int, task: Task, *, device: str, batch: int | None = None
) -> tuple[float, list[float]]:
    """Measure the accuracy with each contiguous run of ``length`` blocks bypassed.

    Every process holds the whole model in float32. Each candidate takes one pass of the model over all requests, which
    the processes share.

    Args:
        length: of the runs, in blocks.
        batch: rows of requests at once; changes the order of sums, and so their rounding.

    Returns:
        The full model's accuracy, and that of each candidate, by the index of the run's first block.

    Raises:
        UserError: if the task has no accuracy or cannot be measured
            (:func:`secateur.evaluation.lm_eval.accuracy.measure_task`), or the tokenizer does not serve.
    """
    requests = task.requests  # its errors come before the model is loaded
    if not is_accuracy(requests.key):
        raise UserError(f"{task.name}: is measured by {requests.metric}; name a task with an accuracy, like winogrande")
    model = checkpoint.load_language_model().to(device)  # type: ignore[arg-type]
    harness_model = language_model(checkpoint, model, batch)
    layers: nn.ModuleList = model.get_submodule(checkpoint.family.layers)  # type: ignore[assignment]
    candidates = range(len(layers) - length + 1)
    with progress.track(f"score by {task.name}", 1 + len(candidates)) as bar:
        full = measure_task(harness_model, task).value
        report_truncation(harness_model, task)
        bar.advance(1, f"full model {full:.3f}")
        accuracies = []
        for first in candidates:
            with _bypass(layers, first, length):
                accuracies.append(measure_task(harness_model, task).value)
            bar.advance(1, f"best {max(accuracies):.3f} of {full:.3f}")
    return full, accuracies


class _Bypass(nn.Module):
    """Replaces a block without moving the others, so that each keeps its index and its kind of attention."""

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states


@contextlib.contextmanager
def _bypass(layers: nn.ModuleList, first: int, length: int) -> Iterator[None]:
    blocks = list(layers)
    try:
        for index in range(first, first + length):
            layers[index] = _Bypass()
        yield
    finally:
        for index in range(first, first + length):
            layers[index] = blocks[index]
