"""The report of a study for a terminal: plain ASCII, at most 100 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.comparison.ablation import CONTINUED, continued_parents
from secateur.comparison.index import PRUNED, Group, Index, group_of, mean_loss
from secateur.comparison.ledger import ACCOUNTS, run_subject
from secateur.comparison.naming import BUDGETS, group_name, target_words
from secateur.comparison.objectives import objective_rows
from secateur.comparison.records import Cell, Parent, PrunedModel
from secateur.comparison.steps import steps_rows
from secateur.comparison.twins import SCRATCH, Setting, Winner
from secateur.formatting import MINUS, TIMES, count, join_words, loss, plural
from secateur.report.forecast_prose import further_sentence, next_sentence, outlook_sentence
from secateur.report.judgement import Judgement
from secateur.report.learning_prose import learning_notes
from secateur.report.prose import (
    coverage_note,
    drop_setting,
    finding_sentence,
    objective_sentence,
    part_sentence,
    steps_sentence,
)
from secateur.report.question_prose import EXPLORATORY
from secateur.report.regime_prose import REGIME_TITLE, regime_line, regime_sentences
from secateur.report.served_prose import SERVED_TITLE, served_sentences
from secateur.report.studies import StudyComparison
from secateur.report.summary import cost_sentence
from secateur.report.sweep_prose import SWEEPS_TITLE, edge_sentences, sweep_sentences
from secateur.report.tables import cell_rows

__all__ = ["text_summary", "text_table", "text_versus"]

_WIDTH = 100
_MOST_SENTENCES, _MOST_CONTROLS, _MOST_RANKS = 6, 2, 12  # shown of each list
_DIGITS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789")
_MOST_ROWS = 12  # of the table in a summary

_SIGNS: dict[str, str] = {
    "pruned": "P",
    "scratch": "S",
    "equal within margin": "=",
    "undecided": "~",
    "not measured": "-",
}
_RUNS: dict[str, str] = {
    "S_R": "on R",
    "S_{P+R}": "on P+R",
    "S_F": "for as many FLOPs as scoring and retraining (F)",
    "S_{P+F}": "for as many as F and the parent's pretraining (P+F)",
}


def text_table(judgement: Judgement) -> str:
    """The whole report: the answer, losses, verdicts, findings and, for larger studies, a ranking by loss and FLOPs."""
    index = judgement.index
    lines = [*_answer(judgement), "", *_question(judgement), *_parents(index), ""]
    lines += _aligned(_rows(judgement), 1 + len(_columns(index)), _count_text_columns(judgement))
    lines += ["", *_wrapped(_legend(judgement))]
    for setting in judgement.settings:
        lines += ["", *_wrapped(judgement.headlines[setting])]
        pairs = judgement.verdicts_in(setting)
        for _, text in pairs[:_MOST_SENTENCES]:
            lines += _wrapped(drop_setting(text, setting), indent="  ")
        if len(pairs) > _MOST_SENTENCES:
            lines.append(f"  and {len(pairs) - _MOST_SENTENCES} more, on the page and in comparisons.csv")
    lines += (
        ["", *_wrapped(coverage_note(judgement.verdicts, judgement.results.seeds_vary))] if judgement.verdicts else []
    )
    lines += _sentences(SERVED_TITLE, served_sentences(judgement.served)) + _sweeps(index)
    lines += _findings(judgement) + _controls(judgement) + _objectives(index) + _steps(index) + _forecasts(judgement)
    if len(index.pools) > len(index.models) or index.several_seeds or len(index.parents) > 1:
        lines += _ranking(judgement)
    lines += _regime(judgement)
    ratios = _flop_line(judgement)
    lines += ["", *_wrapped(ratios)] if ratios else []
    return _ascii("\n".join(lines)) + "\n"


def text_summary(judgement: Judgement) -> str:
    """The report in at most 40 lines: the answer, the question, the first comparisons as a table, and the cost."""
    index, question = judgement.index, judgement.question
    lines = _answer(judgement)
    if not judgement.caution:
        lines += _wrapped(regime_line(judgement.regimes))
    asks = _wrapped(f"Question: {question.ask} {' '.join(question.history)}")
    lines += ["", *(asks if question.ask else _question(judgement)[:-1])]
    rows = _rows(judgement)
    table = _aligned(rows[: _MOST_ROWS + 1], 1 + len(_columns(index)), _count_text_columns(judgement))
    lines += ["", *_parents(index)[:3], "", *table]
    if len(rows) > _MOST_ROWS + 1:
        lines.append(f"and {len(rows) - _MOST_ROWS - 1} more, on the page and in comparisons.csv")
    lines += ["", *_wrapped(_legend(judgement))]
    if len(judgement.settings) <= 2:  # with more, a column of the table has the verdicts in signs
        lines += [line for setting in judgement.settings for line in _wrapped(judgement.headlines[setting])]
    lines += ["", *_wrapped(f"Cost: {cost_sentence(judgement)}")]
    return _ascii("\n".join(lines)) + "\n"


def _answer(judgement: Judgement) -> list[str]:
    """The answer, and the one warning about all of it."""
    return [*_wrapped(judgement.answer), *_wrapped(judgement.caution)]


def text_versus(comparison: StudyComparison) -> str:
    """The comparison of two studies for a terminal: verdicts side by side, and how many agree."""
    names = [comparison.a.results.name, comparison.b.results.name]
    head = ["comparison", "equal", "A saves", "B saves", "A - B", "95% interval", "same"]
    rows = [head]
    for row in comparison.gaps:
        mean = row.difference
        saved = ["-" if v.difference is None else f"{v.difference:+.3f}" for v in (row.a, row.b)]
        difference = ["-" if mean.value is None else f"{mean.value:+.3f}"]
        difference.append("-" if mean.low is None else f"{mean.low:+.3f} to {mean.high:+.3f}")
        agree = {True: "yes", False: "no", None: "-"}[row.agree]
        rows.append([_ascii(row.name), BUDGETS[row.setting], *saved, *difference, agree])
    lines = [f"A: {names[0]}; B: {names[1]}. Loss saved by pruning, nats/token; A - B with its 95% interval.", ""]
    return _ascii("\n".join([*lines, *_aligned(rows, 2, 1), "", *_wrapped(comparison.answer)])) + "\n"


def _question(judgement: Judgement) -> list[str]:
    """The question with the verdicts that decide it, above all that is exploratory."""
    question = judgement.question
    lines = _wrapped(f"Question: {question.ask}") if question.ask else []
    lines += _wrapped(" ".join([*question.history, question.rule]))
    for _, text in question.verdicts[:_MOST_SENTENCES]:
        lines += _wrapped(text, indent="  ")
    if len(question.verdicts) > _MOST_SENTENCES:
        lines.append(f"  and {len(question.verdicts) - _MOST_SENTENCES} more, on the page and in comparisons.csv")
    for name, text in question.criteria:
        lines += _wrapped(f"{name} would be: {text}.")
    return [*lines, "", *([*_wrapped(f"Exploratory. {EXPLORATORY}"), ""] if question.ask else [])]


def _parents(index: Index) -> list[str]:
    lines = []
    for key, parent in index.parents.items():
        records = [record for record in index.results.parents if record.name == key]
        mean = mean_loss(records)
        name = f"Parent {key}" if len(index.parents) > 1 else "Parent"
        tokens = f"P = {count(parent.cost.tokens)} tokens" if parent.cost else "P unknown"
        text = f"{name}: {count(parent.parameters)} parameters, {tokens}, held-out loss {loss(mean)}"
        if mean is not None:
            text += " nats/token" + (f", the mean of {len(records)} seeds" if len(records) > 1 else "")
        lines += _wrapped(text)
    return lines


def _columns(index: Index) -> list[tuple[str, Any]]:
    """Columns that identify a comparison: heading and getter. Constant columns are left out, except the target."""
    groups = index.comparisons
    ratios = all(target_words(group.target).startswith("at ratio") for group in groups)
    columns: list[tuple[str, Any]] = [("ratio" if ratios else "target", lambda group: group.target)]
    optional = (
        ("parent", lambda group: group.parent),
        ("R", lambda group: count(group.retrain_tokens).replace("\u00a0", "")),
        ("objective", lambda group: group.objective or "LM"),
    )
    return columns + [(head, read) for head, read in optional if len({read(group) for group in groups}) > 1]


def _count_text_columns(judgement: Judgement) -> int:
    """The number of columns at the right that hold words instead of numbers."""
    return len(judgement.settings) if len(judgement.settings) <= 2 else 1


def _has_before(judgement: Judgement) -> bool:
    """Whether the table has room for the losses before retraining."""
    return len(_columns(judgement.index)) + len(judgement.settings) <= 7


def _rows(judgement: Judgement) -> list[list[str]]:
    index, settings = judgement.index, judgement.settings
    columns = _columns(index)
    names = [PRUNED, *(SCRATCH[setting] for setting in settings)]
    winners: dict[tuple[Group, Setting], Winner] = {
        (verdict.group, verdict.setting): verdict.winner for verdict in judgement.verdicts
    }
    in_words = len(settings) <= 2
    heads = [f"equal {BUDGETS[s].removesuffix(' tokens')}" for s in settings] if in_words else ["verdicts"]
    early = ["before"] if _has_before(judgement) else []
    rows = [["method", *(head for head, _ in columns), *early, *names, *heads]]
    for group in index.comparisons:
        losses = [_mean(index.pruned_over_seeds(group))] * len(early)
        losses += [_mean(index.over_seeds(group, name)) for name in names]
        row: list[Winner | None] = [winners.get((group, setting)) for setting in settings]
        verdicts = [winner or "-" for winner in row]
        verdicts = verdicts if in_words else ["".join(_SIGNS.get(verdict, "-") for verdict in verdicts)]
        rows.append([group.method, *(read(group) for _, read in columns), *losses, *verdicts])
    for group, cells in continued_parents(index).items():
        losses = [_mean(index.parents_over_seeds(group))] * len(early) + [_mean(cells)]
        values = ["-", *(read(group) for _, read in columns[1:]), *losses]  # the parent has no target
        rows.append([CONTINUED, *values, *["-"] * (len(rows[0]) - 1 - len(values))])
    return rows


def _mean(records: Sequence[Cell | Parent | PrunedModel | None]) -> str:
    """The mean over seeds; a star if some are missing."""
    measured = [record for record in records if record and record.evaluation]
    mean = mean_loss(measured)
    return "-" if mean is None else loss(mean) + ("*" if len(measured) < len(records) else "")


def _legend(judgement: Judgement) -> str:
    """The explanation of the table's columns."""
    index, settings = judgement.index, judgement.settings
    budgets = sorted({group.retrain_tokens for group in index.groups})
    tokens = {parent.cost.tokens if parent.cost else None for parent in index.results.parents}
    budget = f" = {count(budgets[0])} tokens" if len(budgets) == 1 else " tokens"
    parent_tokens = tokens.pop() if len(tokens) == 1 and len(budgets) == 1 else None
    runs = dict(_RUNS)
    if parent_tokens is not None:
        runs["S_{P+R}"] = f"on P+R = {count(parent_tokens + budgets[0])} tokens"
    names = [SCRATCH[setting] for setting in settings]
    parts = [
        "Held-out loss in nats/token" + (", means over seeds." if index.several_seeds else "."),
        "before: pruned, not yet retrained." if _has_before(judgement) else "",
        f"P-R: pruned, then retrained on R{budget}.",
        f"{CONTINUED}: the parent itself, trained on the same tokens." if continued_parents(index) else "",
    ]
    if names:
        texts = ", and ".join([", ".join(runs[name] for name in names[:-1]), runs[names[-1]]][len(names) == 1 :])
        parts.append(f"{', '.join(names)}: the same architecture from scratch {texts}.")
        parts += learning_notes(index)
        parts.append(_verdict_columns(settings))
    planned = len(judgement.verdicts) == len(settings) * len(index.comparisons)
    absent = "" if planned else ", or not in the study"
    star = "; a star: the mean over the seeds measured" if index.several_seeds else ""
    return " ".join([*filter(None, parts), f"A dash: not measured{absent}{star}."])


