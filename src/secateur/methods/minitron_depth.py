"""Minitron-depth: the contiguous run of layers whose removal changes the loss least."""

from __future__ import annotations

from torch import Tensor

from secateur.methods import DepthMethod


class MinitronDepth(DepthMethod):
    r"""``S_i = L(model without layers i .. i+k-1) - L(model)`` (arXiv:2408.11796, depth pruning by loss)."""

    source = "arXiv:2408.11796"

    def score(self, loss_full: float, loss_without: Tensor) -> Tensor:
        return loss_without - loss_full
