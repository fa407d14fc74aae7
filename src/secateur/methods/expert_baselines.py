"""Simple scores of experts, which REAP is compared with: how often an expert is chosen, and how much it puts out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import spec
from secateur.methods.base import ExpertMethod, RoutedTokens

if TYPE_CHECKING:
    from torch import Tensor


@spec
class ExpertFrequency(ExpertMethod):
    """``S_j = number of tokens routed to j``."""

    source = "a baseline: how often the router chooses an expert"

    def score(self, experts: RoutedTokens) -> Tensor:
        return experts.tokens


@spec
class ExpertActivation(ExpertMethod):
    r"""``S_j = mean over the tokens routed to j of ||f_j(x)||_2``."""

    source = "a baseline: how much an expert puts out"

    def score(self, experts: RoutedTokens) -> Tensor:
        return experts.norms / experts.tokens.clamp(min=1)
