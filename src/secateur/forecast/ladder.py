"""What a study's ladders say of budgets that were not run: fitted curves, crossovers, who is ahead on each account.

An *account* is what the two paths have as much of: training tokens, total tokens, or FLOPs with the parent's
pretraining left out (sunk), shared by its children, or charged in full. At a budget R of the pruned model each account
gives the from-scratch model a number of tokens, and the fitted curves predict its loss there. Where a run of
just that account is in the study, its own paired difference stands in the place of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from secateur.comparison.index import PRUNED, Index, Model, group_of
from secateur.comparison.naming import model_name
from secateur.comparison.records import Cell
from secateur.comparison.twins import Setting, Verdict, Winner
from secateur.errors import UserError
from secateur.forecast.crossover import Crossover, NextRun, crossover, lead, narrowing
from secateur.forecast.curve import PATHS, CurvePoint, Path
from secateur.forecast.fit import Fit, Interval, fit_pair

__all__ = ["AccountName", "Allowance", "Basis", "Forecast", "Forecasts", "Outlook", "Standing", "forecast"]

AccountName = Literal["training", "total", "training-flops", "shared-flops", "total-flops"]
Basis = Literal["measured", "between the budgets run", "beyond the budgets run", "out of reach"]

_LADDER = 3  #: finished budgets of one path that make a ladder
_FURTHER = 2  #: how many times the largest R of the ladder is forecast
_SETTINGS: Mapping[AccountName, Setting] = {
    "training": "training",
    "total": "total",
    "training-flops": "training-flops",
    "total-flops": "total-flops",
}


@dataclass(frozen=True)
class Allowance:
    """Tokens that the from-scratch model gets on an account: ``rate`` for each of R, and ``extra`` beside."""

    account: AccountName
    extra: float = 0.0
    rate: float = 1.0

    def tokens(self, retrain: float) -> float:
        """At R = ``retrain``."""
        return self.rate * retrain + self.extra


@dataclass(frozen=True)
class Standing:
    """Who is ahead on one account at one budget.

    ``difference`` is loss(scratch) - loss(pruned), nats per token, with its 95% interval: of the held-out text (and
    the seeds) where it was measured, of the fit where it was not. None where the twin's budget is out of reach.
    """

    tokens: int  #: R
    scratch_tokens: float
    basis: Basis
    winner: Winner
    difference: Interval | None

    @property
    def by_curves(self) -> bool:
        """Whether the fitted curves say so: not where it was measured, nor out of reach."""
        return self.basis not in ("measured", "out of reach")


@dataclass(frozen=True)
class Outlook:
    """One account of a ladder: where the path behind catches up, and who is ahead at each budget."""

    allowance: Allowance
    crossover: Crossover | None  #: None: out of reach at every R, or measured comparisons contradict the curves'
    standings: tuple[Standing, ...]  #: at each R of the ladder, and last at the further budget

    @property
    def last(self) -> Standing:
        """At the largest R that was run."""
        return self.standings[-2]

    @property
    def further(self) -> Standing:
        """At a budget that was not run."""
        return self.standings[-1]


@dataclass(frozen=True)
class Forecast:
    """The curves of one pruned model and its from-scratch twin, and what they say on each account."""

    model: Model
    objective: str
    name: str
    fit: Fit
    further: int  #: tokens: R of the forecast, twice the largest of the ladder
    outlooks: tuple[Outlook, ...]  #: one for each account whose costs are known
    next_run: NextRun | None  #: what would narrow the crossover at equal training tokens most; None: nothing by enough

    def loss(self, path: Path) -> Interval | None:
        """Of one path at the further budget, at equal training tokens; None out of reach."""
        standing = self.outlooks[0].further
        tokens = standing.tokens if path == "pruned" else standing.scratch_tokens
        return self.fit.at(path, tokens) if standing.difference else None


@dataclass(frozen=True)
class Forecasts:
    """The forecasts of all ladders of a study."""

    fitted: tuple[Forecast, ...]
    unfitted: tuple[str, ...]  #: why a ladder has none, a line each


def forecast(index: Index, verdicts: tuple[Verdict, ...]) -> Forecasts:
    """Fit every ladder of a study. A pure function of its records.

    A ladder is a pruned model, under one objective, with three or more finished budgets of one of its two paths. Runs
    are of all seeds; a twin counts by its own training, whatever comparison it was made for.

    Args:
        verdicts: their paired comparisons, over seeds where there are several.
    """
    forecasts: list[Forecast] = []
    unfitted: list[str] = []
    ladders: dict[tuple[Model, str], list[Cell]] = {}
    for cell in index.results.cells:
        if cell.path != "control" and cell.evaluation and math.isfinite(cell.evaluation.loss):
            ladders.setdefault((group_of(cell).model, cell.objective), []).append(cell)
    for (model, objective), cells in ladders.items():
        if not _is_ladder(cells):
            continue
        name = model_name(model, index.models) + (f" ({objective})" if objective else "")
        try:
            forecasts.append(_forecast(index, verdicts, model, objective, name, cells))
        except UserError as error:
            unfitted.append(f"{name}: {error}")
    return Forecasts(tuple(forecasts), tuple(unfitted))


def _is_ladder(cells: list[Cell]) -> bool:
    budgets: dict[str, set[int]] = {}
    for cell in cells:
        budgets.setdefault(cell.path, set()).add(cell.training.tokens)
    return max(map(len, budgets.values())) >= _LADDER


def _forecast(
    index: Index, verdicts: tuple[Verdict, ...], model: Model, objective: str, name: str, cells: list[Cell]
) -> Forecast:
    missing = [path for path in PATHS if not any(cell.path == path for cell in cells)]
    if missing:
        raise UserError(f"no finished {missing[0]} run under this objective; a forecast needs both paths")
    if len({cell.evaluation.protocol for cell in cells if cell.evaluation}) > 1:
        raise UserError("its runs were evaluated under different protocols")
    fit = _fitted(tuple(dict.fromkeys(map(_point, cells))))
    if fit.poor:
        raise UserError(f"{fit.misfit}, so that the figures of this fit are withheld")
    ladder = fit.budgets("pruned")
    further = _FURTHER * ladder[-1]
    measured = {
        (verdict.setting, verdict.group.retrain_tokens): verdict
        for verdict in verdicts
        if verdict.group.model == model and verdict.group.objective == objective and verdict.difference is not None
    }
    outlooks = []
    for allowance in _allowances(index, cells):
        setting = _SETTINGS.get(allowance.account)
        standings = [
            _measured(measured[setting, r], allowance)
            if setting and (setting, r) in measured
            else _standing(fit, allowance, r)
            for r in (*ladder, further)
        ]
        crossing = crossover(fit, allowance.extra, allowance.rate)
        outlooks.append(Outlook(allowance, _agreeing(crossing, standings), tuple(standings)))
    runs = narrowing(fit, outlooks[0].crossover)
    next_run = _with_cost(runs[0], cells) if runs else None
    return Forecast(model, objective, name, fit, further, tuple(outlooks), next_run)


def _agreeing(crossing: Crossover | None, standings: Sequence[Standing]) -> Crossover | None:
    """The crossover as measured comparisons bound it: they win over the curves.

    Returns:
        The crossover, its budgets moved between the last R at which its leader was measured ahead and the first
        at which the other path was, and infinite where the curves put it before the former; None where no crossover
        agrees with all that was measured.
    """
    winners = {s.tokens: s.winner for s in standings if s.basis == "measured" and s.winner in PATHS}
    if crossing is None or not winners:
        return crossing
    ahead = [tokens for tokens, winner in winners.items() if winner == crossing.leader]
    behind = [tokens for tokens, winner in winners.items() if winner != crossing.leader]
    low, high = max(ahead, default=0), min(behind, default=math.inf)
    if crossing.leader is None or high <= max(low, crossing.lowest):
        return None
    start, end = (min(max(budget, low), high) for budget in (crossing.budget.low, crossing.budget.high))
    value = min(crossing.budget.value, high) if crossing.budget.value > low else math.inf
    return replace(crossing, budget=Interval(value, start, end), draws=np.clip(crossing.draws, low, high))


def _with_cost(run: NextRun, cells: Sequence[Cell]) -> NextRun:
    """The run with the FLOPs of its training, at those of a token in the finished runs of its path."""
    training = next(cell.training for cell in cells if cell.path == run.path)
    return replace(run, flops=run.tokens * training.flops / training.tokens)


@lru_cache(maxsize=256)
def _fitted(points: tuple[CurvePoint, ...]) -> Fit:
    """The page, the tables and the text of one report ask for the same fit, which takes seconds."""
    return fit_pair(points)


def _point(cell: Cell) -> CurvePoint:
    assert cell.evaluation
    return CurvePoint(
        path="pruned" if cell.name == PRUNED else "scratch",
        method=cell.method,
        ratio=cell.ratio,
        parameters=cell.parameters,
        tokens=cell.training.tokens,
        loss=cell.evaluation.loss,
        seed=cell.seed,
        name=cell.name,
    )


def _allowances(index: Index, cells: list[Cell]) -> Iterator[Allowance]:
    """The accounts whose costs are known, as the settings count them: a twin by its own run alone.

    FLOPs of a token are those that the records have of training; a teacher's are in those of the pruned path.
    """
    pruned = next(cell for cell in cells if cell.path == "pruned")
    scratch = next(cell for cell in cells if cell.path == "scratch")
    model = index.pruned_model(group_of(pruned).model, pruned.seed)
    learned = model.training_tokens if model else 0
    yield Allowance("training", learned)
    parent = index.parent(pruned.parent, pruned.seed)
    cost = parent.cost if parent else None
    if cost:
        yield Allowance("total", cost.tokens + learned)
    if pruned.pruning is None:
        return
    each = scratch.training.flops / scratch.training.tokens
    rate = pruned.training.flops / pruned.training.tokens / each
    yield Allowance("training-flops", pruned.pruning.flops / each, rate)
    if parent and cost:
        shared = pruned.pruning.flops + cost.flops / max(parent.children, 1)
        yield Allowance("shared-flops", shared / each, rate)
        yield Allowance("total-flops", (pruned.pruning.flops + cost.flops) / each, rate)


def _measured(verdict: Verdict, allowance: Allowance) -> Standing:
    assert verdict.difference is not None and verdict.low is not None and verdict.high is not None
    tokens = verdict.group.retrain_tokens
    difference = Interval(verdict.difference, verdict.low, verdict.high)
    return Standing(tokens, allowance.tokens(tokens), "measured", verdict.winner, difference)


def _standing(fit: Fit, allowance: Allowance, tokens: int) -> Standing:
    """Predict by the fitted curves, within reach of the budgets that were run."""
    scratch_tokens = allowance.tokens(tokens)
    pruned_budgets, scratch_budgets = fit.budgets("pruned"), fit.budgets("scratch")
    result = lead(fit, tokens, allowance.extra, allowance.rate)
    if result is None:
        return Standing(tokens, scratch_tokens, "out of reach", "not measured", None)
    within = (
        pruned_budgets[0] <= tokens <= pruned_budgets[-1]
        and scratch_budgets[0] <= scratch_tokens <= scratch_budgets[-1]
    )
    basis: Basis = "between the budgets run" if within else "beyond the budgets run"
    return Standing(tokens, scratch_tokens, basis, result.winner, result.difference)
