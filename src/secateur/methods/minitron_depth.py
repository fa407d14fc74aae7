"""Minitron-depth: the contiguous run of layers whose removal changes the loss, or a task's accuracy, least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import spec
from secateur.methods.base import RemovalMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class MinitronDepth(RemovalMethod):
    r"""``S_i = L(model without layers i .. i+k-1) - L(model)`` (arXiv:2408.11796, depth pruning).

    With a task, accuracies A take the place of losses: ``S_i = A(model) - A(model without the run)``.
    """

    source = "arXiv:2408.11796"
    contiguous = True
    task: str = ""  #: lm-eval task, e.g. winogrande

    def score(self, full: float, without: Tensor) -> Tensor:
        return full - without if self.task else without - full
