"""The report's figures: held-out loss along training, and what the paths differ by at the end."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from secateur.files import write_bytes, write_text
from secateur.report.compare import SETTINGS, groups
from secateur.report.draw_curves import curve_limits, draw_curves
from secateur.report.draw_differences import draw_differences
from secateur.report.palette import LIGHT, RC, ROLES, Palette, themed
from secateur.report.results import Results
from secateur.report.sentences import group_name
from secateur.report.svg import inline
from secateur.report.verdict import Judgement

__all__ = ["Panel", "draw", "inline_panels", "save_figures"]


@dataclass(frozen=True)
class Panel:
    """One figure with the words that stand for it."""

    name: str  #: of its file, without suffix
    kind: str  #: "curves" or "differences"
    title: str
    description: str  #: what it shows, for a reader who cannot see it
    figure: Figure


def draw(results: Results, judgement: Judgement, palette: Palette) -> list[Panel]:
    """Draw every panel: the differences of both settings, then the curves of each group."""
    panels = []
    among = groups(results)
    for setting in SETTINGS:
        pairs = judgement.of(setting)
        if not pairs:
            continue
        title = f"Loss saved by pruning at equal {setting} tokens"
        figure = draw_differences(judgement.verdicts, setting, among, palette)
        panels.append(Panel(f"differences-{setting}", "differences", title, " ".join(t for _, t in pairs), figure))
    limits = curve_limits(results)
    for index, group in enumerate(among, 1):
        figure, description = draw_curves(results, group, among, limits, palette)
        name = group_name(group, among, ratio=True)
        panels.append(Panel(f"curves-{index:02d}", "curves", f"{name}: held-out loss in training", description, figure))
    return panels


def inline_panels(results: Results, judgement: Judgement) -> list[tuple[Panel, str]]:
    """Every panel with its SVG for the page: themed, accessible, its ids its own."""
    with mpl.rc_context(RC):
        panels = draw(results, judgement, ROLES)
        return [
            (p, inline(themed(_svg(p.figure, p.title, transparent=True)), p.name, p.title, p.description))
            for p in panels
        ]


def save_figures(results: Results, judgement: Judgement, folder: Path) -> list[Path]:
    """Write every panel into ``folder`` as an SVG and a PDF in light colours; returns the files."""
    written = []
    with mpl.rc_context(RC):
        for panel in draw(results, judgement, LIGHT):
            svg, pdf = (folder / f"{panel.name}.{suffix}" for suffix in ("svg", "pdf"))
            write_text(svg, _svg(panel.figure, panel.title))
            write_bytes(pdf, _pdf(panel.figure, panel.title))
            written += [svg, pdf]
    # An earlier build may have had more comparisons. Only names that this function gives are taken away.
    ours = [path for kind in ("differences", "curves") for path in folder.glob(f"{kind}-*")]
    for path in ours:
        if path.suffix in (".svg", ".pdf") and path not in written:
            path.unlink()
    return written


def _svg(figure: Figure, title: str, *, transparent: bool = False) -> str:
    """SVG without a date or the writer's version: the same figure, the same bytes."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None, "Title": title}
    figure.savefig(buffer, format="svg", transparent=transparent, metadata=metadata)
    return buffer.getvalue()


def _pdf(figure: Figure, title: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"CreationDate": None, "Creator": None, "Producer": None, "Title": title}
    figure.savefig(buffer, format="pdf", metadata=metadata)
    return buffer.getvalue()
