"""OWL: blocks with more outliers among their scores lose fewer weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAMBDA", "M", "outlier_share", "owl_ratios"]

M = 5.0  #: an outlier is more than M times the mean of its block
LAMBDA = 0.08  #: densities differ by 2 lambda at most


def outlier_share(scores: Sequence[Tensor]) -> float:
    """``D = 100 |{a in A: a > M mean(A)}| / |A|``, A the scores ``|W| ||X||`` of all linears of a block, in percent."""
    size = sum(part.numel() for part in scores)
    mean = sum(float(part.double().sum()) for part in scores) / size
    return 100 * sum(int((part > M * mean).count_nonzero()) for part in scores) / size


def owl_ratios(outliers: Sequence[float], ratio: float) -> list[float]:
    """The ratio of each block: ``1 - density``, with ``density = s - mean(s) + 1 - ratio`` and s = D on [0, 2 lambda].

    The formula is that of the authors' code (arXiv:2310.05175). Blocks with equal shares of outliers get equal ratios.
    """
    least, most = min(outliers), max(outliers)
    spread = most - least
    scaled = [2 * LAMBDA * (d - least) / spread if spread else 0.0 for d in outliers]
    mean = sum(scaled) / len(scaled)
    return [ratio - (s - mean) for s in scaled]
