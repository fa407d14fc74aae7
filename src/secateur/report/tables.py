"""Rows of the report as unformatted values, for the page and the CSV files."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.comparison.ablation import CONTINUED
from secateur.comparison.decision import Decision
from secateur.comparison.index import Index, group_of
from secateur.comparison.ledger import ACCOUNTS, account_flops, best_runs, own_cost, setting_total
from secateur.comparison.power import standard_deviations
from secateur.comparison.records import Cell
from secateur.comparison.twins import SCRATCH
from secateur.forecast.fit import Interval
from secateur.report.judgement import Judgement
from secateur.report.studies import StudyComparison

__all__ = ["across_rows", "cell_rows", "comparison_rows", "curves_csv", "forecast_rows", "rows_csv", "versus_rows"]

Row = dict[str, Any]

_WHOLE: Row = {"ratio_total": 0.0, "ratio_non_embedding": 0.0}  #: shares removed of a parent that was trained on


def cell_rows(judgement: Judgement) -> list[Row]:
    """One row for each trained model; None for a value that was not measured.

    The row of a scratch run holds loss(scratch) - loss(pruned), with its interval.
    """
    index = judgement.index
    verdicts = {
        (verdict.group, SCRATCH[verdict.setting]): verdict for verdict in judgement.by_seed or judgement.verdicts
    }
    best = best_runs(index)
    rows = []
    for cell in judgement.results.cells:
        group = group_of(cell)
        record = index.pruned_model(group.model, cell.seed)
        verdict = verdicts.get((group, cell.name))
        total_tokens, total_flops = setting_total(index, cell)
        rows.append(
            {
                **_values(cell, "name", "method", "granularity", "seed", "ratio"),
                **(_WHOLE if cell.init == CONTINUED else _values(record, *_WHOLE)),
                **_values(cell, "parameters", "non_embedding"),
                "train_tokens": cell.training.tokens,
                "total_tokens": total_tokens,
                "train_flops": cell.training.flops,
                "total_flops": total_flops,
                **_values(cell.evaluation, "loss", "perplexity", "sparsity"),
                **_values(verdict, "difference", "low", "high", "winner"),
                **_values(cell, "parent", "target", "retrain_tokens", "objective", "init", "path", "peak_rate"),
                **_costs(index, cell),
                "best_for": " ".join(best.get((group, cell.name), ())),
                "pruning_tokens": record.training_tokens if record and cell.init == "pruned" else None,
            }
        )
    return rows


def _values(record: Any, *names: str) -> Row:
    """The attributes ``names``; None without a record."""
    return {name: getattr(record, name) if record else None for name in names}


def _costs(index: Index, cell: Cell) -> Row:
    cost = own_cost(cell)
    return {
        "seconds": cell.training.seconds,
        "own_seconds": cost.seconds if cost else None,
        "pruning_flops": cell.pruning.flops if cell.pruning else None,
        "sweep_flops": cell.sweep.flops if cell.sweep else None,
        **{f"{account}_flops": account_flops(index, cell, account) for account in ACCOUNTS},
    }


def comparison_rows(judgement: Judgement) -> list[Row]:
    """One row for each comparison in each setting: first pooled over seeds, then for each seed."""
    group = ("parent", "method", "target", "retrain_tokens", "objective", "seed")
    figures = ("seeds", "pruned_loss", "scratch_loss", "difference", "low", "high", "winner", "flop_ratio", "reason")
    decided = ("p", "adjusted_p", "comparisons", "margin", "documents", "effective_documents", "text_share")
    return [
        {
            "setting": verdict.setting,
            **_values(verdict.group, *group),
            **_values(verdict, *figures, "unit"),
            **_values(verdict.decision, *decided),
            **standard_deviations(verdict.decision),
            "seeds_vary": judgement.results.seeds_vary,
        }
        for verdict in (*judgement.verdicts, *judgement.by_seed)
    ]


def forecast_rows(judgement: Judgement) -> list[Row]:
    """One row for each ladder, account and budget: the leader, the fitted losses and the crossover.

    None for a value that the runs do not determine; an infinite crossover is None too.
    """
    return [
        {
            **dataclasses.asdict(forecast.model),
            "objective": forecast.objective,
            "account": outlook.allowance.account,
            "retrain_tokens": standing.tokens,
            "scratch_tokens": standing.scratch_tokens,
            "basis": standing.basis,
            "winner": standing.winner,
            **_estimate("difference", standing.difference),
            **_estimate("fitted_pruned", forecast.fit.at("pruned", standing.tokens) if standing.by_curves else None),
            **_estimate(
                "fitted_scratch", forecast.fit.at("scratch", standing.scratch_tokens) if standing.by_curves else None
            ),
            "leader": outlook.crossover.leader if outlook.crossover else None,
            **_estimate("crossover", outlook.crossover.budget if outlook.crossover else None),
            "horizon": outlook.crossover.horizon if outlook.crossover else None,
        }
        for forecast in judgement.forecasts.fitted
        for outlook in forecast.outlooks
        for standing in outlook.standings
    ]


def _estimate(name: str, interval: Interval | None) -> Row:
    values = (interval.value, interval.low, interval.high) if interval else (None,) * 3
    keys = (name, f"{name}_low", f"{name}_high")
    return {key: v if v is not None and math.isfinite(v) else None for key, v in zip(keys, values, strict=True)}


def across_rows(judgement: Judgement) -> list[Row]:
    """One row for each method, parent, ratio and budget: the loss by the law across ratios and the measured one."""
    return [
        {
            "method": fitted.method,
            "objective": fitted.objective,
            "parent": prediction.parent,
            "ratio": prediction.ratio,
            "retrain_tokens": prediction.tokens,
            "fitted": prediction.loss,
            "measured": prediction.measured,
            "fit_error": fitted.law.error if fitted.law else None,
            "left_out_error": fitted.left_out_error,
        }
        for fitted in judgement.laws
        for prediction in fitted.predictions
    ]


def versus_rows(comparison: StudyComparison) -> list[Row]:
    """One row for each run that both studies have (difference B - A), then one for each verdict (A - B)."""

    def row(kind: str, name: str, of: str, a: float | None, b: float | None, mean: Decision) -> Row:
        fields = {"kind": kind, "comparison": name, "of": of, "a": a, "b": b}
        return fields | {"difference": mean.value, **_values(mean, "low", "high", "p", "verdict")}

    rows = [row("loss", r.name, r.run, r.a, r.b, r.difference) for r in comparison.runs]
    return rows + [
        row("saved", r.name, r.setting, r.a.difference, r.b.difference, r.difference) for r in comparison.gaps
    ]


def rows_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV in full precision; an empty field is a value that was not measured."""
    return _csv(list(rows[0]) if rows else [], [list(row.values()) for row in rows])


def curves_csv(judgement: Judgement) -> str:
    """Every point of every training curve as CSV, the parents first."""
    head = ["name", "method", "ratio", "seed", "tokens", "loss", "parent", "target", "retrain_tokens", "objective"]
    rows: list[list[Any]] = []
    for parent in judgement.results.parents:
        run = ["parent", None, None, parent.seed]
        rows += [[*run, point.tokens, point.loss, parent.name, None, None, None] for point in parent.curve]
    for cell in judgement.results.cells:
        run = [cell.name, cell.method, cell.ratio, cell.seed]
        group = [cell.parent, cell.target, cell.retrain_tokens, cell.objective]
        rows += [[*run, point.tokens, point.loss, *group] for point in cell.curve]
    return _csv(head, rows)


def _csv(head: list[str], rows: Iterable[list[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([head, *rows])
    return buffer.getvalue()
