"""Wanda-sp: Wanda's score of weights, gathered over whole channels and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.calibration.statistics import MeanSquare
from secateur.config import spec
from secateur.methods.base import Place, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class WandaSP(WidthMethod):
    r"""``S_j = sum_i |W_ij| * ||X_j||_2`` over the rows i of the output or down-projection (arXiv:2312.11983, 4.1).

    A head's score is the sum over its channels. The norm is taken as a root mean square: a common factor changes no
    order.
    """

    source = "arXiv:2312.11983"
    scores = ("ffn", "kv")
    needs = (MeanSquare,)
    sequential = True

    def score(self, place: Place) -> Tensor:
        assert place.reader is not None
        return place.by_unit(place.reader.abs().sum(dim=0) * place.stats[MeanSquare].sqrt()).sum(dim=1)
