"""SLEB: remove one layer at a time, the one that the loss can best do without, and score the others again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import spec
from secateur.methods.base import RemovalMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class SLEB(RemovalMethod):
    r"""``S_n = L(model without layer n and those removed before)``; the lowest goes, one by one (arXiv:2402.09025).

    The first and the last layer stay, as in the authors' code.
    """

    source = "arXiv:2402.09025"
    contiguous = False
    greedy = True
    keep_first: int = 1  #: layers at the start that always stay
    keep_last: int = 1  #: layers at the end that always stay

    def spared(self, layers: int) -> frozenset[int]:
        return frozenset([*range(self.keep_first), *range(layers - self.keep_last, layers)])

    def score(self, full: float, pruned: Tensor) -> Tensor:
        return pruned
