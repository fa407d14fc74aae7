"""Minitron-width: hidden channels, FFN channels and heads by the magnitude of their activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from secateur.calibration.statistics import WindowMagnitude
from secateur.config import spec
from secateur.methods.base import Place, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor

Aggregate = Literal["l2", "mean"]
_INDEX: dict[Aggregate, int] = {"mean": 0, "l2": 1}  #: in the axes of WindowMagnitude


@spec
class MinitronWidth(WidthMethod):
    r"""``S_u = batch_b(sequence_t |x_btu|)``: magnitudes over positions, then over windows (arXiv:2407.14679, 2.2).

    The default, the paper's advice, is ``sqrt(sum_b (mean_t |x_btu|)^2)``, in the order of NVIDIA's Model-Optimizer.
    Where both aggregates are ``l2``, roots are left out: the sum of squares over all tokens and, for hidden channels,
    over norms, as in the code of the authors of arXiv:2606.14150.

    Hidden channels are scored at the outputs of the norms before attention and FFN, summed over all norms; FFN channels
    at the input of the down-projection. A head's magnitude is the L2 norm of its output; a KV head has the sum over its
    query heads. The channels of a routed expert are scored on the tokens routed to it: other positions count as zero.
    """

    source = "arXiv:2407.14679"
    axes = ("hidden", "ffn")
    scores = (*WidthMethod.scores, "expert_ffn")
    needs = (WindowMagnitude,)
    batch: Aggregate = "l2"  #: over windows
    sequence: Aggregate = "mean"  #: over the positions of a window

    def score(self, place: Place) -> Tensor:
        magnitudes = place.stats[WindowMagnitude][_INDEX[self.batch], _INDEX[self.sequence]]
        if self.batch == self.sequence == "l2":
            magnitudes = magnitudes.square()
        return place.by_unit(magnitudes).sum(dim=1)
