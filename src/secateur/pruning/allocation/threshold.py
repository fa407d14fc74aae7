"""Global allocation: one threshold for the scores of all linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from secateur.pruning.allocation.counts import round_to_total

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["score_histogram", "zeros_below_threshold"]

_SHIFT = 15  #: bits of a float32 that are dropped; scores in one bin differ by 0.4% at most


def score_histogram(scores: Tensor) -> Tensor:
    """Number of scores in each bin of about 0.4%, int64 [65536]; scores must not be negative."""
    import torch

    bins = scores.float().contiguous().view(torch.int32).flatten() >> _SHIFT  # these floats are ordered as their bits
    return torch.bincount(bins, minlength=2 ** (31 - _SHIFT))


def zeros_below_threshold(histograms: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """Linear -> number of its scores among the ``total`` lowest of all; the threshold's bin is shared in proportion."""
    every = sum(histograms.values())
    assert not isinstance(every, int)
    sums = every.cumsum(0)
    edge = int((sums < total).count_nonzero())
    below = {name: int(histogram[:edge].sum()) for name, histogram in histograms.items()}
    share = (total - sum(below.values())) / max(1, int(every[edge]))
    zeros = {name: below[name] + share * int(histogram[edge]) for name, histogram in histograms.items()}
    return round_to_total(zeros, {n: below[n] + int(h[edge]) for n, h in histograms.items()}, total)
