"""The report's rows, as raw values: the page formats them, the CSV files hold them as they are."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.report.compare import SCRATCH, groups
from secateur.report.results import Cell, Results
from secateur.report.sentences import group_name
from secateur.report.verdict import Judgement

__all__ = ["cell_rows", "cells_csv", "curves_csv", "ledger", "pipelines"]

Row = dict[str, Any]


def cell_rows(results: Results, judgement: Judgement) -> list[Row]:
    """One row for each trained model; None wherever a value was not measured.

    A scratch run's row holds its difference from its pruned twin: loss(scratch) - loss(pruned), with its interval.
    """
    pruned = {(record.method, record.ratio): record for record in results.pruned}
    verdicts = {(verdict.group, SCRATCH[verdict.setting]): verdict for verdict in judgement.verdicts}
    groups_of = {(group.method, group.ratio, group.seed): group for group in groups(results)}
    rows = []
    for cell in results.cells:
        record = pruned.get((cell.method, cell.ratio))
        verdict = verdicts.get((groups_of[cell.method, cell.ratio, cell.seed], cell.name))
        measured = cell.evaluation
        rows.append(
            {
                "name": cell.name,
                "method": cell.method,
                "granularity": cell.granularity,
                "seed": cell.seed,
                "ratio": cell.ratio,
                "ratio_total": record.ratio_total if record else None,
                "ratio_non_embedding": record.ratio_non_embedding if record else None,
                "parameters": cell.parameters,
                "non_embedding": cell.non_embedding,
                "train_tokens": cell.train_tokens,
                "total_tokens": cell.total_tokens,
                "train_flops": cell.train_flops,
                "total_flops": cell.total_flops,
                "loss": measured.loss if measured else None,
                "perplexity": measured.perplexity if measured else None,
                "sparsity": measured.sparsity if measured else None,
                "difference": verdict.difference if verdict else None,
                "low": verdict.low if verdict else None,
                "high": verdict.high if verdict else None,
                "winner": verdict.winner if verdict else None,
            }
        )
    return rows


def ledger(results: Results) -> list[Row]:
    """What each piece of work cost by itself."""
    parent = results.parent
    rows: list[Row] = [{"what": "pretraining the parent", "tokens": parent.tokens, "flops": parent.flops}]
    for record in results.pruned:
        who = {"method": record.method, "ratio": record.ratio}
        rows.append({"what": "scoring", **who, "tokens": record.calibration_tokens, "flops": record.flops})
    for cell in results.cells:
        who = {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed}
        what = "retraining" if cell.path == "pruned" else "training from scratch"
        rows.append({"what": what, "name": cell.name, **who, "tokens": cell.train_tokens, "flops": cell.train_flops})
    return rows


def pipelines(results: Results, judgement: Judgement) -> list[Row]:
    """What the two paths cost in all at equal total tokens, side by side."""
    cells = {(c.method, c.ratio, c.seed, c.name): c for c in results.cells}
    among = groups(results)
    rows = []
    for verdict, _ in judgement.of("total"):
        group = verdict.group
        pruned, scratch = (cells.get((group.method, group.ratio, group.seed, n)) for n in ("P-R", SCRATCH["total"]))
        rows.append(
            {
                "group": group_name(group, among, ratio=True),
                "pruned_tokens": _total(pruned, "tokens"),
                "pruned_flops": _total(pruned, "flops"),
                "scratch_tokens": _total(scratch, "tokens"),
                "scratch_flops": _total(scratch, "flops"),
                "ratio": verdict.flop_ratio,
            }
        )
    return rows


def _total(cell: Cell | None, what: str) -> float | None:
    return getattr(cell, f"total_{what}") if cell else None


def cells_csv(rows: Sequence[Row]) -> str:
    """``cell_rows`` as CSV, in full precision; what was not measured is an empty field."""
    return _csv(list(rows[0]) if rows else [], [list(row.values()) for row in rows])


def curves_csv(results: Results) -> str:
    """Every point of every training curve, the parent's first."""
    head = ["name", "method", "ratio", "seed", "tokens", "loss"]
    rows: list[list[Any]] = [["parent", None, None, None, p.tokens, p.loss] for p in results.parent.curve]
    for cell in results.cells:
        rows += [[cell.name, cell.method, cell.ratio, cell.seed, p.tokens, p.loss] for p in cell.curve]
    return _csv(head, rows)


def _csv(head: list[str], rows: Iterable[list[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([head, *rows])
    return buffer.getvalue()