def _verdict_columns(settings: Sequence[Setting]) -> str:
    ways = [f"at equal {BUDGETS[setting]} (P-R against {SCRATCH[setting]})" for setting in settings]
    if len(settings) <= 2:
        columns = "columns say" if len(settings) == 2 else "column says"
        return f"The last {columns} which run has the lower loss {join_words(ways)}."
    return (
        f"The last column says which run has the lower loss, P (pruned) or S (scratch), = (equal within the margin) "
        f"or ~ (undecided), "
        f"{join_words(ways)}."
    )


def _aligned(rows: list[list[str]], names: int, words: int) -> list[str]:
    """Align columns two spaces apart: numbers right, the first and the last ``words`` columns left.

    If lines are too long, the first ``names`` columns are cut, the widest first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > _WIDTH and max(widths[:names]) > 5:
        widths[widths.index(max(widths[:names]))] -= 1
    lines = []
    for row in rows:
        left_aligned = {0, *range(len(row) - words, len(row))}
        texts = [t if len(t) <= w else t[: w - 2] + ".." for t, w in zip(row, widths, strict=True)]
        padded = [
            t.ljust(w) if i in left_aligned else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _findings(judgement: Judgement) -> list[str]:
    """The paper's findings, if the study tests any besides the first."""
    if {finding.key for finding in judgement.findings} <= {"equal-tokens"}:
        return []
    lines = ["", "Do the findings of arXiv:2606.14150 hold here?"]
    for finding in judgement.findings:
        lines += _wrapped(f"{finding.claim} ({finding.measured_as})", indent="  ")
        for row in finding.rows:
            lines += _wrapped(finding_sentence(row, judgement.index.comparisons), indent="    ")
    return lines


