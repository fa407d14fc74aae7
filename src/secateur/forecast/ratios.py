"""Fit the law across ratios to a study's records, method by method, and measure its errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from secateur.comparison.index import Index
from secateur.comparison.naming import is_pattern
from secateur.comparison.records import Cell
from secateur.errors import UserError
from secateur.forecast.fit import far_off
from secateur.forecast.ratio_law import LeftOutRatio, RatioLaw, Retrained, fit_ratios, leave_one_ratio_out
from secateur.methods.registry import method_name

__all__ = ["MethodLaw", "Prediction", "across_ratios"]

_LADDER = 3  # budgets, and two ratios, from which on the law is tried
_FURTHER = 2  # times the largest budget, as for the curves of one ratio


@dataclass(frozen=True)
class Prediction:
    """What the law says of one parent, ratio and budget."""

    parent: str
    ratio: float
    tokens: int
    loss: float  #: nats per token
    measured: float | None  #: mean over seeds; None: not run


@dataclass(frozen=True)
class MethodLaw:
    """The law of one method under one objective."""

    method: str
    objective: str
    name: str
    law: RatioLaw | None  #: None: it could not be fitted, or its runs lie too far off
    reason: str  #: why not
    left_out: tuple[LeftOutRatio, ...] = ()  #: each ratio predicted from the others
    refused: tuple[float, ...] = ()  #: ratios without which the law cannot be fitted
    predictions: tuple[Prediction, ...] = ()

    @property
    def left_out_error(self) -> float | None:
        """Root of the mean square of predicted less measured, nats; None where no ratio could be left out."""
        squares = [run.error**2 for run in self.left_out]
        return math.sqrt(sum(squares) / len(squares)) if squares else None


def across_ratios(index: Index) -> tuple[MethodLaw, ...]:
    """Fit the law to every method with two or more ratios and three or more budgets of retraining."""
    methods: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in index.results.cells:
        if cell.path == "pruned" and cell.evaluation and math.isfinite(cell.evaluation.loss):
            pattern = cell.target if is_pattern(cell.target) else ""  # another law at the same ratio
            methods.setdefault((cell.method, pattern, cell.objective), []).append(cell)
    laws = []
    for (method, _, objective), cells in methods.items():
        ratios, budgets = {cell.ratio for cell in cells}, {cell.training.tokens for cell in cells}
        if len(ratios) > 1 and len(budgets) >= _LADDER:
            laws.append(_law(index, method, objective, cells))
    return tuple(laws)


def _law(index: Index, method: str, objective: str, cells: list[Cell]) -> MethodLaw:
    name = method_name(method) + (f" ({objective})" if objective else "")
    try:
        runs = [_retrained(index, cell) for cell in cells]
        law = fit_ratios(runs)
    except UserError as error:
        return MethodLaw(method, objective, name, None, str(error))
    if law.poor:
        reason = f"{far_off(law.error, law.noise, 'the law')}, so that the figures of this fit are withheld"
        return MethodLaw(method, objective, name, None, reason)
    left_out, refused = leave_one_ratio_out(runs)
    return MethodLaw(method, objective, name, law, "", tuple(left_out), tuple(refused), _predictions(law))


def _retrained(index: Index, cell: Cell) -> Retrained:
    parent = index.parent(cell.parent, cell.seed)
    measured, parent_measured = cell.evaluation, parent.evaluation if parent else None
    if not parent or not measured or not parent_measured:
        raise UserError("the parent's held-out loss is not measured, from which the law starts")
    if measured.protocol != parent_measured.protocol:
        raise UserError("its runs and their parent were evaluated under different protocols")
    return Retrained(
        cell.parent, parent.parameters, parent_measured.loss, cell.ratio, cell.training.tokens, measured.loss
    )


def _predictions(law: RatioLaw) -> tuple[Prediction, ...]:
    """At every budget of the study and at twice the largest, run or not."""
    parents = {run.parent: run for run in law.runs}
    budgets = sorted({run.tokens for run in law.runs})
    predictions = []
    for run, ratio, tokens in product(parents.values(), law.ratios, [*budgets, _FURTHER * budgets[-1]]):
        same = [r.loss for r in law.runs if (r.parent, r.ratio, r.tokens) == (run.parent, ratio, tokens)]
        seeds = {r.parent_loss for r in law.runs if r.parent == run.parent}  # each seed may have its own parent
        query = Retrained(run.parent, run.parent_parameters, sum(seeds) / len(seeds), ratio, tokens, math.nan)
        predictions.append(
            Prediction(run.parent, ratio, tokens, law.loss(query), sum(same) / len(same) if same else None)
        )
    return tuple(predictions)
