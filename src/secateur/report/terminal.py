"""The study for a terminal: plain ASCII, at most 100 columns, ending with the verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from secateur.comparison.ablation import parts
from secateur.comparison.index import PRUNED, Group, Index, group_of
from secateur.comparison.ledger import ACCOUNTS
from secateur.comparison.naming import BUDGETS, group_name, target_words
from secateur.comparison.objectives import objective_rows
from secateur.comparison.records import Cell, Evaluation, Parent
from secateur.comparison.twins import SCRATCH, Setting, Winner
from secateur.formatting import MINUS, TIMES, count, join_words, loss
from secateur.report.forecast_prose import further_sentence, misfit_sentence, next_sentence, outlook_sentence
from secateur.report.judgement import Judgement
from secateur.report.prose import brief
from secateur.report.studies import StudyComparison
from secateur.report.tables import cell_rows

__all__ = ["POOLED_NOTE", "text_table", "text_versus"]

_WIDTH = 100
_MOST_SENTENCES, _MOST_CONTROLS, _MOST_RANKS = 6, 2, 12  # what a terminal gets of each list

#: Shown wherever a verdict is over several seeds.
POOLED_NOTE = (
    "Verdicts are means over seeds; their intervals cover the held-out text and the seeds, drawn anew together. Few "
    "seeds show too little of their spread: with two, an interval bounds it from below."
)
_SIGNS: dict[Winner, str] = {"pruned": "P", "scratch": "S", "too close to call": "~", "not measured": "-"}
_UNPLANNED: Winner = "not measured"
_RUNS: dict[str, str] = {
    "S_R": "on R",
    "S_{P+R}": "on P+R",
    "S_F": "for as many FLOPs as scoring and retraining took (F)",
    "S_{P+F}": "for as many as these and the parent's pretraining took (P+F)",
}


def text_table(judgement: Judgement) -> str:
    """The whole text: parents, losses, verdicts, findings and, for larger studies, a ranking by loss and FLOPs."""
    index = judgement.index
    lines = [*_parents(judgement.results.parents), ""]
    lines += _aligned(_rows(judgement), 1 + len(_columns(index)), _words(judgement))
    lines += ["", *_wrapped(_legend(judgement))]
    for setting in judgement.settings:
        lines += ["", *_wrapped(judgement.headlines[setting])]
        pairs = judgement.of(setting)
        for _, text in pairs[:_MOST_SENTENCES]:
            lines += _wrapped(brief(text, setting), indent="  ")
        if len(pairs) > _MOST_SENTENCES:
            lines.append(f"  and {len(pairs) - _MOST_SENTENCES} more, on the page and in comparisons.csv")
    lines += ["", *_wrapped(POOLED_NOTE)] if index.several_seeds else []
    lines += _findings(judgement) + _inherited(index) + _objectives(index) + _forecasts(judgement)
    if len(index.pools) > len(index.models) or index.several_seeds or len(index.parents) > 1:
        lines += _ranking(judgement)
    ratios = _flop_line(judgement)
    lines += ["", *(_wrapped(ratios) if ratios else []), *_wrapped(judgement.answer)]
    return _ascii("\n".join(lines)) + "\n"


def text_versus(found: StudyComparison) -> str:
    """Two studies for a terminal: their verdicts side by side, and how far they agree."""
    names = [found.a.results.name, found.b.results.name]
    head = ["comparison", "equal", "A saves", "B saves", "A - B", "95% interval", "agree"]
    rows = [head]
    for row in found.gaps:
        mean = row.difference
        saved = ["-" if v.difference is None else f"{v.difference:+.3f}" for v in (row.a, row.b)]
        told = [f"{mean.value:+.3f}", f"{mean.low:+.3f} to {mean.high:+.3f}"] if mean else ["-", "-"]
        agree = {True: "yes", False: "no", None: "-"}[row.agree]
        rows.append([_ascii(row.name), BUDGETS[row.setting], *saved, *told, agree])
    lines = [f"A: {names[0]}; B: {names[1]}. What pruning saves, nats/token; A - B with its 95% interval.", ""]
    return _ascii("\n".join([*lines, *_aligned(rows, 2, 1), "", *_wrapped(found.answer)])) + "\n"


def _parents(parents: Sequence[Parent]) -> list[str]:
    lines = []
    for parent in parents:
        name = f"Parent {parent.name}" if len(parents) > 1 else "Parent"
        tokens = f"P = {count(parent.cost.tokens)} tokens" if parent.cost else "P unknown"
        told = (
            f"{name}: {count(parent.parameters)} parameters, {tokens}, held-out loss {loss(_loss(parent.evaluation))}"
        )
        lines += _wrapped(told + (" nats/token" if parent.evaluation else ""))
    return lines


def _columns(index: Index) -> list[tuple[str, Any]]:
    """What tells the comparisons apart: a heading and how it is read off a group; the target always."""
    groups = index.comparisons
    ratios = all(target_words(group.target).startswith("at ratio") for group in groups)
    columns: list[tuple[str, Any]] = [("ratio" if ratios else "target", lambda group: group.target)]
    optional = (
        ("parent", lambda group: group.parent),
        ("R", lambda group: count(group.retrain_tokens).replace("\u00a0", "")),
        ("objective", lambda group: group.objective or "LM"),
    )
    return columns + [(head, read) for head, read in optional if len({read(group) for group in groups}) > 1]


def _words(judgement: Judgement) -> int:
    """How many of the last columns hold words."""
    return len(judgement.settings) if len(judgement.settings) <= 2 else 1


def _has_before(judgement: Judgement) -> bool:
    """Whether there is room for the losses before retraining; the page has them in any case."""
    return len(_columns(judgement.index)) + len(judgement.settings) <= 7


def _rows(judgement: Judgement) -> list[list[str]]:
    index, settings = judgement.index, judgement.settings
    columns = _columns(index)
    names = [PRUNED, *(SCRATCH[setting] for setting in settings)]
    winners: dict[tuple[Group, Setting], Winner] = {
        (verdict.group, verdict.setting): verdict.winner for verdict in judgement.verdicts
    }
    spelled = len(settings) <= 2
    heads = [f"equal {BUDGETS[s].removesuffix(' tokens')}" for s in settings] if spelled else ["verdicts"]
    early = ["before"] if _has_before(judgement) else []
    rows = [["method", *(head for head, _ in columns), *early, *names, *heads]]
    for group in index.comparisons:
        pruned = index.pruned.get(group.model)
        before = _loss(pruned.evaluation) if pruned else None
        shown = ["-" if before is None else loss(before)] * len(early)
        shown += [_mean(index.over_seeds(group, name)) for name in names]
        found: list[Winner] = [winners.get((group, setting), _UNPLANNED) for setting in settings]
        verdicts = [str(winner) for winner in found] if spelled else ["".join(_SIGNS[winner] for winner in found)]
        rows.append([group.method, *(read(group) for _, read in columns), *shown, *verdicts])
    return rows


def _loss(evaluation: Evaluation | None) -> float | None:
    return evaluation.loss if evaluation else None


def _mean(cells: Sequence[Cell | None]) -> str:
    """The mean over seeds; a star where some of them are missing."""
    losses = [cell.evaluation.loss for cell in cells if cell and cell.evaluation]
    if not losses:
        return "-"
    return loss(sum(losses) / len(losses)) + ("*" if len(losses) < len(cells) else "")


def _legend(judgement: Judgement) -> str:
    """What the table's columns are."""
    index, settings = judgement.index, judgement.settings
    budgets = sorted({group.retrain_tokens for group in index.groups})
    tokens = {parent.cost.tokens if parent.cost else None for parent in index.results.parents}
    known = f" = {count(budgets[0])} tokens" if len(budgets) == 1 else " tokens"
    both = tokens.pop() if len(tokens) == 1 and len(budgets) == 1 else None
    runs = dict(_RUNS)
    if both is not None:
        runs["S_{P+R}"] = f"on P+R = {count(both + budgets[0])} tokens"
    names = [SCRATCH[setting] for setting in settings]
    parts = [
        "Held-out loss in nats/token" + (", means over seeds." if index.several_seeds else "."),
        "before: pruned, not yet retrained." if _has_before(judgement) else "",
        f"P-R: pruned, then retrained on R{known}.",
    ]
    if names:
        told = ", and ".join([", ".join(runs[name] for name in names[:-1]), runs[names[-1]]][len(names) == 1 :])
        parts.append(f"{', '.join(names)}: the same architecture from scratch {told}.")
        parts.append(_verdict_columns(settings))
    planned = len(judgement.verdicts) == len(settings) * len(index.comparisons)
    absent = "" if planned else ", or not in the study"
    star = "; a star: a mean of those seeds that were" if index.several_seeds else ""
    return " ".join([*filter(None, parts), f"A dash: not measured{absent}{star}."])


