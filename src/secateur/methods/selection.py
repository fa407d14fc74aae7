"""Select the units or weights that stay, from scores and a budget. Ties go by index, which is reproducible."""

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
    """Selects the weights that stay in a linear, or in some of its columns.

    Attributes:
        sparsity: share to prune; each group loses exactly ``floor(sparsity * size)`` weights, computed in decimals.
        within: group of competing weights: ``row``, each output row; ``linear``, all the scores passed.
        span: M of an N:M pattern: M consecutive weights of a row are a group. None without a pattern.
        mask: of an earlier pruning of the linear, bool [out, in]: weights where it is False are pruned first, and stay
            pruned where they are more than the share. None for a dense linear.
        zeros: weights to prune in the whole linear, in place of ``sparsity``; None for a share. Rows lose as many each,
            and the first ones one more where that leaves a rest; columns lose theirs in proportion.
        width: columns of the linear; required with ``zeros``.
    """

    sparsity: float
    within: str = "row"
    span: int | None = None
    mask: Tensor | None = None
    zeros: int | None = None
    width: int | None = None

    def __call__(self, scores: Tensor, columns: slice = slice(None)) -> Tensor:
        """Mark the weights that stay: scores [out, columns] -> bool; on ties the lower index is pruned.

        Args:
            columns: those of the linear that ``scores`` are of.
        """
        if self.zeros is not None:
            return self._select_zeros(scores, columns, self.zeros)
        if self.mask is None:
            return self._select(scores)
        mask = self.mask[:, columns]
        return self._select(scores.masked_fill(~mask, -math.inf)).logical_and_(mask)

    def _select_zeros(self, scores: Tensor, columns: slice, zeros: int) -> Tensor:
        """Mark the weights that stay where a number of zeros is given for the linear."""
        import torch

        assert self.width is not None
        start, stop, _ = columns.indices(self.width)
        if stop - start == scores.shape[1]:
            count = zeros * stop // self.width - zeros * start // self.width
        else:  # of unnamed columns
            count = zeros * scores.shape[1] // self.width
        if self.within == "linear":
            return _keep_highest(scores.reshape(1, -1), count).reshape(scores.shape)
        each, more = divmod(count, len(scores))
        return torch.cat([_keep_highest(scores[:more], each + 1), _keep_highest(scores[more:], each)])

    def _select(self, scores: Tensor) -> Tensor:
        groups = scores.reshape(-1, self.span) if self.span else scores
        groups = groups.reshape(1, -1) if self.within == "linear" and not self.span else groups
        return _keep_highest(groups, count_pruned(groups.shape[1], self.sparsity)).reshape(scores.shape)


def _keep_highest(groups: Tensor, prune: int) -> Tensor:
    """Mark all but the ``prune`` lowest scores of each group: [groups, members] -> bool."""
    import torch

    if not prune or not len(groups):
        return torch.ones_like(groups, dtype=torch.bool)
    threshold = _lowest(groups, prune)
    pruned = groups <= threshold
    if pruned.count_nonzero() > prune * len(groups):  # the last of the scores equal to a threshold stay
        surplus = _counts(pruned) - prune
        tied = surplus.flatten() > 0
        equal = groups[tied] == threshold[tied]
        rank = equal.cumsum(dim=1, dtype=torch.int32)
        pruned[tied] &= ~(equal & (rank > rank[:, -1:] - surplus[tied]))
    return pruned.logical_not_()


def count_pruned(size: int, sparsity: float) -> int:
    """Number of weights to prune in a group of ``size``: ``floor(sparsity * size)``, computed in decimals."""
    # In binary, 0.29 * 100 is 28.999999999999996 and (1 - 3/7) * 7 is 3.9999999999999996.
    return math.floor(Fraction(sparsity).limit_denominator(10**9) * size)


def _lowest(groups: Tensor, count: int) -> Tensor:
    """The highest of the ``count`` lowest in each group: [groups, members] -> [groups, 1]."""
    import numpy as np
    import torch

    if groups.device.type == "cpu" and groups.dtype in (torch.float32, torch.float64):
        least = groups.amin(dim=1, keepdim=True)
        equal = groups == least  # partition is slow on ties, e.g. of zero scores in a pruned model
        if equal.count_nonzero() >= count * len(groups) and (_counts(equal) >= count).all():
            return least
        # Takes a third of the time of kthvalue and stores no indices; a sort takes ten times as long.
        lowest = np.partition(groups.detach().numpy(), count - 1, axis=1)[:, count - 1 : count]
        return torch.from_numpy(lowest.copy())
    return groups.kthvalue(count, dim=1, keepdim=True).values


def _counts(marks: Tensor) -> Tensor:
    """Number of True values in each group: bool [groups, members] -> int32 [groups, 1]."""
    import torch

    return marks.view(torch.uint8).sum(dim=1, keepdim=True, dtype=torch.int32)  # summing bool takes seven times as long


def keep_channels(scores: Tensor, count: int) -> Tensor:
    """The ``count`` units with the highest scores, as sorted indices (int64); on ties the lower index stays.

    Args:
        scores: [units], or [experts, units] to choose in each row.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort().values


def keep_globally(scores: Mapping[str, Tensor], costs: Mapping[str, int], remove: float) -> dict[str, Tensor]:
    """Remove the units with the lowest scores over all groups until enough parameters are removed.

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
    order = len(value) - 1 - value.flip(0).argsort(stable=True)  # on ties the lower index stays, as above
    order = order[value[order] < torch.inf]
    removed = cost[order].cumsum(0)
    count = int((removed <= remove).sum())
    if count < len(order) and removed[count] - remove < remove - (removed[count - 1] if count else 0.0):
        count += 1
    stays = torch.ones(len(value), dtype=torch.bool)
    stays[order[:count]] = False
    return {n: stays[starts[i] : starts[i + 1]].nonzero().flatten() for i, n in enumerate(names)}


def keep_experts(scores: Tensor, count: int, groups: int = 1) -> Tensor:
    """The sorted indices of the experts with the highest scores, as many in each group of neighbours.

    Args:
        scores: [experts].
        count: experts to keep, a multiple of ``groups``.
    """
    import torch

    size = len(scores) // groups
    parts = scores.reshape(groups, size)
    return torch.cat([keep_channels(part, count // groups) + group * size for group, part in enumerate(parts)])


def lowest_indices(scores: Tensor, count: int = 1) -> list[int]:
    """The sorted indices of the ``count`` lowest scores; on ties the lower index comes first."""
    return sorted(scores.argsort(stable=True)[:count].tolist())
