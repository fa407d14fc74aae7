"""ShortGPT: layers by how little they turn the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.calibration.statistics import MeanCosine
from secateur.config import spec
from secateur.methods.base import LayerMethod, Place

if TYPE_CHECKING:
    from torch import Tensor


@spec
class ShortGPT(LayerMethod):
    r"""Block influence ``1 - E_t[cos(h_t, h'_t)]``, states before and behind the block (arXiv:2403.03853, eq. 1)."""

    source = "arXiv:2403.03853"
    needs = (MeanCosine,)

    def score(self, layer: Place) -> Tensor:
        return 1 - layer.stats[MeanCosine]
