"""Wanda: weights by their magnitude times the norm of the input that they multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.calibration.statistics import MeanSquare
from secateur.config import spec
from secateur.methods.base import Statistics, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class Wanda(WeightMethod):
    r"""``S_ij = |W_ij| * ||X_j||_2``, compared within each output row (arXiv:2306.11695, eq. 1).

    The norm is taken as a root mean square: a factor common to the row changes no comparison.
    """

    source = "arXiv:2306.11695"
    needs = (MeanSquare,)
    compare = "row"

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        return weight.abs() * stats[MeanSquare].sqrt()
