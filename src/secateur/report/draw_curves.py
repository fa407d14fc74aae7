"""Held-out loss along training: one panel for each comparison, all panels on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from secateur.report.compare import Group
from secateur.report.palette import Palette
from secateur.report.results import Cell, Results
from secateur.report.sentences import group_name
from secateur.report.words import NOT_MEASURED, count, loss, number

__all__ = ["curve_limits", "draw_curves"]

_WIDTH, _HEIGHT, _LEGEND = 4.0, 4.0, 1.22  # inches; the legend stands below the axes, where it can hide nothing


@dataclass(frozen=True)
class _Run:
    """How one kind of run is drawn: told apart by marker and dash as well as by colour."""

    cell: str
    label: str
    role: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str


@dataclass(frozen=True)
class _Row:
    """One row of the legend."""

    label: str
    value: str
    style: dict[str, Any] | None  #: of the sample; None: nothing was drawn


_RUNS = (
    _Run("P-R", "pruned, then retrained on R", "pruned", "-", "o"),
    _Run("S_R", "from scratch on R", "scratch", (0, (4.5, 1.6)), "s"),
    _Run("S_{P+R}", "from scratch on P + R", "scratch", (0, (1.2, 1.3)), "D"),
)


def curve_limits(results: Results) -> tuple[float, float]:
    """Limits of the loss axis that every panel shares.

    A scratch run begins near ln(vocabulary), far above where anything is decided, and would squash the rest. So the
    axis spans where the runs end, and reaches up to the pruned models' first points unless those are outliers too.
    """
    ends = [cell.curve[-1].loss for cell in results.cells if cell.curve]
    if results.parent.evaluation:
        ends.append(results.parent.evaluation.loss)
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    spread = max(high - low, 0.1)
    starts = [cell.curve[0].loss for cell in results.cells if cell.curve and cell.path == "pruned"]
    near = [start for start in starts if start <= high + 1.5 * spread]
    return low - 0.12 * spread, max([high + 0.45 * spread, *(start + 0.1 * spread for start in near)])


def draw_curves(
    results: Results, group: Group, among: Sequence[Group], limits: tuple[float, float], palette: Palette
) -> tuple[Figure, str]:
    """One panel, and what it shows in words."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    bottom = (_LEGEND + 0.62) / _HEIGHT
    axes = figure.add_axes((0.56 / _WIDTH, bottom, 1 - 0.72 / _WIDTH, 1 - bottom - 0.42 / _HEIGHT))
    _frame(axes, results, limits, palette)
    figure.text(0.02, 0.985, group_name(group, among), va="top", weight="bold", color=palette.ink, size=10.5)
    rows: list[_Row] = []
    above = []
    for run in _RUNS:
        cell = _find(results, group, run.cell)
        rows.append(_draw_run(axes, run, cell, limits[1], palette))
        if cell and cell.curve and cell.curve[0].loss > limits[1]:
            above.append((cell.path, cell.curve[0].loss))
    pruned = _find(results, group, "P-R")
    if pruned and pruned.curve:  # carried on to P + R, where the second comparison is read off
        end, last = pruned.curve[-1], results.parent_tokens + results.retrain_tokens
        axes.plot([end.tokens, last], [end.loss] * 2, color=palette.pruned, lw=0.8, ls=(0, (1, 2.5)))
    parent = results.parent.evaluation
    style = {"color": palette.muted, "lw": 0.9}
    if parent:
        axes.axhline(parent.loss, zorder=1, **style)
    rows.append(_Row("the parent, after P tokens", loss(parent.loss if parent else None), style if parent else None))
    note = _cut_note(above, limits[1])
    _legend(figure, rows, note, palette)
    return figure, "; ".join(f"{row.label}: {row.value}" for row in rows) + ". Losses in nats per token."


def _find(results: Results, group: Group, name: str) -> Cell | None:
    wanted = (group.method, group.ratio, group.seed, name)
    return next((c for c in results.cells if (c.method, c.ratio, c.seed, c.name) == wanted), None)


