"""Held-out loss against serving cost: each model as a point, the Pareto front as a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secateur.comparison.index import Model
from secateur.comparison.naming import model_name
from secateur.comparison.serving_cost import CostAxis, ServingCost, front
from secateur.formatting import loss, number, symbols
from secateur.report.figures.curves import RUNS
from secateur.report.figures.frame import LegendRow, draw_legend, panel, style_axes
from secateur.report.figures.palette import Palette

__all__ = ["draw_pareto"]

_LABELS: dict[CostAxis, str] = {"time": "ms for each written token", "memory": "MB of memory"}
_NAMED = 6  #: models of the front with a number and a name: those of the lowest losses


def draw_pareto(points: Sequence[ServingCost], axis: CostAxis, device: str, palette: Palette) -> tuple[Figure, str]:
    """Loss against one cost, and a description of the Pareto front."""
    runs = [run for run in RUNS if any(point.run == run.cell for point in points)]
    title = "Loss against time" if axis == "time" else "Loss against memory"
    best = front(points)
    named = best[-_NAMED:]
    figure, axes = panel(title, len(runs) + 2 + len(named), palette)
    scale = 1.0 if axis == "time" else 1e-6
    rows = []
    for run in runs:
        style: dict[str, Any] = {"color": getattr(palette, run.role), "marker": run.marker, "ms": 5.5, "ls": "none"}
        _draw(axes, [point for point in points if point.run == run.cell], scale, style, palette)
        rows.append(LegendRow(run.label, "", style))
    style = {"color": palette.muted, "marker": "*", "ms": 9, "ls": "none"}
    _draw(axes, [point for point in points if point.run == "parent"], scale, style, palette)
    rows.append(LegendRow("the parent", "", style))
    line = {"color": palette.ink, "lw": 0.9}
    axes.step([p.cost * scale for p in best], [p.loss for p in best], where="post", zorder=1, **line)
    rows.append(LegendRow("best at their cost", "", line))
    models = [point.model for point in points if point.model]
    for place, point in enumerate(named, 1):
        offset = {"xytext": (6, 4), "textcoords": "offset points"}
        axes.annotate(str(place), (point.cost * scale, point.loss), size=8.5, color=palette.ink, **offset)
        value = f"{loss(point.loss)} at {number(point.cost * scale, 1)}"
        rows.append(LegendRow(f"{place}  {_point_name(point, models)}", value, None))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.14)
    axes.set_xlabel(f"{_LABELS[axis]} ({device})", size=8.5, color=palette.muted, labelpad=2)
    style_axes(axes, palette, "held-out loss, nats per token")
    several = any(point.execution != "dense" for point in points)
    draw_legend(figure, rows, "hollow: with kernels that skip zeros" if several else "", palette)
    texts = [f"{_point_name(p, models)}: {loss(p.loss)} at {number(p.cost * scale, 2)}" for p in best]
    return figure, f"Best at their cost ({_LABELS[axis]}): {'; '.join(texts)}. Losses in nats per token."


def _draw(axes: Axes, points: Sequence[ServingCost], scale: float, style: dict[str, Any], palette: Palette) -> None:
    for point in points:
        filled = style["color"] if point.execution == "dense" else palette.paper
        axes.plot([point.cost * scale], [point.loss], zorder=3, mfc=filled, **style)
        axes.plot([point.low * scale, point.high * scale], [point.loss] * 2, lw=0.9, color=style["color"], zorder=2)


def _point_name(point: ServingCost, among: Sequence[Model]) -> str:
    if point.model is None:
        return "the parent"
    return f"{model_name(point.model, among).replace(' at ratio', '')}, {symbols(point.run, 'S({})')}"
