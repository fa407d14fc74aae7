"""Magnitude: remove the smallest weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import spec
from secateur.methods.base import Statistics, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class Magnitude(WeightMethod):
    r"""``S_ij = |W_ij|``, compared within each linear (arXiv:1506.02626)."""

    source = "arXiv:1506.02626"
    calibrated = False
    compare = "linear"

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        return weight.abs()
