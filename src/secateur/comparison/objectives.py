"""One training objective against another: pruned runs at equal tokens, and at equal FLOPs where there are such runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.naming import model_name
from secateur.comparison.records import Cell
from secateur.comparison.twins import MeanDifference, Paired, mean_difference, pair_cells
from secateur.formatting import count, decimals, number
from secateur.report.prose import interval

__all__ = ["ObjectiveRow", "objective_rows"]

_SAME_FLOPS = 0.01  # relative difference of two runs' training FLOPs that still counts as none


@dataclass(frozen=True)
class ObjectiveRow:
    """Two pruned runs of one model that differ in their objective; losses are means over the seeds of both."""

    name: str
    equal: Literal["tokens", "FLOPs"]
    first: Group
    second: Group
    first_loss: float | None
    second_loss: float | None
    mean: (
        MeanDifference | None
    )  #: loss(first) - loss(second), so positive where the second is better; None: not measured
    flop_ratio: float | None  #: training FLOPs of the second over those of the first

    @property
    def sentence(self) -> str:
        """The comparison as one sentence."""
        first, second = (
            f"{group.objective or 'the language-model loss'} on {count(group.retrain_tokens)} tokens"
            for group in (self.first, self.second)
        )
        start = f"{self.name}, at equal {self.equal}: {second}"
        if self.mean is None:
            return f"{start} against {first} is not measured."
        mean, digits = self.mean, decimals(self.mean.value, self.mean.low, self.mean.high)
        if not mean.sign:
            span = interval(mean.low, mean.high, digits)
            return f"{start} cannot be told from {first} ({number(mean.value, digits)} nats, {span})."
        near, far = sorted((abs(mean.low), abs(mean.high)))
        side = "below" if mean.sign > 0 else "above"
        return f"{start} ends {number(abs(mean.value), digits)} nats {side} {first} ({interval(near, far, digits)})."


def objective_rows(index: Index) -> tuple[ObjectiveRow, ...]:
    """Every such pair; the language-model loss comes first where it is one of them."""
    models = index.models
    rows = []
    for first, second in _pairs(index):
        ours, theirs = _runs(index, first), _runs(index, second)
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            continue
        ratio = _ratio(ours[seeds[0]], theirs[seeds[0]])
        same_flops = ratio is not None and abs(ratio - 1) <= _SAME_FLOPS
        # positive where the second is better
        found = [pair_cells(theirs[seed], ours[seed], PRUNED, PRUNED) for seed in seeds]
        mean = mean_difference([one for one in found if isinstance(one, Paired)])
        losses = _mean([ours[seed] for seed in seeds]), _mean([theirs[seed] for seed in seeds])
        kinds: dict[Literal["tokens", "FLOPs"], bool] = {
            "tokens": first.retrain_tokens == second.retrain_tokens,
            "FLOPs": same_flops,
        }
        name = model_name(first.model, models)
        rest = (first, second, *losses, mean, ratio)
        rows += [ObjectiveRow(name, kind, *rest) for kind, equal in kinds.items() if equal]
    return tuple(rows)


def _pairs(index: Index) -> Iterator[tuple[Group, Group]]:
    """Comparisons of one model under two objectives, the language-model loss first."""
    for model in index.models:
        groups = sorted((group for group in index.pools if group.model == model), key=lambda group: group.objective)
        for first, second in itertools.combinations(groups, 2):
            if first.objective != second.objective:
                yield first, second


def _runs(index: Index, group: Group) -> dict[int | None, Cell]:
    found = {one.seed: index.cell(one, PRUNED) for one in index.pools[group]}
    return {seed: cell for seed, cell in found.items() if cell}


def _ratio(first: Cell, second: Cell) -> float | None:
    return second.training.flops / first.training.flops if first.training.flops else None


def _mean(cells: list[Cell]) -> float | None:
    losses = [cell.evaluation.loss for cell in cells if cell.evaluation]
    return sum(losses) / len(losses) if losses else None