def _regime(judgement: Judgement) -> list[str]:
    lines = ["", REGIME_TITLE] if judgement.regimes else []
    for regime in judgement.regimes:
        for text in regime_sentences(regime, len(judgement.regimes) > 1):
            lines += _wrapped(text, indent="  ")
    return lines


def _sweeps(index: Index) -> list[str]:
    """How learning rates were chosen, with a warning where the best one is at the end of a sweep."""
    lines = [line for text in sweep_sentences(index) for line in _wrapped(text)]
    edges = edge_sentences(index)
    for text in edges[:_MOST_SENTENCES]:
        lines += _wrapped(text, indent="  ")
    lines += [f"  and {len(edges) - _MOST_SENTENCES} more, on the page"] if len(edges) > _MOST_SENTENCES else []
    return ["", f"{SWEEPS_TITLE}", *lines] if lines else []


def _controls(judgement: Judgement) -> list[str]:
    index = judgement.index
    rows = [(group, group_parts) for group in index.comparisons if (group_parts := judgement.parts(group))]
    lines = ["", "What is inherited, by controls at equal training tokens"] if rows else []
    for group, group_parts in rows[:_MOST_CONTROLS]:
        lines += _wrapped(group_name(group, index.comparisons, target=True), indent="  ")
        for part in group_parts:
            lines += _wrapped(part_sentence(part), indent="    ")
    return lines + ([f"  and {len(rows) - _MOST_CONTROLS} more, on the page"] if len(rows) > _MOST_CONTROLS else [])


