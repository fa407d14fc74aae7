"""Minitron-depth: remove the contiguous run of layers that changes the loss, or a task's accuracy, least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import spec
from secateur.methods.base import RemovalMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class MinitronDepth(RemovalMethod):
    r"""``S_i = L(model without layers i .. i+k-1) - L(model)`` (arXiv:2408.11796, depth pruning).

    With a task, accuracies A replace losses: ``S_i = A(model) - A(model without the run)``.
    """

    source = "arXiv:2408.11796"
    contiguous = True
    task: str = ""

    def score(self, full: float, pruned: Tensor) -> Tensor:
        return full - pruned if self.task else pruned - full
