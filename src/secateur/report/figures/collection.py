"""The figures of a study: their list, their files, and their SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import matplotlib as mpl
from matplotlib.figure import Figure

from secateur.comparison.ablation import controls
from secateur.comparison.index import Group, Index, Model
from secateur.comparison.naming import BUDGETS, group_name, model_name
from secateur.comparison.serving_cost import AXES, serving_costs
from secateur.comparison.sweeps import sweep_panels
from secateur.comparison.twins import Setting, Verdict
from secateur.files import write_bytes, write_text
from secateur.methods.registry import method_name
from secateur.progress import track
from secateur.report.figures.curves import curve_limits, draw_curves
from secateur.report.figures.differences import draw_differences
from secateur.report.figures.forecast import draw_forecast
from secateur.report.figures.forest import draw_forest
from secateur.report.figures.ladder import draw_ladder, draw_ratios
from secateur.report.figures.model import draw_controls, draw_layers
from secateur.report.figures.palette import LIGHT, RC, ROLES, Palette, themed
from secateur.report.figures.pareto import draw_pareto
from secateur.report.figures.svg import inline
from secateur.report.figures.sweep import draw_sweeps
from secateur.report.judgement import Judgement
from secateur.report.summary import forest_verdicts

__all__ = ["KINDS", "FigureKind", "Panel", "inline_panels", "panels", "save_figures"]

FigureKind = Literal[
    "forest", "differences", "ladder", "ratios", "forecast", "pareto", "curves", "controls", "layers", "sweep"
]
KINDS: tuple[FigureKind, ...] = get_args(FigureKind)
_INLINED = 12  #: figures of one kind that the page contains; it links to the files of the rest
Draw = Callable[[Palette], tuple[Figure, str]]  # returns the figure and its description


@dataclass(frozen=True)
class Panel:
    """One figure that can be drawn."""

    name: str  #: file name without suffix
    kind: FigureKind
    title: str
    draw: Draw
    subject: Group | Model | None = None  #: the comparison or pruned model that it shows; None: several
    inlined: bool = True  #: whether the page contains it


def panels(judgement: Judgement) -> list[Panel]:
    """Every figure of the study."""
    index = judgement.index
    kinds: dict[FigureKind, Iterator[tuple[str, str, Draw, Group | Model | None]]] = {
        "forest": _forest(judgement),
        "differences": _differences(judgement),
        "ladder": _ladders(index),
        "ratios": _ratios(judgement),
        "forecast": _forecasts(judgement),
        "pareto": _pareto(index),
        "curves": _curves(index),
        "controls": _controls(index),
        "layers": _layers(index),
        "sweep": _sweeps(index),
    }
    return [
        Panel(f"{kind}-{name or f'{number:02d}'}", kind, title, draw, subject, number <= _INLINED)
        for kind, figures in kinds.items()
        for number, (name, title, draw, subject) in enumerate(figures, 1)
    ]


def _forest(judgement: Judgement) -> Iterator[tuple[str, str, Draw, None]]:
    verdicts, _ = forest_verdicts(judgement)
    sentences = dict(zip(judgement.verdicts, judgement.sentences, strict=True))

    def draw(palette: Palette) -> tuple[Figure, str]:
        return draw_forest(verdicts, judgement.index.comparisons, palette), " ".join(sentences[v] for v in verdicts)

    if verdicts:
        yield "decisive", "The decisive comparisons", draw, None


def _differences(judgement: Judgement) -> Iterator[tuple[str, str, Draw, None]]:
    for setting in judgement.settings:
        text = " ".join(text for _, text in judgement.verdicts_in(setting))
        title = f"Loss saved by pruning at equal {BUDGETS[setting]}"

        def draw(palette: Palette, setting: Setting = setting, text: str = text) -> tuple[Figure, str]:
            return draw_differences(judgement.verdicts, setting, judgement.index.comparisons, palette), text

        yield setting, title, draw, None


def _ladders(index: Index) -> Iterator[tuple[str, str, Draw, Model]]:
    ladders: dict[tuple[Model, str], list[Group]] = {}
    for group in index.pools:
        ladders.setdefault((group.model, group.objective), []).append(group)
    for (model, objective), groups in ladders.items():
        measured = any(cell.evaluation for group in groups for cell in index.of(group))
        if len(groups) > 1 and measured:
            rungs = sorted(groups, key=lambda group: group.retrain_tokens)
            name = model_name(model, index.models) + (f", {objective}" if objective else "")
            yield "", f"{name}: final held-out loss against R", partial(draw_ladder, index, rungs, name), model


def _ratios(judgement: Judgement) -> Iterator[tuple[str, str, Draw, None]]:
    index = judgement.index
    several = len(index.parents) > 1
    ladders: dict[tuple[str, str, str], dict[int, list[tuple[float, Verdict]]]] = {}
    for verdict in judgement.verdicts:
        group, ratio = verdict.group, index.ratio(verdict.group.model)
        if verdict.setting == "training" and ratio is not None and verdict.difference is not None:
            budgets = ladders.setdefault((group.parent, group.method, group.objective), {})
            budgets.setdefault(group.retrain_tokens, []).append((ratio, verdict))
    for (parent, method, objective), budgets in ladders.items():
        if len({ratio for pairs in budgets.values() for ratio, _ in pairs}) > 1:
            notes = [parent] * several + [objective] * bool(objective)
            name = method_name(method) + (f" ({', '.join(notes)})" if notes else "")
            draw = partial(draw_ratios, dict(sorted(budgets.items())), name)
            yield "", f"{name}: loss saved by pruning against the ratio", draw, None


def _forecasts(judgement: Judgement) -> Iterator[tuple[str, str, Draw, Model]]:
    for forecast in judgement.forecasts.fitted:
        title = f"{forecast.name}: fitted curves and where they cross"
        yield "", title, partial(draw_forecast, forecast), forecast.model


def _pareto(index: Index) -> Iterator[tuple[str, str, Draw, None]]:
    for axis in AXES:
        points, device = serving_costs(index, axis)
        if len(points) > 1:
            yield axis, f"Held-out loss against {axis}", partial(draw_pareto, points, axis, device), None


def _curves(index: Index) -> Iterator[tuple[str, str, Draw, Group]]:
    limits = curve_limits(index)
    for group in index.comparisons:
        name = group_name(group, index.comparisons, target=True)
        draw = partial(draw_curves, index, group, index.comparisons, limits)
        yield "", f"{name}: held-out loss in training", draw, group


def _controls(index: Index) -> Iterator[tuple[str, str, Draw, Group]]:
    for group in index.comparisons:
        gaps = controls(index, group)
        name = group_name(group, index.comparisons, target=True)
        if gaps:
            yield "", f"{name}: what is inherited", partial(draw_controls, gaps, name), group


def _layers(index: Index) -> Iterator[tuple[str, str, Draw, Model]]:
    for model, pruned in index.pruned.items():
        parent = index.parents.get(model.parent)
        if pruned.layers:
            name = model_name(model, list(index.pruned))
            draw = partial(draw_layers, pruned, parent.shape if parent else {}, name)
            yield "", f"{name}: what is left of each layer", draw, model


def _sweeps(index: Index) -> Iterator[tuple[str, str, Draw, Model | None]]:
    for sweeps in sweep_panels(index):
        yield "", f"{sweeps.title}: sweeps of learning rates", partial(draw_sweeps, sweeps), sweeps.model


def inline_panels(judgement: Judgement) -> list[tuple[Panel, str]]:
    """Every panel with its SVG, themed and accessible, or an empty string if the page only links to the file."""
    pairs = []
    with mpl.rc_context(RC):
        for panel in panels(judgement):
            svg = ""
            if panel.inlined:
                figure, description = panel.draw(ROLES)
                svg = inline(themed(_svg(figure, panel.title, transparent=True)), panel.name, panel.title, description)
            pairs.append((panel, svg))
    return pairs


def save_figures(judgement: Judgement, folder: Path) -> list[Path]:
    """Write every panel into ``folder`` as an SVG in light colours, inlined ones also as a PDF, and return the files.

    PDFs take most of the time, because fonts are embedded as TrueType, which journals ask for.
    """
    written = []
    figures = panels(judgement)
    with mpl.rc_context(RC), track("figures of the report", len(figures)) as progress:
        for panel in figures:
            figure, _ = panel.draw(LIGHT)
            svg, pdf = (folder / f"{panel.name}.{suffix}" for suffix in ("svg", "pdf"))
            write_text(svg, _svg(figure, panel.title))
            written.append(svg)
            if panel.inlined:
                write_bytes(pdf, _pdf(figure, panel.title))
                written.append(pdf)
            progress.advance()
    # An earlier build may have had more comparisons. Only remove names that this function gives.
    for path in [path for kind in KINDS for path in folder.glob(f"{kind}-*")]:
        if path.suffix in (".svg", ".pdf") and path not in written:
            path.unlink()
    return written


def _svg(figure: Figure, title: str, *, transparent: bool = False) -> str:
    """SVG without date and version of matplotlib, so that the same figure gives the same bytes."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None, "Title": title}
    figure.savefig(buffer, format="svg", transparent=transparent, metadata=metadata)
    return buffer.getvalue()


def _pdf(figure: Figure, title: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"CreationDate": None, "Creator": None, "Producer": None, "Title": title}
    figure.savefig(buffer, format="pdf", metadata=metadata)
    return buffer.getvalue()