def _objectives(index: Index) -> list[str]:
    return _sentences("Training objectives compared, P-R only", map(objective_sentence, objective_rows(index)))


def _steps(index: Index) -> list[str]:
    title = "Pruning in steps with recovery between, at equal tokens, P-R only"
    return _sentences(title, map(steps_sentence, steps_rows(index)))


def _sentences(title: str, sentences: Iterable[str]) -> list[str]:
    """A title with the first sentences below it, and the number of the others; nothing without any."""
    sentences = list(sentences)
    lines = ["", title] if sentences else []
    for sentence in sentences[:_MOST_SENTENCES]:
        lines += _wrapped(sentence, indent="  ")
    more = len(sentences) - _MOST_SENTENCES
    return lines + ([f"  and {more} more, on the page"] if more > 0 else [])


def _forecasts(judgement: Judgement) -> list[str]:
    """For each ladder: crossovers with the parent sunk and charged, and losses at a larger budget."""
    forecasts, unfitted, laws = judgement.forecasts.fitted, judgement.forecasts.unfitted, judgement.laws
    if not (forecasts or unfitted or laws):
        return []
    lines = ["", "Forecasts, by curves fitted to finished runs, with 95% intervals"]
    for forecast in forecasts[:_MOST_SENTENCES]:
        lines += _wrapped(forecast.name, indent="  ")
        outlooks = [o for o in forecast.outlooks if o.allowance.account in ("training", "total-flops")]
        for text in (*map(outlook_sentence, outlooks), further_sentence(forecast), next_sentence(forecast)):
            lines += _wrapped(text, indent="    ")
    if len(forecasts) > _MOST_SENTENCES:
        lines.append(f"  and {len(forecasts) - _MOST_SENTENCES} more, on the page and in forecasts.csv")
    for reason in unfitted[:_MOST_SENTENCES]:
        lines += _wrapped(f"No forecast for {reason}.", indent="  ")
    for fitted in laws:
        if fitted.law and fitted.left_out_error is not None:
            lines += _wrapped(
                f"{fitted.name}, one law across ratios (arXiv:2411.10272): RMS error {loss(fitted.law.error)} nats on "
                f"the runs that it was fitted to, {loss(fitted.left_out_error)} on a ratio that was left out.",
                indent="  ",
            )
    return lines


