"""What the paths differ by at the end: a bar for each comparison, its 95% interval as a whisker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.report.compare import Group, Setting, Verdict
from secateur.report.palette import Palette
from secateur.report.sentences import group_name
from secateur.report.words import MINUS, NOT_MEASURED, loss, signed

__all__ = ["draw_differences"]

_WIDTH, _ROW = 4.0, 0.56  # inches
_HEAD, _FOOT = 0.6, 0.52


def draw_differences(verdicts: Sequence[Verdict], setting: Setting, among: Sequence[Group], palette: Palette) -> Figure:
    """Draw one setting; ``verdicts`` holds those of both, which share the scale of the axis."""
    chosen = [verdict for verdict in verdicts if verdict.setting == setting]
    height = _HEAD + _ROW * len(chosen) + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.02, _FOOT / height, 0.96, _ROW * len(chosen) / height))
    reach = max([abs(v) for verdict in verdicts for v in (verdict.low, verdict.high) if v is not None], default=0.0)
    _frame(axes, len(chosen), 1.5 * (reach or 0.1), palette)
    for row, verdict in enumerate(chosen):
        _draw_row(axes, row, verdict, group_name(verdict.group, among), palette)
    title = f"Equal {setting} tokens"
    figure.text(0.02, 1 - 0.06 / height, title, va="top", weight="bold", color=palette.ink, size=10.5)
    figure.text(0.98, 1 - 0.09 / height, "loss: pruned | scratch", va="top", ha="right", color=palette.muted, size=8.5)
    for x, side, text in ((-4, "right", "← scratch is better"), (4, "left", "pruning is better →")):
        offset = {"xytext": (x, 5), "textcoords": "offset points"}
        axes.annotate(text, (0, 0), ha=side, va="bottom", color=palette.muted, size=8.5, **offset)
    return figure


def _frame(axes: Axes, rows: int, reach: float, palette: Palette) -> None:
    """Zero stands in the middle: the side a bar is on is the verdict, whatever its colour."""
    axes.set_xlim(-reach, reach)
    axes.set_ylim(rows, 0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6, symmetric=True))
    axes.xaxis.set_major_formatter(lambda value, _: signed(value, 2) if abs(value) > 1e-9 else "0")
    axes.set_xlabel(f"loss(scratch) {MINUS} loss(pruned), nats per token", size=8.5, color=palette.muted, labelpad=2)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(color=palette.rule, labelcolor=palette.ink, length=3.5)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(palette.rule)


def _draw_row(axes: Axes, row: int, verdict: Verdict, name: str, palette: Palette) -> None:
    left, right = axes.get_xlim()
    words: dict[str, Any] = {"va": "center", "size": 9.5}
    axes.plot([0, 0], [row + 0.46, row + 0.9], color=palette.ink, lw=0.9)  # zero, clear of the names
    axes.text(left, row + 0.27, name, color=palette.ink, **words)
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        axes.text(right, row + 0.27, NOT_MEASURED, ha="right", color=palette.muted, **words)
        return
    losses = f"{loss(verdict.pruned_loss)} | {loss(verdict.scratch_loss)}"
    axes.text(right, row + 0.27, losses, ha="right", color=palette.ink, **words)
    colours = {"pruned": palette.pruned, "scratch": palette.scratch}
    colour = colours.get(verdict.winner, palette.muted)
    y = row + 0.68
    axes.barh(y, verdict.difference, height=0.3, color=colour, lw=0)
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
