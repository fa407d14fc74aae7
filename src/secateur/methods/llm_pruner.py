"""LLM-Pruner: coupled structures by a Taylor expansion of the loss in their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from secateur.calibration.statistics import MeanGradient, MeanSquareGradient
from secateur.config import spec
from secateur.methods.base import Place, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class LLMPruner(WidthMethod):
    r"""The importance of a unit is summed over all weights W that contain it (arXiv:2305.11627, 3.2).

    With the gradient g and the diagonal H of the Fisher matrix (mean square of the samples' gradients), a weight's
    salience is, by order:

    - first:  ``s = g W`` (eq. 3, first term)
    - second: ``s = W H W`` (eq. 5, second term)
    - mixed:  ``s = g W - 1/2 W H W`` (eq. 5)

    With ``element``, a unit's importance in W is ``sum |s|`` over its weights. With ``vector``, it is ``|sum s|`` for
    each of its channels, summed over channels.
    """

    source = "arXiv:2305.11627"
    needs = (MeanGradient, MeanSquareGradient)
    order: Literal["first", "second", "mixed"] = "first"
    aggregate: Literal["element", "vector"] = "element"

    def score(self, place: Place) -> Tensor:
        import torch

        first, second = place.gradient(MeanGradient), place.gradient(MeanSquareGradient)
        importances = []
        for name, weight in place.weights.items():
            salience = self._salience(weight, first[name], second[name])
            if self.aggregate == "vector":
                salience = place.by_channel(name, salience).sum(dim=2)
            importances.append(salience.abs().sum(dim=1))
        return torch.stack(importances).sum(dim=0)

    def _salience(self, weight: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
        first, second = gradient * weight, fisher * weight.square()
        return {"first": first, "second": second, "mixed": first - second / 2}[self.order]
