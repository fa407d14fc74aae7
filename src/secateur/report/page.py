"""The report folder of a study: one self-contained HTML page, its figures and its data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from secateur import formatting
from secateur.comparison.ablation import continued_parents
from secateur.comparison.index import PRUNED, Group, Index, Model, mean_loss
from secateur.comparison.ledger import ACCOUNTS, FORMULA, forwards, own_cost, pieces, pipelines
from secateur.comparison.naming import BUDGETS, group_name, model_name
from secateur.comparison.objectives import objective_rows
from secateur.comparison.provenance import runs_of
from secateur.comparison.quality import measurement_rows
from secateur.comparison.records import PrunedModel
from secateur.comparison.serving_cost import running_rows
from secateur.comparison.steps import steps_rows
from secateur.comparison.sweeps import sweep_rows, sweep_subject
from secateur.comparison.twins import SCRATCH
from secateur.files import write_text
from secateur.forecast.crossover import REACH
from secateur.forecast.ladder import Forecast
from secateur.methods.registry import method_name
from secateur.report.forecast_prose import (
    ACCOUNT_NAMES,
    crossover_brief,
    further_sentence,
    next_sentence,
    outlook_sentence,
    standing_sentence,
)
from secateur.report.judgement import Judgement
from secateur.report.latex import comparisons_tex, forecasts_tex
from secateur.report.learning_prose import learning_notes
from secateur.report.prose import coverage_note, drop_setting, finding_sentence, part_sentence, verdict_sentence
from secateur.report.question_prose import EXPLORATORY
from secateur.report.regime_prose import regime_line, regime_rows, regime_sentences
from secateur.report.served_prose import served_sentences
from secateur.report.studies import StudyComparison
from secateur.report.summary import cost_sentence, forest_verdicts
from secateur.report.sweep_prose import edge_sentences, sweep_sentences
from secateur.report.tables import (
    across_rows,
    cell_rows,
    comparison_rows,
    curves_csv,
    forecast_rows,
    rows_csv,
    versus_rows,
)

if TYPE_CHECKING:  # imported where figures are drawn: matplotlib takes a second
    from secateur.report.figures.collection import Panel

__all__ = ["build_report", "build_versus", "render"]

_MOST_UNFOLDED = 6  #: with more comparisons than this the page folds what it shows of each
_RUNS: dict[str, str] = {
    "S_R": "the same small architecture, from random weights, on R tokens: as many training tokens as P-R",
    "S_{P+R}": "the same, on P + R tokens: as many total tokens as P-R, with those of its parent",
    "S_F": "the same, for as many FLOPs as scoring and retraining",
    "S_{P+F}": "the same, for as many FLOPs as the parent's pretraining, scoring and retraining",
}
_FILTERS = (
    formatting.count,
    formatting.duration,
    formatting.every,
    formatting.loss,
    method_name,
    formatting.number,
    formatting.plain,
    formatting.probability,
    formatting.scientific,
    formatting.percent,
    formatting.signed,
    part_sentence,
)


def build_report(judgement: Judgement, folder: Path) -> Path:
    """Write the page, its figures and its data into ``folder``.

    Files: ``report.html``, ``figures/*.svg`` and ``*.pdf``, ``cells.csv``, ``comparisons.csv`` and ``.tex``,
    ``curves.csv``, ``measurements.csv``; for ladders also ``forecasts.csv`` and ``.tex`` and ``across_ratios.csv``; for
    swept learning rates ``sweeps.csv``.
    Each file is written atomically, the page last. The same results give the same bytes.

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
        "forecasts.tex": forecasts_tex(judgement) if judgement.forecasts.fitted else "",
        "across_ratios.csv": rows_csv(across_rows(judgement)),
        "sweeps.csv": rows_csv(sweep_rows(judgement.index)),
    }
    for name, text in optional.items():
        if text.strip():
            write_text(folder / name, text)
        else:  # remove the file of an earlier build
            (folder / name).unlink(missing_ok=True)
    page = folder / "report.html"
    write_text(page, render(judgement))
    return page


def build_versus(comparison: StudyComparison, folder: Path) -> Path:
    """Write the comparison of study A with study B into ``folder``: ``versus-B.html`` and ``.csv``."""
    name = f"versus-{comparison.b.results.name}"
    write_text(folder / f"{name}.csv", rows_csv(versus_rows(comparison)))
    context = {
        "versus": comparison,
        "a": comparison.a.results,
        "b": comparison.b.results,
        "budget_names": BUDGETS,
        "not_measured": formatting.NOT_MEASURED,
        "minus": formatting.MINUS,
        "data": f"{name}.csv",
    }
    page = folder / f"{name}.html"
    write_text(page, _environment().get_template("versus.html.j2").render(context))
    return page


def render(judgement: Judgement) -> str:
    """The report page as HTML text."""
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
    environment.filters |= {"symbols": _symbols, "or_missing": _or_missing, "contents": _contents}
    return environment


def _context(judgement: Judgement) -> dict[str, Any]:
    from secateur.report.figures.collection import KINDS, inline_panels

    results, index = judgement.results, judgement.index
    figures = [(panel, Markup(svg)) for panel, svg in inline_panels(judgement)]
    details = [row for row in (_model_details(judgement, model, figures) for model in index.models) if row]
    return {
        "results": results,
        "judgement": judgement,
        "question": judgement.question,
        "answer": re.split(r"(?<=\.) ", judgement.answer),
        **_first_screen(judgement),
        "exploratory_note": EXPLORATORY,
        "many": len(index.comparisons) > _MOST_UNFOLDED,
        "verdicts": {
            setting: [(verdict, drop_setting(text, setting)) for verdict, text in judgement.verdicts_in(setting)]
            for setting in judgement.settings
        },
        "runs": [(SCRATCH[setting], _RUNS[SCRATCH[setting]]) for setting in judgement.settings],
        "budgets": [formatting.count(tokens) for tokens in sorted({group.retrain_tokens for group in index.groups})],
        "regimes": [
            (regime, regime_sentences(regime, len(judgement.regimes) > 1), regime_rows(regime))
            for regime in judgement.regimes
        ],
        "figures": {kind: [pair for pair in figures if pair[0].kind == kind] for kind in KINDS},
        "objectives": objective_rows(index),
        "steps": steps_rows(index),
        "quality": [(row, group_name(row.group, index.comparisons, target=True)) for row in judgement.quality],
        "running": running_rows(index),
        "served": [(row, group_name(row.verdict.group, index.comparisons, target=True)) for row in judgement.served],
        "served_sentences": served_sentences(judgement.served),
        "forecasts": judgement.forecasts,
        "reach": REACH,
        "forecast_texts": [_forecast_texts(forecast) for forecast in judgement.forecasts.fitted],
        "laws": judgement.laws,
        "sweeps": [(sweep, sweep_subject(index, sweep)) for sweep in results.sweeps],
        "sweep_texts": sweep_sentences(index),
        "edge_texts": edge_sentences(index),
        "across": across_rows(judgement),
        "cells": cell_rows(judgement),
        "extra": _varying_columns(index.groups),
        "before": _losses_before_training(index),
        "each": details,
        "has_controls": any(row["controls"] for row in details),
        **_costs(judgement),
        "unfinished": [stage for stage in results.stages if stage.state != "done"],
        "unmeasured": [
            text
            for verdict, text in zip(judgement.verdicts, judgement.sentences, strict=True)
            if verdict.winner == "not measured"
        ],
        "several_seeds": index.several_seeds,
        "coverage_note": coverage_note(judgement.verdicts, results.seeds_vary),
        "findings": [
            (finding, [(row, finding_sentence(row, index.comparisons)) for row in finding.rows])
            for finding in judgement.findings
        ],
        "learning": learning_notes(index),
        "continued": [(group, mean_loss(cells)) for group, cells in continued_parents(index).items()],
        "several_parents": len(index.parents) > 1,
        "parents": [(parent, _mean_parent_loss(index, name)) for name, parent in index.parents.items()],
        "seeded_prunings": len(index.pruned) < len(results.pruned),
        "not_measured": formatting.NOT_MEASURED,
        "budget_names": BUDGETS,
        "minus": formatting.MINUS,
    }


def _first_screen(judgement: Judgement) -> dict[str, Any]:
    """What the summary says beside the answer: the notes of its figure, the regime and the cost."""
    verdicts, left_out = forest_verdicts(judgement)
    decisions = [verdict.decision for verdict in verdicts]
    return {
        "left_out": left_out,
        "margin": max((decision.margin or 0.0 for decision in decisions), default=0.0),
        "holm": any(decision.adjusted_p is not None and decision.comparisons > 1 for decision in decisions),
        "regime_line": regime_line(judgement.regimes),
        "cost_line": cost_sentence(judgement),
    }


def _forecast_texts(forecast: Forecast) -> dict[str, Any]:
    """A forecast as sentences, and as one table row for each account."""
    return {
        "name": forecast.name,
        "sentences": [
            outlook_sentence(forecast.outlooks[0]),
            further_sentence(forecast),
            next_sentence(forecast),
        ],
        "rows": [
            {
                "equal": ACCOUNT_NAMES[outlook.allowance.account],
                "last": outlook.last,
                "further": outlook.further,
                "leader": outlook.crossover.leader if outlook.crossover else None,
                "crossover": crossover_brief(outlook.crossover),
                "sentences": [standing_sentence(standing, outlook.allowance.account) for standing in outlook.standings],
            }
            for outlook in forecast.outlooks
        ],
    }


def _varying_columns(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Columns of the table of models that only some studies need: heading and key of the row."""
    columns = (("parent", "parent"), ("R", "retrain_tokens"), ("objective", "objective"), ("seed", "seed"))
    return [(head, key) for head, key in columns if len({getattr(group, key) for group in groups}) > 1]


def _losses_before_training(index: Index) -> list[tuple[PrunedModel, float | None]]:
    """Every pruned model with its loss minus its parent's; None unless both were measured under one protocol."""
    rows = []
    for pruned in index.results.pruned:
        parent = index.parent(pruned.parent, pruned.seed)
        evaluation, baseline = pruned.evaluation, parent.evaluation if parent else None
        same = evaluation and baseline and evaluation.protocol == baseline.protocol
        rows.append((pruned, evaluation.loss - baseline.loss if same and evaluation and baseline else None))
    return rows


def _mean_parent_loss(index: Index, name: str) -> float | None:
    return mean_loss(parent for parent in index.results.parents if parent.name == name)


def _model_details(
    judgement: Judgement, model: Model, figures: Sequence[tuple[Panel, Markup]]
) -> dict[str, Any] | None:
    """The page's section about one pruned model; None if it would be empty."""
    index = judgement.index
    names = {
        group: group_name(group, index.comparisons, target=True) for group in index.comparisons if group.model == model
    }

    def figures_of(kind: str, *subjects: Group | Model) -> list[tuple[Panel, Markup]]:
        return [pair for pair in figures if pair[0].kind == kind and pair[0].subject in subjects]

    details: dict[str, Any] = {
        "layers": figures_of("layers", model),
        "curves": figures_of("curves", *names),
        "controls": [
            {"name": name, "figures": figures_of("controls", group), "parts": judgement.parts(group)}
            for group, name in names.items()
            if figures_of("controls", group)
        ],
        "removed": _removal_text(index.pruned.get(model)),
        "runs": runs_of(index, model),
        "by_seed": [
            (verdict, verdict_sentence(verdict, index.groups, judgement.results.seeds_vary))
            for verdict in judgement.by_seed
            if verdict.group.model == model
        ],
    }
    return {"name": model_name(model, index.models), **details} if any(details.values()) else None


def _removal_text(pruned: PrunedModel | None) -> str:
    if pruned is None:
        return ""
    total, dense = formatting.percent(pruned.ratio_total), formatting.percent(pruned.ratio_non_embedding)
    return f"{pruned.detail}; {total} of all parameters, {dense} of those outside the embeddings."


def _costs(judgement: Judgement) -> dict[str, Any]:
    index = judgement.index
    totals = [v.flop_ratio for v in judgement.verdicts if v.setting == "total" and v.flop_ratio is not None]
    training = []
    for group in index.groups:
        pruned, scratch = index.cell(group, PRUNED), index.cell(group, SCRATCH["training"])
        cost = own_cost(pruned) if pruned else None
        if cost and pruned and scratch and scratch.training.flops:
            training.append((cost.flops - (pruned.sweep.flops if pruned.sweep else 0.0)) / scratch.training.flops)
    return {
        "accounts": ACCOUNTS,
        "formula": FORMULA,
        "forwards": forwards(index),
        "ledger": pieces(index),
        "pipelines": pipelines(index),
        "costs": (min(totals), max(totals)) if totals else None,
        "training_costs": (min(training), max(training)) if training else None,
    }


def _contents(sections: str) -> list[tuple[str, Markup]]:
    """The name and title of each section of the page, in order."""
    return [(name, Markup(title)) for name, title in re.findall(r'<h2 id="([\w-]+)-title">(.*?)</h2>', sections)]


def _symbols(text: str) -> Markup:
    """Escape ``text`` and write its run names with subscripts."""
    return Markup(formatting.symbols(str(escape(text)), "S<sub>{}</sub>"))


def _or_missing(value: Any, name: str, *arguments: Any) -> str | Markup:
    """Format ``value`` with the function ``name`` of ``secateur.formatting``; None becomes "not measured"."""
    if value is None:
        return Markup('<span class="missing">{}</span>').format(formatting.NOT_MEASURED)
    return getattr(formatting, name)(value, *arguments)
