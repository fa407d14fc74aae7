"""From results to a folder: one self-contained page, its figures and its data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from secateur.files import write_text
from secateur.report import words
from secateur.report.compare import SETTINGS
from secateur.report.figures import inline_panels, save_figures
from secateur.report.results import Results
from secateur.report.sentences import brief
from secateur.report.tables import cell_rows, cells_csv, curves_csv, ledger, pipelines
from secateur.report.verdict import Judgement, judge

__all__ = ["build_report", "render"]

_SYMBOL = re.compile(r"S_\{P\+R\}|S_R\b")
_FILTERS = (
    words.count,
    words.duration,
    words.loss,
    words.method_name,
    words.number,
    words.plain,
    words.scientific,
    words.share,
    words.signed,
)


def build_report(results: Results, folder: Path) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``*.pdf``, ``cells.csv`` and ``curves.csv`` into ``folder``.

    Each file is replaced as a whole, and the page last; the same results give the same bytes.

    Returns:
        The path of the page.
    """
    judgement = judge(results)
    save_figures(results, judgement, folder / "figures")
    write_text(folder / "cells.csv", cells_csv(cell_rows(results, judgement)))
    write_text(folder / "curves.csv", curves_csv(results))
    page = folder / "report.html"
    write_text(page, render(results, judgement))
    return page


def render(results: Results, judgement: Judgement) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS}
    environment.filters |= {"symbols": _symbols, "or_missing": _or_missing}
    return environment.get_template("template.html.j2").render(_context(results, judgement))


def _context(results: Results, judgement: Judgement) -> dict[str, Any]:
    panels = inline_panels(results, judgement)
    verdicts = {
        setting: [(verdict, brief(text, setting)) for verdict, text in judgement.of(setting)] for setting in SETTINGS
    }
    costs = [row["ratio"] for row in pipelines(results, judgement) if row["ratio"] is not None]
    return {
        "results": results,
        "judgement": judgement,
        "verdicts": verdicts,
        "figures": {
            kind: [(panel, Markup(svg)) for panel, svg in panels if panel.kind == kind]
            for kind in ("differences", "curves")
        },
        "cells": cell_rows(results, judgement),
        "ledger": ledger(results),
        "pipelines": pipelines(results, judgement),
        "costs": (min(costs), max(costs)) if costs else None,
        "unfinished": [stage for stage in results.stages if stage.state != "done"],
        "unmeasured": [text for v, text in zip(judgement.verdicts, judgement.sentences, strict=True) if v.reason],
        "several_seeds": len({cell.seed for cell in results.cells}) > 1,
        "not_measured": words.NOT_MEASURED,
        "minus": words.MINUS,
    }


def _symbols(text: str) -> Markup:
    """Escape ``text`` and set its symbols as they are written by hand: S_R with a subscript."""
    marked = _SYMBOL.sub(lambda found: f"S<sub>{found[0][2:].strip('{}')}</sub>", str(escape(text)))
    return Markup(marked)


def _or_missing(value: Any, name: str, *arguments: Any) -> str | Markup:
    """Format ``value`` with a function of ``words``, or say in its place that it was not measured."""
    if value is None:
        return Markup('<span class="missing">{}</span>').format(words.NOT_MEASURED)
    return getattr(words, name)(value, *arguments)
