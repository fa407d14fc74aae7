"""From results to a folder: one self-contained page, its figures and its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from secateur import formatting as words
from secateur.comparison.ablation import parts
from secateur.comparison.index import PRUNED, Group, Index, Model
from secateur.comparison.ledger import ACCOUNTS, FORMULA, forwards, own_cost, pieces, pipelines
from secateur.comparison.naming import BUDGETS, group_name, model_name
from secateur.comparison.objectives import objective_rows
from secateur.comparison.provenance import runs_of
from secateur.comparison.quality import measurement_rows
from secateur.comparison.records import Pruned
from secateur.comparison.serving_cost import running_rows
from secateur.comparison.twins import SCRATCH
from secateur.files import write_text
from secateur.forecast.ladder import Forecast
from secateur.methods.registry import method_name
from secateur.report.forecast_prose import (
    ACCOUNT_NAMES,
    crossover_brief,
    further_sentence,
    misfit_sentence,
    next_sentence,
    outlook_sentence,
    standing_sentence,
)
from secateur.report.judgement import Judgement
from secateur.report.latex import comparisons_tex, forecasts_tex
from secateur.report.prose import brief, sentence
from secateur.report.studies import StudyComparison
from secateur.report.tables import (
    across_rows,
    cell_rows,
    comparison_rows,
    curves_csv,
    forecast_rows,
    rows_csv,
    versus_rows,
)
from secateur.report.terminal import POOLED_NOTE

if TYPE_CHECKING:  # imported where figures are drawn: matplotlib takes a second
    from secateur.report.figures.collection import Panel

__all__ = ["build_report", "build_versus", "render"]

_MANY = 6  #: comparisons beyond which the page folds away what is one for each
_RUNS: dict[str, str] = {
    "S_R": "the same small architecture from random weights on R tokens: as many training tokens as P-R",
    "S_{P+R}": "the same from random weights on P + R tokens: as many total tokens as P-R, its parent's counted",
    "S_F": "the same from random weights for as many FLOPs as scoring and retraining took",
    "S_{P+F}": "the same for as many FLOPs as pretraining the parent, scoring and retraining took",
}
_FILTERS = (
    words.count,
    words.duration,
    words.loss,
    method_name,
    words.number,
    words.plain,
    words.probability,
    words.scientific,
    words.percent,
    words.signed,
)


def build_report(judgement: Judgement, folder: Path) -> Path:
    """Write the page, its figures and its data into ``folder``.

    ``report.html``, ``figures/*.svg`` and ``*.pdf``, ``cells.csv``, ``comparisons.csv`` and ``.tex``, ``curves.csv``,
    ``measurements.csv``, and where there are ladders ``forecasts.csv`` and ``.tex`` and ``across_ratios.csv``.
    Each file is replaced as a whole, and the page last; the same results give the same bytes.

    Returns:
        The path of the page.
    """
    from secateur.report.figures.collection import save_figures

    save_figures(judgement, folder / "figures")
    write_text(folder / "cells.csv", rows_csv(cell_rows(judgement)))
    write_text(folder / "comparisons.csv", rows_csv(comparison_rows(judgement)))
    write_text(folder / "comparisons.tex", comparisons_tex(judgement))
    write_text(folder / "curves.csv", curves_csv(judgement))
    write_text(folder / "measurements.csv", rows_csv(measurement_rows(judgement.index)))
    optional = {
        "forecasts.csv": rows_csv(forecast_rows(judgement)),
        "forecasts.tex": forecasts_tex(judgement) if judgement.forecasts.found else "",
        "across_ratios.csv": rows_csv(across_rows(judgement)),
    }
    for name, text in optional.items():
        if text.strip():
            write_text(folder / name, text)
        else:  # an earlier build may have had it
            (folder / name).unlink(missing_ok=True)
    page = folder / "report.html"
    write_text(page, render(judgement))
    return page


def build_versus(found: StudyComparison, folder: Path) -> Path:
    """Write the page that compares study A with B, and its data, into A's folder: ``versus-B.html`` and ``.csv``."""
    name = f"versus-{found.b.results.name}"
    write_text(folder / f"{name}.csv", rows_csv(versus_rows(found)))
    context = {
        "versus": found,
        "a": found.a.results,
        "b": found.b.results,
        "budget_names": BUDGETS,
        "not_measured": words.NOT_MEASURED,
        "minus": words.MINUS,
        "data": f"{name}.csv",
    }
    page = folder / f"{name}.html"
    write_text(page, _environment().get_template("versus.html.j2").render(context))
    return page


def render(judgement: Judgement) -> str:
    """The page as text."""
    return _environment().get_template("report.html.j2").render(_context(judgement))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS}
    environment.filters |= {"symbols": _symbols, "or_missing": _or_missing}
    return environment


def _context(judgement: Judgement) -> dict[str, Any]:
    from secateur.report.figures.collection import KINDS, inline_panels

    results, index = judgement.results, judgement.index
    drawn = [(panel, Markup(svg)) for panel, svg in inline_panels(judgement)]
    each = [model for model in (_each(judgement, model, drawn) for model in index.models) if model]
    return {
        "results": results,
        "judgement": judgement,
        "many": len(index.comparisons) > _MANY,
        "verdicts": {
            setting: [(verdict, brief(text, setting)) for verdict, text in judgement.of(setting)]
            for setting in judgement.settings
        },
        "runs": [(SCRATCH[setting], _RUNS[SCRATCH[setting]]) for setting in judgement.settings],
        "budgets": [words.count(tokens) for tokens in sorted({group.retrain_tokens for group in index.groups})],
        "figures": {kind: [pair for pair in drawn if pair[0].kind == kind] for kind in KINDS},
        "objectives": objective_rows(index),
        "quality": [(row, group_name(row.group, index.comparisons, target=True)) for row in judgement.quality],
        "running": running_rows(index),
        "forecasts": judgement.forecasts,
        "forecast_told": [_told(found) for found in judgement.forecasts.found],
        "laws": judgement.laws,
        "across": across_rows(judgement),
        "cells": cell_rows(judgement),
        "extra": _extra(index.groups),
        "before": _before(index),
        "each": each,
        "has_controls": any(model["controls"] for model in each),
        **_costs(judgement),
        "unfinished": [stage for stage in results.stages if stage.state != "done"],
        "unmeasured": [text for v, text in zip(judgement.verdicts, judgement.sentences, strict=True) if v.reason],
        "several_seeds": index.several_seeds,
        "several_parents": len(results.parents) > 1,
        "pooled_note": POOLED_NOTE,
        "not_measured": words.NOT_MEASURED,
        "budget_names": BUDGETS,
        "minus": words.MINUS,
    }


def _told(found: Forecast) -> dict[str, Any]:
    """A forecast in sentences, and a row of the table for each account."""
    return {
        "name": found.name,
        "sentences": [
            *filter(None, [misfit_sentence(found)]),
            outlook_sentence(found.outlooks[0]),
            further_sentence(found),
            next_sentence(found),
        ],
        "rows": [
            {
                "equal": ACCOUNT_NAMES[outlook.allowance.account],
                "last": outlook.last,
                "further": outlook.further,
                "leader": outlook.crossover.leader if outlook.crossover else None,
                "crossover": crossover_brief(outlook.crossover),
                "sentences": [standing_sentence(one, outlook.allowance.account) for one in outlook.standings],
            }
            for outlook in found.outlooks
        ],
    }


def _extra(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Columns of the table of models that tell this study's apart: heading and key of the row."""
    columns = (("parent", "parent"), ("R", "retrain_tokens"), ("objective", "objective"), ("seed", "seed"))
    return [(head, key) for head, key in columns if len({getattr(group, key) for group in groups}) > 1]


def _before(index: Index) -> list[tuple[Any, float | None]]:
    """Every pruned model with its loss above its parent's, where both were measured under one protocol."""
    rows = []
    for pruned in index.results.pruned:
        parent = index.parents.get(pruned.parent)
        ours, theirs = pruned.evaluation, parent.evaluation if parent else None
        same = ours and theirs and ours.protocol == theirs.protocol
        rows.append((pruned, ours.loss - theirs.loss if same and ours and theirs else None))
    return rows


def _each(judgement: Judgement, model: Model, drawn: Sequence[tuple[Panel, Markup]]) -> dict[str, Any] | None:
    """What the page tells of one pruned model by itself; None where that is nothing."""
    index = judgement.index
    about = {group: group_name(group, index.comparisons, target=True) for group in index.comparisons}
    about = {group: name for group, name in about.items() if group.model == model}

    def of(kind: str, *subjects: Group | Model) -> list[tuple[Panel, Markup]]:
        return [pair for pair in drawn if pair[0].kind == kind and pair[0].about in subjects]

    found: dict[str, Any] = {
        "layers": of("layers", model),
        "curves": of("curves", *about),
        "controls": [
            {"name": name, "figures": of("controls", group), "parts": parts(index, group)}
            for group, name in about.items()
            if of("controls", group)
        ],
        "removed": _removed(index.pruned.get(model)),
        "runs": runs_of(index, model),
        "by_seed": [
            (verdict, sentence(verdict, index.groups)) for verdict in judgement.by_seed if verdict.group.model == model
        ],
    }
    return {"name": model_name(model, index.models), **found} if any(found.values()) else None


def _removed(pruned: Pruned | None) -> str:
    if pruned is None:
        return ""
    total, dense = words.percent(pruned.ratio_total), words.percent(pruned.ratio_non_embedding)
    return f"{pruned.detail}; {total} of all parameters, {dense} of those outside the embeddings."


def _costs(judgement: Judgement) -> dict[str, Any]:
    index = judgement.index
    totals = [v.flop_ratio for v in judgement.verdicts if v.setting == "total" and v.flop_ratio is not None]
    training = []
    for group in index.groups:
        pruned, scratch = index.cell(group, PRUNED), index.cell(group, SCRATCH["training"])
        own = own_cost(pruned) if pruned else None
        if own and pruned and scratch and scratch.training.flops:
            training.append((own.flops - (pruned.sweep.flops if pruned.sweep else 0.0)) / scratch.training.flops)
    return {
        "accounts": ACCOUNTS,
        "formula": FORMULA,
        "forwards": forwards(index),
        "ledger": pieces(index),
        "pipelines": pipelines(index),
        "costs": (min(totals), max(totals)) if totals else None,
        "training_costs": (min(training), max(training)) if training else None,
    }


def _symbols(text: str) -> Markup:
    """Escape ``text`` and set its symbols as they are written by hand: S_R with a subscript."""
    return Markup(words.symbols(str(escape(text)), "S<sub>{}</sub>"))


def _or_missing(value: Any, name: str, *arguments: Any) -> str | Markup:
    """Format ``value`` with a function of ``words``, or say in its place that it was not measured."""
    if value is None:
        return Markup('<span class="missing">{}</span>').format(words.NOT_MEASURED)
    return getattr(words, name)(value, *arguments)
