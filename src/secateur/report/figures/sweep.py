"""The sweeps of a comparison: held-out loss of each trial against its peak learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secateur.comparison.records import Sweep
from secateur.comparison.sweeps import PARENT, SweepPanel
from secateur.formatting import NOT_MEASURED, loss, number
from secateur.report.figures.curves import RUNS
from secateur.report.figures.frame import LegendRow, draw_legend, log_axis, panel, style_axes
from secateur.report.figures.palette import Palette

__all__ = ["draw_sweeps"]

_ROOM = 1.0  #: nats above the worst of the best losses that the loss axis shows
_DASHES = ((0, (4.5, 1.6)), (0, (1.2, 1.3)), "-", (0, (7, 1.5, 1.2, 1.5)))
_EDGES = {"low": ", lowest", "high": ", highest"}


def draw_sweeps(sweeps: SweepPanel, palette: Palette) -> tuple[Figure, str]:
    """One line for each run, its best rate circled; and a description with every loss."""
    figure, axes = panel(sweeps.title, len(sweeps.sweeps), palette)
    highest = _highest(sweeps.sweeps)
    rows, texts, hidden = [], [], False
    for position, sweep in enumerate(sweeps.sweeps):
        style = _style(sweep, position, palette)
        trials = [(r, v) for r, v in zip(sweep.rates, sweep.losses, strict=True) if v is not None]
        hidden |= len(trials) < len(sweep.rates) or any(value > highest for _, value in trials)
        axes.plot([rate for rate, _ in trials], [value for _, value in trials], zorder=3, **style)
        best = [(rate, value) for rate, value in trials if rate == sweep.rate]
        if best:
            axes.plot(*best[0], ls="none", marker="o", ms=11, mfc="none", mec=palette.ink, zorder=4)
        value = NOT_MEASURED if sweep.rate is None else f"{sweep.rate:g}{_EDGES.get(sweep.at_edge or '', '')}"
        label = sweep.parent if sweep.name == PARENT else _label(sweep.name)
        rows.append(LegendRow(label, value, style if trials else None))
        texts.append(f"{label}: best {value}; {_losses(sweep)}")
    _frame(axes, sweeps.sweeps, highest, palette)
    note = "circle: the best rate" + ("; trials that diverged or end above are left out" if hidden else "")
    draw_legend(figure, rows, note, palette)
    return figure, ". ".join(texts) + ". Held-out losses in nats per token, by peak learning rate."


def _highest(sweeps: Sequence[Sweep]) -> float:
    """The top of the loss axis, so that a trial that nearly diverged does not squash the others."""
    by_sweep = [[value for value in sweep.losses if value is not None] for sweep in sweeps]
    bests = [min(losses) for losses in by_sweep if losses]
    worst = max((value for losses in by_sweep for value in losses), default=1.0)
    return min(worst, max(bests) + max(_ROOM, max(bests) - min(bests))) if bests else worst


def _style(sweep: Sweep, position: int, palette: Palette) -> dict[str, Any]:
    run = next((run for run in RUNS if run.cell == sweep.name), None)
    if run:
        return {"color": getattr(palette, run.role), "ls": run.dash, "marker": run.marker, "ms": 4.5}
    return {"color": palette.muted, "ls": _DASHES[position % len(_DASHES)], "marker": "x", "ms": 4.5}


def _label(name: str) -> str:
    return next((run.label for run in RUNS if run.cell == name), name)


def _losses(sweep: Sweep) -> str:
    without = NOT_MEASURED if sweep.rate is None else "diverged"
    pairs = zip(sweep.rates, sweep.losses, strict=True)
    return ", ".join(f"{rate:g} {without if value is None else loss(value)}" for rate, value in pairs)


def _frame(axes: Axes, sweeps: Sequence[Sweep], highest: float, palette: Palette) -> None:
    rates = sorted({r for s in sweeps for r, v in zip(s.rates, s.losses, strict=True) if v is not None})
    rates = rates or sorted({rate for sweep in sweeps for rate in sweep.rates})
    lowest = min((v for s in sweeps for v in s.losses if v is not None), default=0.0)
    room = (rates[-1] / rates[0]) ** 0.08 if len(rates) > 1 else 2.0
    log_axis(axes, rates, (rates[0] / room, rates[-1] * room), "{:g}".format)
    axes.set_ylim(lowest - 0.1 * (highest - lowest or 1.0), highest + 0.1 * (highest - lowest or 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    axes.set_xlabel("peak learning rate (logarithmic)", size=8.5, color=palette.muted, labelpad=2)
    style_axes(axes, palette, "held-out loss of the trial, nats per token")
