"""Fitted curves of one ladder: runs, the curve of each path with its interval, and the crossover."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.forecast.crossover import REACH, Crossover
from secateur.forecast.curve import Path
from secateur.forecast.fit import LEVEL
from secateur.forecast.ladder import Forecast
from secateur.formatting import count, loss
from secateur.report.figures.frame import LegendRow, draw_legend, log_axis, panel, style_axes
from secateur.report.figures.palette import Palette
from secateur.report.forecast_prose import crossover_brief

__all__ = ["draw_forecast"]

_CURVE = 120  # points of a curve
_PATHS: tuple[tuple[Path, str, str, str | tuple[float, tuple[float, ...]]], ...] = (
    ("pruned", "P-R", "o", "-"),
    ("scratch", "from scratch", "s", (0, (4.5, 1.6))),
)


def draw_forecast(forecast: Forecast, palette: Palette) -> tuple[Figure, str]:
    """Held-out loss against training tokens of the run, and a description."""
    figure, axes = panel(forecast.name, len(_PATHS) + 1, palette)
    crossing = forecast.outlooks[0].crossover
    budgets = sorted({point.tokens for point in forecast.fit.points})
    low, high = budgets[0], max(budgets[-1], forecast.further)
    if crossing and math.isfinite(crossing.budget.value):
        high = max(high, 1.3 * crossing.budget.value)
    rows = []
    for path, label, marker, dash in _PATHS:
        colour: str = getattr(palette, path)
        _draw_path(axes, forecast, path, marker, dash, colour, (low, high))
        style = {"color": colour, "ls": dash, "marker": marker, "ms": 4.5}
        rows.append(LegendRow(f"{label}, at {count(forecast.further)}", _loss_with_interval(forecast, path), style))
    _draw_crossing(axes, crossing, high, palette)
    rows.append(LegendRow("crossover at", crossover_brief(crossing), {"color": palette.muted, "lw": 0.9}))
    _frame(axes, forecast, (low, high), palette)
    draw_legend(figure, rows, f"shaded: {100 * LEVEL:.0f}% intervals; marks: finished runs", palette)
    return figure, "; ".join(f"{row.label} {row.value}" for row in rows) + ". Losses in nats per token."


def _loss_with_interval(forecast: Forecast, path: Path) -> str:
    estimate = forecast.loss(path)
    if estimate is None:
        return "out of reach"
    return f"{loss(estimate.value, 2)} ({loss(estimate.low, 2)} to {loss(estimate.high, 2)})"


def _draw_path(
    axes: Axes,
    forecast: Forecast,
    path: Path,
    marker: str,
    dash: str | tuple[float, tuple[float, ...]],
    colour: str,
    span: tuple[float, float],
) -> None:
    budgets = forecast.fit.budgets(path)
    tokens = np.geomspace(max(span[0], budgets[0]), min(span[1], REACH * budgets[-1]), _CURVE)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(forecast.fit.loss_draws(path, tokens), (tail, 100 - tail), axis=0)
    axes.fill_between(tokens, low, high, color=colour, alpha=0.15, lw=0, zorder=1)
    axes.plot(tokens, forecast.fit.loss(path, tokens), color=colour, ls=dash, zorder=3)
    runs = [(p.tokens, p.loss) for p in forecast.fit.points if p.path == path]
    axes.plot(*zip(*runs, strict=True), ls="none", marker=marker, ms=5, color=colour, zorder=4)


def _draw_crossing(axes: Axes, crossing: Crossover | None, last: float, palette: Palette) -> None:
    """Draw the crossover as a line and its interval as a band, up to ``last``, the end of the axis."""
    if crossing is None or crossing.budget.low >= last:
        return
    end = min(crossing.budget.high, crossing.horizon, last)
    axes.axvspan(crossing.budget.low, end, color=palette.muted, alpha=0.12, lw=0, zorder=0)
    if math.isfinite(crossing.budget.value):
        axes.axvline(crossing.budget.value, color=palette.muted, lw=0.9, zorder=2)


def _frame(axes: Axes, forecast: Forecast, span: tuple[float, float], palette: Palette) -> None:
    room = (span[1] / span[0]) ** 0.04
    limits = (span[0] / room, span[1] * room)
    ticks = [*forecast.fit.budgets("pruned"), forecast.further, *forecast.fit.budgets("scratch"), span[1]]
    log_axis(axes, ticks, limits, count)
    losses = [p.loss for p in forecast.fit.points]
    ends = [float(forecast.fit.loss(path, tokens)) for path, *_ in _PATHS for tokens in span]
    low, high = min(losses + ends), max(losses + ends)
    axes.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("training tokens of the run (logarithmic)", size=8.5, color=palette.muted, labelpad=2)
    style_axes(axes, palette, "held-out loss, nats per token")
