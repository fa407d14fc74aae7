"""From scores and a budget to what is kept. Ties are settled by the index, so that a selection is reproducible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Selector", "count_pruned", "keep_channels", "keep_globally", "lowest_indices"]


@dataclass(frozen=True)
class Selector:
    """Chooses the weights of a linear, or of some of its columns, that stay.

    Attributes:
        sparsity: share to prune; each group loses exactly ``floor(sparsity * size)`` weights, reckoned in decimals.
        within: ``row``: each output row is a group; ``linear``: all that is shown is one.
        span: for N:M patterns, M: each M weights that follow one another in a row are a group.
    """

    sparsity: float
    within: str = "row"
    span: int | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Mark what is kept: scores [out, in] -> bool [out, in]. Pruned first among equals is the lower index."""
        import torch

        groups = scores.reshape(-1, self.span) if self.span else scores
        groups = groups.reshape(1, -1) if self.within == "linear" and not self.span else groups
        prune = count_pruned(groups.shape[1], self.sparsity)
        if not prune:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = _lowest(groups, prune)
        gone = groups <= threshold
        if gone.count_nonzero() > prune * len(groups):  # of those equal to a threshold, the last stay
            stay = _counts(gone) - prune
            tied = stay.flatten() > 0
            equal = groups[tied] == threshold[tied]
            place = equal.cumsum(dim=1, dtype=torch.int32)
            gone[tied] &= ~(equal & (place > place[:, -1:] - stay[tied]))
        return gone.logical_not_().reshape(scores.shape)


def count_pruned(size: int, sparsity: float) -> int:
    """How many weights a group of so many loses: ``floor(sparsity * size)``, reckoned in decimals."""
    # In binary, 0.29 * 100 is 28.999999999999996 and (1 - 3/7) * 7 is 3.9999999999999996.
    return math.floor(Fraction(sparsity).limit_denominator(10**9) * size)


def _lowest(groups: Tensor, count: int) -> Tensor:
    """The highest of the ``count`` lowest in each group: [groups, members] -> [groups, 1]."""
    import numpy as np
    import torch

    if groups.device.type == "cpu" and groups.dtype in (torch.float32, torch.float64):
        least = groups.amin(dim=1, keepdim=True)
        equal = groups == least  # scores of what was pruned before are all zero: partition is slow among equals
        if equal.count_nonzero() >= count * len(groups) and (_counts(equal) >= count).all():
            return least
        # A third of the time of kthvalue, and no index for each value. A sort would take ten times as long.
        lowest = np.partition(groups.detach().numpy(), count - 1, axis=1)[:, count - 1 : count]
        return torch.from_numpy(lowest.copy())
    return groups.kthvalue(count, dim=1, keepdim=True).values


def _counts(marks: Tensor) -> Tensor:
    """How many of each group are marked: bool [groups, members] -> int32 [groups, 1]."""
    import torch

    return marks.view(torch.uint8).sum(dim=1, keepdim=True, dtype=torch.int32)  # bool itself takes seven times as long


def keep_channels(scores: Tensor, count: int) -> Tensor:
    """The ``count`` units of the highest scores, the lower index first among equals, as sorted indices (int64)."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def keep_globally(scores: Mapping[str, Tensor], costs: Mapping[str, int], remove: float) -> dict[str, Tensor]:
    """Let groups of units compete: the lowest scores go, wherever they are, until enough parameters are gone.

    Args:
        scores: group (a space in a layer) -> scores of its units; the best unit of each group always stays.
        costs: group -> parameters of one of its units.
        remove: parameters to remove, to the nearest unit.

    Returns:
        Group -> sorted indices (int64) of the units that stay.
    """
    import torch

    names = list(scores)
    owner = torch.cat([torch.full((scores[n].numel(),), i) for i, n in enumerate(names)])
    value = torch.cat([scores[n].double().cpu() for n in names])
    cost = torch.tensor([costs[n] for n in names], dtype=torch.float64)[owner]
    starts = torch.tensor([0, *(scores[n].numel() for n in names)]).cumsum(0)
    for i, n in enumerate(names):
        value[starts[i] + int(scores[n].argmax())] = torch.inf
    order = len(value) - 1 - value.flip(0).argsort(stable=True)  # of equals the lower index stays, as above
    order = order[value[order] < torch.inf]
    gone = cost[order].cumsum(0)
    count = int((gone <= remove).sum())
    if count < len(order) and gone[count] - remove < remove - (gone[count - 1] if count else 0.0):
        count += 1
    stays = torch.ones(len(value), dtype=torch.bool)
    stays[order[:count]] = False
    return {n: stays[starts[i] : starts[i + 1]].nonzero().flatten() for i, n in enumerate(names)}


def lowest_indices(scores: Tensor, count: int = 1) -> list[int]:
    """The indices of the ``count`` lowest scores, the lower index first among equals, sorted."""
    return sorted(scores.argsort(stable=True)[:count].tolist())
