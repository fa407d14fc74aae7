"""Final held-out loss against R, and the difference between pruned and scratch against the ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from secateur.comparison.index import Group, Index, mean_loss
from secateur.comparison.records import Cell
from secateur.comparison.twins import Verdict
from secateur.formatting import NOT_MEASURED, count, loss, signed
from secateur.report.figures.curves import RUNS, RunStyle
from secateur.report.figures.frame import LegendRow, draw_legend, panel, style_axes
from secateur.report.figures.palette import Palette

__all__ = ["draw_ladder", "draw_ratios"]

_LADDER = RUNS[:3]  # pruned, and from scratch at equal tokens
_STYLES = (("-", "o"), ((0, (4.5, 1.6)), "s"), ((0, (1.2, 1.3)), "D"), ((0, (7, 1.5, 1.2, 1.5)), "v"), ("-", "P"))


def draw_ladder(index: Index, groups: Sequence[Group], title: str, palette: Palette) -> tuple[Figure, str]:
    """One line for each path over ``groups``, ordered by R, with the differences written between; and a description."""
    runs = [run for run in _LADDER if any(any(index.over_seeds(group, run.cell)) for group in groups)]
    rows: list[LegendRow] = []
    lines: dict[RunStyle, dict[int, float]] = {}
    figure, axes = panel(title, len(runs) + 1, palette)
    for run in runs:
        by_rung = {group: [c for c in index.over_seeds(group, run.cell) if c] for group in groups}
        colour: str = getattr(palette, run.role)
        style = {"color": colour, "ls": run.dash, "marker": run.marker, "ms": 4.5}
        lines[run] = _draw_line(axes, by_rung, style)
        losses = list(lines[run].values())
        value = f"{loss(losses[0])} → {loss(losses[-1])}" if losses else NOT_MEASURED
        rows.append(LegendRow(run.label, value, style if losses else None))
    gaps = _draw_gaps(axes, lines, palette)
    mean = mean_loss(index.parents_over_seeds(groups[0]))
    style = {"color": palette.muted, "lw": 0.9}
    if mean is not None:
        axes.axhline(mean, zorder=1, **style)
    rows.append(LegendRow("the parent", loss(mean), None if mean is None else style))
    _token_axis(axes, [group.retrain_tokens for group in groups], palette)
    style_axes(axes, palette, "final held-out loss, nats per token")
    draw_legend(figure, rows, "in the plot: S(R) \u2212 P-R at each R" if gaps else "", palette)
    texts = [f"{row.label}: {row.value}" for row in rows] + [f"gap at {count(r)}: {gap}" for r, gap in gaps.items()]
    return figure, "; ".join(texts) + ". Losses in nats per token, from the smallest R to the largest."


def _draw_line(axes: Axes, by_rung: dict[Group, list[Cell]], style: dict[str, Any]) -> dict[int, float]:
    """Draw means over seeds as a line and, if there are several, each seed as a mark; return the means."""
    means: dict[int, float] = {}
    for group, cells in by_rung.items():
        mean = mean_loss(cells)
        if mean is None:
            continue
        means[group.retrain_tokens] = mean
        losses = [cell.evaluation.loss for cell in cells if cell.evaluation]
        if len(losses) > 1:
            axes.plot([group.retrain_tokens] * len(losses), losses, ls="none", marker="_", ms=7, color=style["color"])
    axes.plot(list(means), list(means.values()), zorder=3, **style)
    return means


def _draw_gaps(axes: Axes, lines: dict[RunStyle, dict[int, float]], palette: Palette) -> dict[int, str]:
    """Write loss(scratch) - loss(pruned) at each R that has both."""
    by_name = {run.cell: means for run, means in lines.items()}
    pruned, scratch = by_name.get("P-R", {}), by_name.get("S_R", {})
    gaps = {}
    for tokens in pruned:
        if tokens in scratch:
            low, high = sorted((pruned[tokens], scratch[tokens]))
            axes.plot([tokens] * 2, [low, high], color=palette.rule, lw=0.9, zorder=0)
            gaps[tokens] = signed(scratch[tokens] - pruned[tokens], 2)
            style: dict[str, Any] = {"va": "center", "size": 8.5, "color": palette.ink, "zorder": 5}
            style["bbox"] = {"fc": palette.paper, "ec": "none", "pad": 0.8}
            offset = {"xytext": (5, 0), "textcoords": "offset points"}
            axes.annotate(gaps[tokens], (tokens, (low + high) / 2), **style, **offset)
    return gaps


def _token_axis(axes: Axes, budgets: Sequence[int], palette: Palette) -> None:
    axes.set_xscale("log")
    low, high = min(budgets), max(budgets)
    room = (high / low) ** 0.12
    axes.set_xlim(low / room, high * room * room**0.5)
    axes.xaxis.set_major_locator(FixedLocator(list(budgets)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.12)
    axes.set_xlabel("R, retraining tokens (logarithmic)", size=8.5, color=palette.muted, labelpad=2)


def draw_ratios(by_budget: dict[int, list[tuple[float, Verdict]]], title: str, palette: Palette) -> tuple[Figure, str]:
    """The difference at equal training tokens against the ratio, a line for each R, and a description."""
    figure, axes = panel(title, len(by_budget), palette)
    rows: list[LegendRow] = []
    ratios = sorted({ratio for pairs in by_budget.values() for ratio, _ in pairs})
    shift = 0.012 * (ratios[-1] - ratios[0])
    for position, (tokens, pairs) in enumerate(by_budget.items()):
        dash, marker = _STYLES[position % len(_STYLES)]
        style = {"color": palette.pruned, "ls": dash, "marker": marker, "ms": 4.5}
        points = [
            (r, v.difference, v.low, v.high)
            for r, v in sorted(pairs, key=lambda pair: pair[0])
            if v.difference is not None and v.low is not None and v.high is not None
        ]
        offset = (position - (len(by_budget) - 1) / 2) * shift
        axes.plot([r + offset for r, *_ in points], [d for _, d, *_ in points], zorder=3, **style)
        for ratio, _, low, high in points:
            axes.plot([ratio + offset] * 2, [low, high], color=palette.ink, lw=1.0, marker="_", ms=6, zorder=4)
        value = " → ".join(signed(d, 2) for _, d, *_ in points) or NOT_MEASURED
        rows.append(LegendRow(f"R = {count(tokens)}", value, style if points else None))
    axes.axhline(0, color=palette.ink, lw=0.9, zorder=1)
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("ratio", size=8.5, color=palette.muted, labelpad=2)
    style_axes(axes, palette, "loss(S(R)) \u2212 loss(P-R), nats per token")
    draw_legend(figure, rows, "", palette)
    ends = f"from ratio {ratios[0]:.3g} to {ratios[-1]:.3g}"
    return (
        figure,
        f"Loss saved by pruning, in nats per token, {ends}. {'; '.join(f'{row.label}: {row.value}' for row in rows)}.",
    )
