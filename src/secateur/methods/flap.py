"""FLAP: channels and heads by how much they fluctuate; what they put out on average becomes a bias."""

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

    Scores are standardised within a layer and space, ``(S - mean S) / std S``, so that they compare across them; a
    head's is the mean over its channels (eq. 6). Removed channels leave ``B = W_removed mean(X_removed)`` behind as a
    bias (eq. 4).
    """

    source = "arXiv:2312.11983"
    scores = ("ffn", "kv")
    needs = (Variance, Mean)
    bias: Literal["auto", "require", "none"] = "auto"

    def score(self, place: Place) -> Tensor:
        assert place.reader is not None
        fluctuation = place.stats[Variance] * place.reader.square().sum(dim=0)
        standard = fluctuation - fluctuation.mean()
        if standard.any():  # else all fluctuate alike
            standard = standard / fluctuation.std()
        return place.by_unit(standard).mean(dim=1)
