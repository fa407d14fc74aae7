"""Minitron-width: hidden channels, FFN channels and heads by the magnitude of their activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.calibration.statistics import NormByPosition
from secateur.config import spec
from secateur.methods.base import Place, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class MinitronWidth(WidthMethod):
    r"""``S_u = sum_t (mean_b |x_btu|)^2``: batch mean, squared and summed over positions (arXiv:2407.14679, 2.2).

    Hidden channels are scored at the outputs of the norms before attention and FFN, summed over all norms; FFN channels
    at the input of the down-projection. A head's magnitude is the L2 norm of its output; a KV head has the sum over its
    query heads.
    """

    source = "arXiv:2407.14679"
    axes = ("hidden", "ffn")
    needs = (NormByPosition,)

    def score(self, place: Place) -> Tensor:
        return place.by_unit(place.stats[NormByPosition].square().sum(dim=0)).sum(dim=1)
