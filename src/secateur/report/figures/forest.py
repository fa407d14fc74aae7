"""The decisive comparisons: each difference with its interval beside the equality margin, and its p."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.comparison.index import Group
from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.twins import Setting, Verdict
from secateur.formatting import MINUS, NOT_MEASURED, probability, signed
from secateur.report.figures.palette import Palette

__all__ = ["draw_forest"]

_WIDTH, _ROW, _TITLE = 4.4, 0.43, 0.3  # inches; of a comparison and of the title of a setting
_HEAD, _FOOT = 0.08, 0.5
_BEYOND = 2.5  # times the largest difference: where longer intervals are cut


def draw_forest(verdicts: Sequence[Verdict], among: Sequence[Group], palette: Palette) -> Figure:
    """Draw ``verdicts`` in order, under a title for each setting."""
    settings: list[Setting] = list(dict.fromkeys(verdict.setting for verdict in verdicts))
    body = _ROW * len(verdicts) + _TITLE * len(settings)
    height = _HEAD + body + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.02, _FOOT / height, 0.96, body / height))
    _frame(axes, body, _reach(verdicts), max((v.decision.margin or 0.0 for v in verdicts), default=0.0), palette)
    top, x_min = 0.0, axes.get_xlim()[0]
    for setting in settings:
        title = f"Equal {BUDGETS[setting]}"
        axes.text(x_min, top + 0.15, title, va="center", size=9.5, weight="bold", color=palette.ink)
        top += _TITLE
        for verdict in verdicts:
            if verdict.setting == setting:
                _draw_row(axes, top, verdict, group_name(verdict.group, among, target=True), palette)
                top += _ROW
    return figure


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Half the width of the axis: the longest interval, cut where it would hide the differences."""
    ends = [abs(end) for v in verdicts for end in (v.low, v.high) if end is not None]
    values = [abs(v.difference) for v in verdicts if v.difference is not None]
    return 1.12 * (min(max(ends, default=0.0), _BEYOND * max(values, default=0.0)) or max(values, default=0.0) or 0.1)


def _frame(axes: Axes, body: float, reach: float, margin: float, palette: Palette) -> None:
    axes.set_xlim(-reach, reach)
    axes.set_ylim(body, 0)
    axes.set_yticks([])
    axes.patch.set_visible(False)
    if margin:
        axes.axvspan(-margin, margin, color=palette.rule, lw=0, zorder=0)
    axes.axvline(0, color=palette.muted, lw=0.8, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, symmetric=True))
    axes.xaxis.set_major_formatter(lambda value, _: signed(value, 2) if abs(value) > 1e-9 else "0")
    axes.set_xlabel(
        f"← scratch is better   loss(scratch) {MINUS} loss(pruned), nats   pruning is better →",
        size=8.5,
        color=palette.muted,
        labelpad=2,
    )
    axes.tick_params(color=palette.rule, labelcolor=palette.ink, length=3.5)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(palette.rule)


def _draw_row(axes: Axes, top: float, verdict: Verdict, name: str, palette: Palette) -> None:
    """Name and p on a line, the difference with its interval below."""
    x_min, x_max = axes.get_xlim()
    paper = {"fc": palette.paper, "ec": "none", "pad": 0.6}
    text, line = top + 0.1, top + 0.28
    axes.text(x_min, text, name, va="center", size=9, color=palette.ink, bbox=paper, zorder=2)
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        axes.text(x_max, text, NOT_MEASURED, va="center", ha="right", size=8.5, color=palette.muted, bbox=paper)
        return
    axes.text(x_max, text, _p_text(verdict), va="center", ha="right", size=8.5, color=palette.muted, bbox=paper)
    colour, marker = {"pruned": (palette.pruned, "o"), "scratch": (palette.scratch, "s")}.get(
        verdict.winner, (palette.muted, "D")
    )
    ends = [min(max(end, x_min), x_max) for end in (verdict.low, verdict.high)]
    axes.plot(ends, [line] * 2, color=colour, lw=1.6, zorder=3, solid_capstyle="butt")
    for end, whole, arrow in ((ends[0], verdict.low, "<"), (ends[1], verdict.high, ">")):
        cut = end != whole
        axes.plot([end], [line], marker=arrow if cut else "|", ms=5 if cut else 6, color=colour, zorder=3)
    axes.plot([verdict.difference], [line], marker=marker, ms=5.5, color=colour, zorder=4)
    far = verdict.difference < 0
    axes.annotate(
        signed(verdict.difference),
        (0, line),
        ha="left" if far else "right",
        va="center",
        size=9,
        weight="bold",
        color=palette.ink,
        bbox=paper,
        zorder=5,
        xytext=(6 if far else -6, 0),
        textcoords="offset points",
    )


def _p_text(verdict: Verdict) -> str:
    """``p 0.016 → 0.048``: by itself, and corrected for the number of comparisons."""
    p, corrected = verdict.decision.p, verdict.decision.adjusted_p
    if p is None:
        return verdict.winner
    several = corrected is not None and verdict.decision.comparisons > 1
    return f"p {probability(p)}" + (f" → {probability(corrected)}" if several and corrected is not None else "")
