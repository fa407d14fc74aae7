"""From scores and a budget to what is kept. Ties go to the lower index, so that a selection is reproducible."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_channels", "keep_weights", "lowest"]


def keep_weights(scores: Tensor, ratio: float, *, within: str) -> Tensor:
    """Mark the weights to keep.

    Args:
        scores: [out, in].
        ratio: share to prune; each group loses exactly ``floor(ratio * size)`` weights.
        within: ``"row"``: each output row is a group; ``"linear"``: the whole matrix is one.

    Returns:
        bool [out, in], True where the weight is kept.
    """
    groups = scores if within == "row" else scores.reshape(1, -1)
    prune = int(groups.shape[1] * ratio + 1e-9)
    # Pruned first among equals is the lower index, as a stable ascending sort has it.
    order = groups.argsort(dim=1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(1, order[:, :prune], False)
    return keep.reshape(scores.shape)


def keep_channels(scores: Tensor, count: int) -> Tensor:
    """The ``count`` channels of the highest scores, as sorted indices (int64)."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def lowest(scores: Tensor) -> int:
    """The index of the lowest score."""
    return int(scores.argsort(stable=True)[0])
