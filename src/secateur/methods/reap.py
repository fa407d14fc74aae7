"""REAP: the router-weighted norm of what an expert puts out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import spec
from secateur.methods.base import ExpertMethod, RoutedTokens

if TYPE_CHECKING:
    from torch import Tensor


@spec
class REAP(ExpertMethod):
    r"""``S_j = mean over the tokens routed to j of g_j(x) * ||f_j(x)||_2`` (arXiv:2510.13999).

    ``g_j`` is the weight that multiplies the expert's output: divided by the sum of the chosen experts' only where the
    model does so. An expert that no token reaches scores zero.
    """

    source = "arXiv:2510.13999"

    def score(self, experts: RoutedTokens) -> Tensor:
        return experts.weighted / experts.tokens.clamp(min=1)
