"""Parts that figures share: panel, axes, and a legend below the axes, where it covers nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from secateur.report.figures.palette import Palette

__all__ = ["LegendRow", "draw_legend", "legend_height", "log_axis", "panel", "style_axes"]

_ROW = 0.235  # inches
_APART = 0.13  # of an axis: labels closer than this would touch


@dataclass(frozen=True)
class LegendRow:
    """One row of a legend."""

    label: str
    value: str
    style: dict[str, Any] | None  #: of the line; None: no line was drawn


def log_axis(axes: Axes, ticks: Sequence[float], limits: tuple[float, float], label: Callable[[float], str]) -> None:
    """Make the horizontal axis logarithmic, with labels at those of ``ticks`` that would not touch an earlier one's."""
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axis = math.log(limits[1] / limits[0])
    apart: list[float] = []
    for tick in ticks:
        if all(abs(math.log(tick / neighbour)) > _APART * axis for neighbour in apart):
            apart.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(sorted(apart)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def legend_height(rows: int) -> float:
    """The height in inches of a legend with ``rows`` rows and a note."""
    return 0.28 + _ROW * rows


def panel(title: str, rows: int, palette: Palette, *, plot: float = 2.78) -> tuple[Figure, Axes]:
    """A figure 4 inches wide with a title, axes ``plot`` inches high (with labels) and room for a legend below."""
    foot = legend_height(rows)
    height = plot + foot
    figure = Figure(figsize=(4.0, height))
    bottom = (foot + 0.62) / height
    axes = figure.add_axes((0.56 / 4.0, bottom, 1 - 0.72 / 4.0, 1 - bottom - 0.42 / height))
    size = 10.5 if len(title) <= 44 else 10.5 * 44 / len(title)
    figure.text(0.02, 1 - 0.06 / height, title, va="top", weight="bold", color=palette.ink, size=size)
    return figure, axes


def style_axes(axes: Axes, palette: Palette, y_label: str) -> None:
    """Style ticks, spines and grid; write ``y_label`` above the axis."""
    position = {"xycoords": ("figure fraction", "axes fraction"), "xytext": (0, 6), "textcoords": "offset points"}
    axes.annotate(y_label, (0.02, 1), size=8.5, color=palette.muted, **position)
    axes.grid(axis="y", color=palette.rule, lw=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(which="both", color=palette.rule, labelcolor=palette.ink, length=3.5)
    axes.tick_params(which="minor", length=2)
    for spine in axes.spines.values():
        spine.set_color(palette.rule)


def draw_legend(figure: Figure, rows: Sequence[LegendRow], note: str, palette: Palette) -> None:
    """Draw one row for each series (line, label, value), then a note."""
    height, top = figure.get_figheight(), legend_height(len(rows))
    for index, row in enumerate(rows):
        y = (top - 0.18 - _ROW * index) / height
        if row.style:
            # three points, so that the marker sits in the middle of a sample of the line
            sample = Line2D([0.02, 0.0675, 0.115], [y] * 3, transform=figure.transFigure, markevery=[1], **row.style)
            figure.add_artist(sample)
        figure.text(0.145, y, row.label, va="center", size=9, color=palette.ink)
        figure.text(0.985, y, row.value, va="center", ha="right", size=9, color=palette.ink)
    figure.text(0.02, 0.1 / height, note, va="center", size=8.5, color=palette.muted)