def _verdict_columns(settings: Sequence[Setting]) -> str:
    ways = [f"at equal {BUDGETS[setting]} (P-R against {SCRATCH[setting]})" for setting in settings]
    if len(settings) <= 2:
        which = "columns say" if len(settings) == 2 else "column says"
        return f"The last {which} which has the lower loss {join_words(ways)}."
    return (
        f"The last column says which has the lower loss, P (pruned), S (scratch) or ~ (too close), {join_words(ways)}."
    )


def _aligned(rows: list[list[str]], names: int, words: int) -> list[str]:
    """Columns two spaces apart, figures to the right, words to the left.

    The first ``names`` columns give way where a line would be too long, the widest first; the last ``words`` are words.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > _WIDTH and max(widths[:names]) > 5:
        widths[widths.index(max(widths[:names]))] -= 1
    lines = []
    for row in rows:
        left = {0, *range(len(row) - words, len(row))}
        texts = [t if len(t) <= w else t[: w - 2] + ".." for t, w in zip(row, widths, strict=True)]
        padded = [t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _findings(judgement: Judgement) -> list[str]:
    """The paper's findings, where the study has more than one R, ratio or granularity to speak to them."""
    if {finding.key for finding in judgement.findings} <= {"equal-tokens"}:
        return []
    lines = ["", "Do the findings of arXiv:2606.14150 hold here?"]
    for finding in judgement.findings:
        lines += _wrapped(f"{finding.claim} ({finding.measured_as})", indent="  ")
        for row in finding.rows:
            lines += _wrapped(row.sentence, indent="    ")
    return lines


