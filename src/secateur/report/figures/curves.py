"""Held-out loss during training: one panel for each comparison, all with the same loss axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from secateur.comparison.index import PRUNED, Group, Index, mean_loss
from secateur.comparison.naming import group_name
from secateur.comparison.records import Cell
from secateur.formatting import NOT_MEASURED, count, loss, number
from secateur.report.figures.frame import LegendRow, draw_legend, panel, style_axes
from secateur.report.figures.palette import Palette

__all__ = ["RUNS", "RunStyle", "curve_limits", "draw_curves"]


@dataclass(frozen=True)
class RunStyle:
    """The look of one kind of run. Marker and dash differ as well as colour."""

    cell: str
    label: str
    role: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str


RUNS = (
    RunStyle(PRUNED, "pruned, then retrained on R", "pruned", "-", "o"),
    RunStyle("S_R", "from scratch on R", "scratch", (0, (4.5, 1.6)), "s"),
    RunStyle("S_{P+R}", "from scratch on P + R", "scratch", (0, (1.2, 1.3)), "D"),
    RunStyle("S_F", "from scratch, FLOPs of P-R", "scratch", (0, (7, 1.5, 1.2, 1.5)), "v"),
    RunStyle("S_{P+F}", "the same with the parent's", "scratch", (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)), "P"),
)


def curve_limits(index: Index) -> tuple[float, float]:
    """Limits of the loss axis that every panel shares.

    Scratch runs begin near ln(vocabulary), far above the final losses, and would squash the rest. The axis therefore
    covers the final losses, and the first points of the pruned models unless those are outliers too.
    """
    cells = [cell for cell in index.results.cells if cell.path != "control" and cell.curve]
    ends = [cell.curve[-1].loss for cell in cells]
    ends += [parent.evaluation.loss for parent in index.results.parents if parent.evaluation]
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    spread = max(high - low, 0.1)
    starts = [cell.curve[0].loss for cell in cells if cell.path == "pruned"]
    near = [start for start in starts if start <= high + 1.5 * spread]
    return low - 0.12 * spread, max([high + 0.45 * spread, *(start + 0.1 * spread for start in near)])


def draw_curves(
    index: Index, group: Group, among: Sequence[Group], limits: tuple[float, float], palette: Palette
) -> tuple[Figure, str]:
    """One panel with all seeds of the comparison, and its description."""
    study = {cell.name for cell in index.results.cells}
    by_run = {run: [cell for cell in index.over_seeds(group, run.cell) if cell] for run in RUNS}
    runs = {run: cells for run, cells in by_run.items() if run.cell in study and (cells or not group.objective)}
    figure, axes = panel(group_name(group, among), len(runs) + 1, palette)
    _frame(axes, _ticks(index, group, runs), limits, palette)
    rows = [_draw_run(axes, run, cells, limits[1], palette) for run, cells in runs.items()]
    for cell in by_run[RUNS[0]]:  # extend the final loss of P-R to the end of the longer runs
        if cell.curve:
            end = cell.curve[-1]
            last = max([end.tokens, *_lengths(runs)])
            axes.plot([end.tokens, last], [end.loss] * 2, color=palette.pruned, lw=0.8, ls=(0, (1, 2.5)))
    parent, mean = index.parents.get(group.parent), mean_loss(index.parents_over_seeds(group))
    style = {"color": palette.muted, "lw": 0.9}
    if mean is not None:
        axes.axhline(mean, zorder=1, **style)
    label = "the parent, after P tokens" if parent and parent.cost else "the parent"
    rows.append(LegendRow(label, loss(mean), None if mean is None else style))
    draw_legend(figure, rows, _cut_note([c for cells in runs.values() for c in cells], limits[1]), palette)
    return figure, "; ".join(f"{row.label}: {row.value}" for row in rows) + ". Losses in nats per token."


def _lengths(runs: dict[RunStyle, list[Cell]]) -> list[int]:
    return [cell.curve[-1].tokens for cells in runs.values() for cell in cells if cell.curve]


def _ticks(index: Index, group: Group, runs: dict[RunStyle, list[Cell]]) -> dict[int, str]:
    """Ticks of the token axis and their labels; the axis ends at the last."""
    short, cost = group.retrain_tokens, index.parent_cost(group.parent)
    ticks = {0: "0", short: f"R\n{count(short)}"}
    total = cost.tokens + short if cost else 0
    if cost and any(run.cell == "S_{P+R}" for run in runs):
        if math.sqrt(short / total) > 0.85:  # the labels would touch
            ticks[short] = ""
        ticks[total] = f"P + R\n{count(total)}"
    last = max([*ticks, *_lengths(runs), 1])
    return ticks if last in ticks else {**ticks, last: ""}


def _frame(axes: Axes, ticks: dict[int, str], limits: tuple[float, float], palette: Palette) -> None:
    """Set axes, ticks and grid.

    The token axis has a square-root scale: a linear scale would squash runs of R tokens beside those of P + R, and a
    logarithmic one cannot show 0 tokens, the pruned model before retraining.
    """
    last = max(ticks)
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set_xlim(0, last * 1.02)
    axes.set_ylim(*limits)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.set_xticklabels(list(ticks.values()))
    axes.xaxis.set_minor_locator(FixedLocator(MaxNLocator(9).tick_values(0, last)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("training tokens of the run (square-root scale)", size=8.5, color=palette.muted, labelpad=2)
    axes.axvline(list(ticks)[1] if len(ticks) > 1 else 0, color=palette.rule, lw=0.9, zorder=0)
    style_axes(axes, palette, "held-out loss, nats per token")


def _draw_run(axes: Axes, run: RunStyle, cells: Sequence[Cell], top: float, palette: Palette) -> LegendRow:
    """Draw a run for each seed that has a curve, and return the legend row."""
    final = mean_loss(cells)
    curves = [cell for cell in cells if cell.curve]
    if not curves:
        return LegendRow(run.label, loss(final), None)
    colour: str = getattr(palette, run.role)
    for cell in curves:
        _draw_curve(axes, run, cell, top, colour, palette)
    first = sum(cell.curve[0].loss for cell in curves) / len(curves)
    value = NOT_MEASURED if final is None else f"{number(first, 2)} → {loss(final)}"
    return LegendRow(run.label, value, {"color": colour, "ls": run.dash, "marker": run.marker, "ms": 4.5})


def _draw_curve(axes: Axes, run: RunStyle, cell: Cell, top: float, colour: str, palette: Palette) -> None:
    tokens, losses = [p.tokens for p in cell.curve], [p.loss for p in cell.curve]
    axes.plot(tokens, losses, color=colour, ls=run.dash, zorder=3)
    marker: dict[str, Any] = {"color": colour, "ms": 5.5, "ls": "none", "clip_on": False, "zorder": 4}
    axes.plot(tokens[-1:], losses[-1:], marker=run.marker, **marker)
    if run.role == "pruned" and losses[0] <= top:  # hollow: before the first step of retraining
        axes.plot([0], losses[:1], marker=run.marker, mfc=palette.paper, mew=1.5, **marker)
    elif run.role == "pruned":
        axes.plot([0], [top], marker="^", **marker)


def _cut_note(cells: Sequence[Cell], top: float) -> str:
    """A note on curves that begin above the axis."""
    above = [(cell.path, cell.curve[0].loss) for cell in cells if cell.curve and cell.curve[0].loss > top]
    if not above:
        return ""
    starts = {path: number(max(value for p, value in above if p == path), 2) for path, _ in above}
    return f"axis cut at {number(top, 2)}: " + ", ".join(f"{path} starts at {at}" for path, at in starts.items())
