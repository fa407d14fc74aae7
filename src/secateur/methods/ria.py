"""RIA: weights by their share of their row and column, times the norm of the input that they multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from secateur.calibration.statistics import MeanSquare
from secateur.config import spec
from secateur.methods.base import Statistics, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class RIA(WeightMethod):
    r"""``S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^a``, compared within each linear.

    The formula and ``a`` = 0.5 are those of the authors' code (Zhang et al., "Plug-and-play: an efficient post-training
    pruning method for large language models", ICLR 2024). The norm is taken as a root mean square, as in Wanda.
    """

    source = "ICLR 2024"
    needs = (MeanSquare,)
    compare = "linear"
    exponent: Annotated[float, Field(ge=0)] = 0.5

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        import torch

        size = weight.abs()
        least = torch.finfo(size.dtype).tiny  # a row or column of zeros has no shares
        columns, rows = size.sum(dim=0).clamp_min(least), size.sum(dim=1, keepdim=True).clamp_min(least)
        return (size / columns + size / rows) * stats[MeanSquare].pow(self.exponent / 2)