def _inherited(index: Index) -> list[str]:
    """The controls of the first comparisons that have some."""
    told = [(group, found) for group in index.comparisons if (found := parts(index, group))]
    lines = ["", "What is inherited, by controls at equal training tokens"] if told else []
    for group, found in told[:_MOST_CONTROLS]:
        lines += _wrapped(group_name(group, index.comparisons, target=True), indent="  ")
        for part in found:
            lines += _wrapped(part.sentence, indent="    ")
    return lines + ([f"  and {len(told) - _MOST_CONTROLS} more, on the page"] if len(told) > _MOST_CONTROLS else [])


def _objectives(index: Index) -> list[str]:
    """One objective against another, pruned runs alone."""
    rows = objective_rows(index)
    lines = ["", "One objective against another, P-R alone"] if rows else []
    for row in rows[:_MOST_SENTENCES]:
        lines += _wrapped(row.sentence, indent="  ")
    return lines + ([f"  and {len(rows) - _MOST_SENTENCES} more, on the page"] if len(rows) > _MOST_SENTENCES else [])


def _forecasts(judgement: Judgement) -> list[str]:
    """Each ladder: where its curves meet, with the parent sunk and charged, and the losses at a budget not run."""
    found = judgement.forecasts.found
    lines = ["", "Forecasts, by curves fitted to finished runs, with 95% intervals"] if found or judgement.laws else []
    for one in found[:_MOST_SENTENCES]:
        lines += _wrapped(one.name, indent="  ")
        told = [o for o in one.outlooks if o.allowance.account in ("training", "total-flops")]
        sentences = [misfit_sentence(one), *map(outlook_sentence, told), further_sentence(one), next_sentence(one)]
        for text in filter(None, sentences):
            lines += _wrapped(text, indent="    ")
    if len(found) > _MOST_SENTENCES:
        lines.append(f"  and {len(found) - _MOST_SENTENCES} more, on the page and in forecasts.csv")
    for one in judgement.laws:
        if one.law and one.left_out_error is not None:
            lines += _wrapped(
                f"{one.name}, one law across ratios (arXiv:2411.10272): off by {loss(one.law.error)} nats on its own "
                f"runs, by {loss(one.left_out_error)} on a ratio that was left out.",
                indent="  ",
            )
    return lines


def _ranking(judgement: Judgement) -> list[str]:
    """The runs of lowest loss, with their FLOPs under each account; a run of several comparisons is named once."""
    index = judgement.index
    pairs = sorted(
        ((cell, row) for cell, row in zip(index.results.cells, cell_rows(judgement), strict=True) if cell.evaluation),
        key=lambda pair: pair[1]["loss"],
    )
    shown: dict[tuple[Any, ...], list[str]] = {}
    for cell, row in pairs:
        group = group_of(cell)
        flops = [row[f"{account}_flops"] for account in ACCOUNTS]
        key = (cell.name, group.model, cell.seed, row["loss"], *flops)
        stars = ["*" if account in row["best_for"].split() else " " for account in ACCOUNTS]
        told = ["- " if value is None else f"{value:.2e}{star}" for value, star in zip(flops, stars, strict=True)]
        name = f"{cell.name}, {group_name(group, index.groups, target=True)}"
        shown.setdefault(key, [_ascii(name), loss(row["loss"]), *told])
    rows = list(shown.values())[:_MOST_RANKS]
    if not rows:
        return []
    lines = ["", "Lowest losses, and the FLOPs that they took with the parent under three accounts", ""]
    lines += _aligned([["run", "loss", *(f"{account} " for account in ACCOUNTS)], *rows], 1, 0)
    notes = "; ".join(f"{account}: {text}" for account, text in ACCOUNTS.items())
    return [
        *lines,
        *_wrapped(
            f"{notes}. A star: no run of that target has a lower loss for as few FLOPs. "
            f"{len(shown)} runs in all; cells.csv has the rest."
        ),
    ]


def _flop_line(judgement: Judgement) -> str:
    if "total" not in judgement.settings:
        return ""
    found = [verdict.flop_ratio for verdict, _ in judgement.of("total") if verdict.flop_ratio is not None]
    if not found:
        return ""
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    span = low if low == high else f"{low} to {high}"
    return (
        f"Equal tokens is not equal compute: at equal total tokens the pruned pipeline costs {span} times the FLOPs "
        "of training from scratch, the parent's pretraining and the scoring counted."
    )


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        _ascii(text), _WIDTH, initial_indent=indent, subsequent_indent=indent + ("  " if indent else "")
    )


def _ascii(text: str) -> str:
    return text.replace("\u00a0", " ").replace(MINUS, "-").replace(TIMES, "x")