def _ranking(judgement: Judgement) -> list[str]:
    """The runs of lowest loss with their FLOPs under each account; a run of several comparisons is listed once."""
    index = judgement.index
    pairs = sorted(
        ((cell, row) for cell, row in zip(index.results.cells, cell_rows(judgement), strict=True) if cell.evaluation),
        key=lambda pair: pair[1]["loss"],
    )
    by_run: dict[tuple[Any, ...], list[str]] = {}
    for cell, row in pairs:
        group = group_of(cell)
        flops = [row[f"{account}_flops"] for account in ACCOUNTS]
        key = (cell.name, group.model, cell.seed, row["loss"], *flops)
        stars = ["*" if account in row["best_for"].split() else " " for account in ACCOUNTS]
        costs = ["- " if value is None else f"{value:.2e}{star}" for value, star in zip(flops, stars, strict=True)]
        if cell.init == CONTINUED:
            key = (cell.name, run_subject(index, cell), row["loss"])
        name = f"{cell.name}, {run_subject(index, cell)}"
        by_run.setdefault(key, [_ascii(name), loss(row["loss"]), *costs])
    rows = list(by_run.values())[:_MOST_RANKS]
    if not rows:
        return []
    lines = ["", "Lowest losses, and FLOPs with the parent under three accounts", ""]
    lines += _aligned([["run", "loss", *(f"{account} " for account in ACCOUNTS)], *rows], 1, 0)
    notes = "; ".join(f"{account}: {text}" for account, text in ACCOUNTS.items())
    return [
        *lines,
        *_wrapped(
            f"{notes}. A star: no run of the same target is decidedly better for as few FLOPs. "
            f"{plural(len(by_run), 'run')} in all; cells.csv has the rest."
        ),
    ]


def _flop_line(judgement: Judgement) -> str:
    if "total" not in judgement.settings:
        return ""
    ratios = [verdict.flop_ratio for verdict, _ in judgement.verdicts_in("total") if verdict.flop_ratio is not None]
    if not ratios:
        return ""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    span = low if low == high else f"{low} to {high}"
    return (
        f"Equal tokens is not equal compute: at equal total tokens, the pruned pipeline (the parent's pretraining, "
        f"scoring and retraining) costs {span} times the FLOPs of training from scratch."
    )


def _wrapped(text: str, indent: str = "") -> list[str]:
    further = indent + ("  " if indent else "")
    return textwrap.wrap(_ascii(text), _WIDTH, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)


def _ascii(text: str) -> str:
    text = re.sub(
        "[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+", lambda match: f"^{int(match[0].translate(_DIGITS))}", text
    )
    return text.replace("\u00a0", " ").replace(MINUS, "-").replace(TIMES, "x")
