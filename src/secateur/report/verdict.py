"""What the study says: verdicts, the sentences that state them, and the table for the terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from secateur.report.compare import (
    SCRATCH,
    SETTINGS,
    Group,
    Setting,
    Verdict,
    Winner,
    bootstrap_interval,
    compare,
    groups,
)
from secateur.report.results import Evaluation, Results
from secateur.report.sentences import answer, brief, headline, sentence
from secateur.report.words import MINUS, TIMES, count, loss

__all__ = ["Group", "Judgement", "Setting", "Verdict", "Winner", "bootstrap_interval", "judge", "text_table"]

_WIDTH = 100


@dataclass(frozen=True)
class Judgement:
    """Every verdict of a study and what they say together."""

    verdicts: tuple[Verdict, ...]  #: all at equal training tokens, then all at equal total tokens
    sentences: tuple[str, ...]  #: one for each verdict
    headlines: dict[Setting, str]  #: one for each setting
    answer: str

    def of(self, setting: Setting) -> list[tuple[Verdict, str]]:
        """The verdicts of one setting with their sentences."""
        pairs = zip(self.verdicts, self.sentences, strict=True)
        return [(verdict, text) for verdict, text in pairs if verdict.setting == setting]


def judge(results: Results) -> Judgement:
    """Compare every pruned run with its from-scratch twins. A pure function: the same results, the same judgement."""
    verdicts = compare(results)
    among = groups(results)
    headlines: dict[Setting, str] = {}
    for setting in SETTINGS:
        chosen = [verdict for verdict in verdicts if verdict.setting == setting]
        headlines[setting] = headline(chosen) if chosen else f"At equal {setting} tokens, nothing was compared."
    return Judgement(verdicts, tuple(sentence(verdict, among) for verdict in verdicts), headlines, answer(verdicts))


def text_table(results: Results) -> str:
    """The study for a terminal: plain ASCII, at most 100 columns, ending with the verdicts."""
    judgement = judge(results)
    rows = _rows(results, judgement)
    parent = results.parent
    lines = [
        f"Parent: {count(parent.parameters)} parameters, P = {count(results.parent_tokens)} tokens, "
        f"held-out loss {loss(_loss(parent.evaluation))} nats/token",
        "",
        *_aligned(rows),
        "",
        *_wrapped(
            f"Held-out loss in nats/token. before: pruned, not yet retrained. P-R: pruned, then retrained on R = "
            f"{count(results.retrain_tokens)} tokens. S_R, S_{{P+R}}: the same architecture from scratch on R, and on "
            f"P+R = {count(results.parent_tokens + results.retrain_tokens)} tokens. "
            "The last columns say which has the lower loss at equal training tokens (P-R against S_R) and at equal "
            "total tokens (P-R against S_{P+R}). A dash: not measured."
        ),
    ]
    for setting in SETTINGS:
        lines += ["", *_wrapped(judgement.headlines[setting])]
        for _, text in judgement.of(setting):
            lines += _wrapped(brief(text, setting), indent="  ")
    ratios = _flop_line(judgement)
    lines += ["", *(_wrapped(ratios) if ratios else []), *_wrapped(judgement.answer)]
    return _ascii("\n".join(lines)) + "\n"


def _rows(results: Results, judgement: Judgement) -> list[list[str]]:
    among = groups(results)
    seeded = len({group.seed for group in among}) > 1
    before = {(pruned.method, pruned.ratio): _loss(pruned.evaluation) for pruned in results.pruned}
    cells = {(cell.method, cell.ratio, cell.seed, cell.name): _loss(cell.evaluation) for cell in results.cells}
    winners = {(verdict.group, verdict.setting): verdict.winner for verdict in judgement.verdicts}
    head = ["method", "ratio", *(["seed"] if seeded else []), "before", "P-R", "S_R", "S_{P+R}"]
    rows = [[*head, "equal training", "equal total"]]
    for group in among:
        losses = [before.get((group.method, group.ratio))]
        losses += [cells.get((group.method, group.ratio, group.seed, n)) for n in ("P-R", *SCRATCH.values())]
        seed = [str(group.seed)] if seeded else []
        shown = ["-" if value is None else loss(value) for value in losses]
        rows.append([group.method, f"{group.ratio:g}", *seed, *shown, *(winners[group, s] for s in SETTINGS)])
    return rows


def _loss(evaluation: Evaluation | None) -> float | None:
    return evaluation.loss if evaluation else None


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart, figures to the right, words to the left; a long method name gives way."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for row in rows:
        words = {0, len(row) - 2, len(row) - 1}
        name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 2] + ".."
        texts = [name, *row[1:]]
        padded = [t.ljust(w) if i in words else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _flop_line(judgement: Judgement) -> str:
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
