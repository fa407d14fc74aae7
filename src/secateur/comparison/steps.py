"""Compare prunings in several steps, with recovery between them, with the same pruning in one step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from secateur.comparison.decision import Decision, adjust
from secateur.comparison.index import Group, Index, Model
from secateur.comparison.naming import model_name
from secateur.comparison.objectives import compare_pruned_runs
from secateur.formatting import plural

__all__ = ["StepsRow", "steps_rows"]


@dataclass(frozen=True)
class StepsRow:
    """Two pruned runs at equal tokens whose pruning differs in its steps; losses are means over seeds of both."""

    name: str  #: of the pruned model with fewer steps
    first: Group  #: with fewer steps
    second: Group
    first_steps: str  #: such as ``1 step`` or ``4 steps (linear)``
    second_steps: str
    first_loss: float | None
    second_loss: float | None
    mean: Decision | None  #: loss(first) - loss(second): positive where the second is better; None: not measured
    flop_ratio: float | None  #: training FLOPs of the second over those of the first: models between steps are larger


def steps_rows(index: Index) -> tuple[StepsRow, ...]:
    """List every pair of prunings to one target that differ in their steps, with fewer steps first.

    Their decisions are corrected for their number.
    """
    rows = []
    for first, second in _pairs(index):
        difference = compare_pruned_runs(index, first, second)
        if difference:
            steps = (_describe(index, first.model), _describe(index, second.model))
            rows.append(StepsRow(model_name(first.model, index.models), first, second, *steps, *difference))
    corrected = iter(adjust([row.mean for row in rows if row.mean]))
    return tuple(replace(row, mean=next(corrected)) if row.mean else row for row in rows)


def _pairs(index: Index) -> Iterator[tuple[Group, Group]]:
    """Yield comparisons with equal tokens and objectives whose models differ in their steps alone."""
    groups = [group for group in index.pools if group.model in index.pruned]
    groups.sort(key=lambda group: len(index.pruned[group.model].steps))  # stable: else in the study's order
    for first, second in itertools.combinations(groups, 2):
        steps = [index.pruned[group.model].steps for group in (first, second)]
        if steps[0] != steps[1] and _common(index, first) == _common(index, second):
            yield first, second


def _common(index: Index, group: Group) -> tuple[Any, ...]:
    """What two comparisons must share; unequal to anything where it is not recorded."""
    series = index.pruned[group.model].series
    return (series or object(), group.parent, group.target, group.retrain_tokens, group.objective)


def _describe(index: Index, model: Model) -> str:
    """The number of steps in words, with the schedule of several."""
    pruned = index.pruned[model]
    return f"{plural(len(pruned.steps), 'step')} ({pruned.schedule})" if pruned.steps else "1 step"