def _frame(axes: Axes, results: Results, limits: tuple[float, float], palette: Palette) -> None:
    """Axes, ticks and grid.

    Tokens stand on a square-root scale: on a linear one the R-long runs are a sliver beside the P + R-long ones, and
    a logarithmic one has no place for 0, where the pruned model before retraining is.
    """
    short, total = results.retrain_tokens, results.parent_tokens + results.retrain_tokens
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set_xlim(0, total * 1.02)
    axes.set_ylim(*limits)
    axes.xaxis.set_major_locator(FixedLocator([0, short, total]))
    axes.set_xticklabels(["0", f"R\n{count(short)}", f"P + R\n{count(total)}"])
    axes.xaxis.set_minor_locator(FixedLocator(MaxNLocator(9).tick_values(0, total)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("training tokens of the run (square-root scale)", size=8.5, color=palette.muted, labelpad=2)
    where = {"xycoords": ("figure fraction", "axes fraction"), "xytext": (0, 6), "textcoords": "offset points"}
    axes.annotate("held-out loss, nats per token", (0.02, 1), size=8.5, color=palette.muted, **where)
    axes.grid(axis="y", color=palette.rule, lw=0.6)
    axes.axvline(short, color=palette.rule, lw=0.9, zorder=0)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(which="both", color=palette.rule, labelcolor=palette.ink, length=3.5)
    axes.tick_params(which="minor", length=2)
    for spine in axes.spines.values():
        spine.set_color(palette.rule)


def _draw_run(axes: Axes, run: _Run, cell: Cell | None, top: float, palette: Palette) -> _Row:
    """Draw a run and return its row of the legend; a run without a curve has nothing to draw."""
    final = cell.evaluation.loss if cell and cell.evaluation else None
    if cell is None or not cell.curve:
        return _Row(run.label, loss(final), None)
    colour: str = getattr(palette, run.role)
    tokens, losses = [p.tokens for p in cell.curve], [p.loss for p in cell.curve]
    axes.plot(tokens, losses, color=colour, ls=run.dash, zorder=3)
    marker: dict[str, Any] = {"color": colour, "ms": 5.5, "ls": "none", "clip_on": False, "zorder": 4}
    axes.plot(tokens[-1:], losses[-1:], marker=run.marker, **marker)
    if run.role == "pruned" and losses[0] <= top:  # hollow: before the first step of retraining
        axes.plot([0], losses[:1], marker=run.marker, mfc=palette.paper, mew=1.5, **marker)
    elif run.role == "pruned":
        axes.plot([0], [top], marker="^", **marker)
    value = NOT_MEASURED if final is None else f"{number(losses[0], 2)} → {loss(final)}"
    return _Row(run.label, value, {"color": colour, "ls": run.dash, "marker": run.marker, "ms": 4.5})


def _cut_note(above: list[tuple[str, float]], top: float) -> str:
    """Say which curves begin above the axis, and where."""
    if not above:
        return ""
    starts = {path: number(max(value for p, value in above if p == path), 2) for path, _ in above}
    return f"axis cut at {number(top, 2)}: " + ", ".join(f"{path} starts at {at}" for path, at in starts.items())


def _legend(figure: Figure, rows: list[_Row], note: str, palette: Palette) -> None:
    """One row for each run: sample, words, first and final loss; then the note on the axis."""
    for index, row in enumerate(rows):
        y = (_LEGEND - 0.18 - 0.235 * index) / _HEIGHT
        if row.style:
            # three points, so that the marker sits in the middle of a sample of the line
            sample = Line2D([0.02, 0.0675, 0.115], [y] * 3, transform=figure.transFigure, markevery=[1], **row.style)
            figure.add_artist(sample)
        figure.text(0.145, y, row.label, va="center", size=9, color=palette.ink)
        figure.text(0.985, y, row.value, va="center", ha="right", size=9, color=palette.ink)
    figure.text(0.02, 0.1 / _HEIGHT, note, va="center", size=8.5, color=palette.muted)
