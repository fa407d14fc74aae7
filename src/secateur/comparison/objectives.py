"""Compare training objectives: pruned runs at equal tokens, and at equal FLOPs where there are such runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from secateur.comparison.decision import Decision, adjust
from secateur.comparison.index import PRUNED, Group, Index, mean_loss
from secateur.comparison.naming import model_name
from secateur.comparison.records import Cell
from secateur.comparison.twins import Paired, mean_difference, pair_cells

__all__ = ["ObjectiveRow", "compare_pruned_runs", "objective_rows"]

_SAME_FLOPS = 0.01  # relative difference of two runs' training FLOPs that still counts as none


@dataclass(frozen=True)
class ObjectiveRow:
    """Two pruned runs of one model that differ in their objective; losses are means over the seeds that both have."""

    name: str  #: of the pruned model
    equal: Literal["tokens", "FLOPs"]
    first: Group
    second: Group
    first_loss: float | None
    second_loss: float | None
    mean: Decision | None  #: loss(first) - loss(second): positive where the second is better; None: not measured
    flop_ratio: float | None  #: training FLOPs of the second over those of the first


def objective_rows(index: Index) -> tuple[ObjectiveRow, ...]:
    """List every pair of objectives, the language-model loss first where it is one of the two.

    Their decisions are corrected for their number.
    """
    models = index.models
    rows: list[ObjectiveRow] = []
    for first, second in _pairs(index):
        difference = compare_pruned_runs(index, first, second)
        if difference is None:
            continue
        *_, ratio = difference
        same_flops = ratio is not None and abs(ratio - 1) <= _SAME_FLOPS
        kinds: dict[Literal["tokens", "FLOPs"], bool] = {
            "tokens": first.retrain_tokens == second.retrain_tokens,
            "FLOPs": same_flops,
        }
        name = model_name(first.model, models)
        rest = (first, second, *difference)
        rows += [ObjectiveRow(name, kind, *rest) for kind, equal in kinds.items() if equal]
    corrected = iter(adjust([row.mean for row in rows if row.mean]))
    return tuple(replace(row, mean=next(corrected)) if row.mean else row for row in rows)


def compare_pruned_runs(
    index: Index, first: Group, second: Group
) -> tuple[float | None, float | None, Decision | None, float | None] | None:
    """Compare the pruned runs of two comparisons over the seeds that both have; None where they share none.

    Returns:
        The mean loss of each; loss(first) - loss(second), None where it is not measured; and the training FLOPs of the
        second over those of the first.
    """
    first_runs, second_runs = _runs(index, first), _runs(index, second)
    seeds = [seed for seed in first_runs if seed in second_runs]
    if not seeds:
        return None
    first_flops, second_flops = (_flops(runs[seeds[0]]) for runs in (first_runs, second_runs))
    pairs = [pair_cells(second_runs[seed], first_runs[seed], PRUNED, PRUNED) for seed in seeds]
    mean = mean_difference([pair for pair in pairs if isinstance(pair, Paired)])
    losses = mean_loss(first_runs[seed] for seed in seeds), mean_loss(second_runs[seed] for seed in seeds)
    return *losses, mean, second_flops / first_flops if first_flops else None


def _pairs(index: Index) -> Iterator[tuple[Group, Group]]:
    """Yield the comparisons of one model under two objectives, the language-model loss first."""
    for model in index.models:
        groups = sorted((group for group in index.pools if group.model == model), key=lambda group: group.objective)
        for first, second in itertools.combinations(groups, 2):
            if first.objective != second.objective:
                yield first, second


def _flops(cell: Cell) -> float:
    """FLOPs of a run with those of its teacher, which were spent before where its predictions were saved."""
    return cell.training.flops + (cell.teaching.cost.flops if cell.teaching else 0.0)


def _runs(index: Index, group: Group) -> dict[int | None, Cell]:
    cells = {seeded.seed: index.cell(seeded, PRUNED) for seeded in index.pools[group]}
    return {seed: cell for seed, cell in cells.items() if cell}
