"""Difference of final losses: a bar for each comparison with its 95% interval as a whisker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.comparison.index import Group
from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.twins import Setting, Verdict
from secateur.formatting import MINUS, NOT_MEASURED, loss, signed
from secateur.report.figures.palette import Palette

__all__ = ["draw_differences"]

_WIDTH, _ROW = 4.0, 0.56  # inches
_LONG_NAME = 27  # characters: longest name with room for the losses beside it
_LOSSES = 0.2  # inches: height of a separate line of losses
_HEAD, _FOOT = 0.6, 0.52


def draw_differences(verdicts: Sequence[Verdict], setting: Setting, among: Sequence[Group], palette: Palette) -> Figure:
    """Draw one setting. ``verdicts`` has those of all settings, so that their axes share one scale."""
    rows = [(verdict, group_name(verdict.group, among)) for verdict in verdicts if verdict.setting == setting]
    lower = _LOSSES if any(len(name) > _LONG_NAME for _, name in rows) else 0.0  # losses below the names
    body = (_ROW + lower) * len(rows)
    height = _HEAD + body + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.02, _FOOT / height, 0.96, body / height))
    reach = max([abs(v) for verdict in verdicts for v in (verdict.low, verdict.high) if v is not None], default=0.0)
    _frame(axes, (_ROW + lower) * len(rows), 1.5 * (reach or 0.1), palette)
    for row, (verdict, name) in enumerate(rows):
        _draw_row(axes, row * (_ROW + lower), lower, verdict, name, palette)
    title = f"Equal {BUDGETS[setting]}"
    figure.text(0.02, 1 - 0.06 / height, title, va="top", weight="bold", color=palette.ink, size=10.5)
    figure.text(0.98, 1 - 0.09 / height, "loss: pruned | scratch", va="top", ha="right", color=palette.muted, size=8.5)
    for x, side, text in ((-4, "right", "← scratch is better"), (4, "left", "pruning is better →")):
        offset = {"xytext": (x, 5), "textcoords": "offset points"}
        axes.annotate(text, (0, 0), ha=side, va="bottom", color=palette.muted, size=8.5, **offset)
    return figure


def _frame(axes: Axes, height: float, reach: float, palette: Palette) -> None:
    """Set axes with zero in the middle, so that a bar's side is the verdict; ``height`` in inches."""
    axes.set_xlim(-reach, reach)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6, symmetric=True))
    axes.xaxis.set_major_formatter(lambda value, _: signed(value, 2) if abs(value) > 1e-9 else "0")
    axes.set_xlabel(f"loss(scratch) {MINUS} loss(pruned), nats per token", size=8.5, color=palette.muted, labelpad=2)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(color=palette.rule, labelcolor=palette.ink, length=3.5)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(palette.rule)


def _draw_row(axes: Axes, top: float, lower: float, verdict: Verdict, name: str, palette: Palette) -> None:
    """Draw one comparison: name, losses (beside the name, or ``lower`` inches below it) and bar."""
    x_min, x_max = axes.get_xlim()
    words: dict[str, Any] = {"va": "center", "size": 9.5}
    bar = top + lower
    axes.plot([0, 0], [bar + 0.26, bar + 0.5], color=palette.ink, lw=0.9)  # zero, clear of the names
    axes.text(x_min, top + 0.15, name, color=palette.ink, **words)
    side: dict[str, Any] = {"x": x_min if lower else x_max, "y": bar + 0.15, "ha": "left" if lower else "right"}
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        axes.text(s=NOT_MEASURED, color=palette.muted, **side, **words)
        return
    losses = f"{loss(verdict.pruned_loss)} | {loss(verdict.scratch_loss)}"
    axes.text(s=losses, color=palette.muted if lower else palette.ink, **side, **words)
    colours = {"pruned": palette.pruned, "scratch": palette.scratch}
    colour = colours.get(verdict.winner, palette.muted)
    y = bar + 0.38
    axes.barh(y, verdict.difference, height=0.17, color=colour, lw=0)
    axes.plot([verdict.low, verdict.high], [y, y], color=palette.ink, lw=1.1, marker="|", ms=6)
    ahead = verdict.difference >= 0
    end = max(verdict.high, 0.0) if ahead else min(verdict.low, 0.0)
    offset = {"xytext": (5 if ahead else -5, 0), "textcoords": "offset points"}
    axes.annotate(
        signed(verdict.difference),
        (end, y),
        ha="left" if ahead else "right",
        va="center",
        size=9.5,
        weight="bold",
        color=palette.ink,
        **offset,
    )
