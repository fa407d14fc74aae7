"""FLAP: remove the channels and heads that fluctuate least; a bias replaces their mean output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from secateur.calibration.statistics import Mean, Variance
from secateur.config import spec
from secateur.methods.base import Place, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class FLAP(WidthMethod):
    r"""``S_j = Var(X_j) * ||W_:j||_2^2`` at the output or down-projection W (arXiv:2312.11983, eq. 5).

    Scores are standardised within a layer and space, ``(S - mean S) / std S``, so that they can be compared across
    layers and spaces. A head's score is the mean over its channels (eq. 6). The bias ``B = W_removed mean(X_removed)``
    replaces removed channels (eq. 4).
    """

    source = "arXiv:2312.11983"
    scores = ("ffn", "kv")
    needs = (Variance, Mean)
    bias: Literal["auto", "require", "none"] = "auto"

    def score(self, place: Place) -> Tensor:
        assert place.reader is not None
        fluctuation = place.stats[Variance] * place.reader.square().sum(dim=0)
        standardised = fluctuation - fluctuation.mean()
        if standardised.any():  # otherwise the standard deviation is zero
            standardised = standardised / fluctuation.std()
        return place.by_unit(standardised).mean(dim=1)
