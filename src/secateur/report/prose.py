"""Verdicts in plain English, computed and never written by hand. ASCII, but for the minus sign."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.comparison.index import Group
from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.quality import QualityRow
from secateur.comparison.twins import Setting, Verdict, Winner
from secateur.formatting import decimals, join_words, number, points, spelled

__all__ = [
    "answer",
    "brief",
    "contradiction",
    "headline",
    "interval",
    "sentence",
]

_MOST_NAMES = 3  # a headline that lists more than these is no headline: it counts instead


def interval(low: float, high: float, digits: int) -> str:
    """``"95% interval 0.43 to 0.47"``."""
    return f"95% interval {number(low, digits)} to {number(high, digits)}"


def sentence(verdict: Verdict, among: Sequence[Group]) -> str:
    """One verdict as one sentence."""
    start = f"{_at(verdict.setting)}, {group_name(verdict.group, among, target=True)}"
    difference, low, high = verdict.difference, verdict.low, verdict.high
    if difference is None or low is None or high is None:
        return f"{start} is not measured: {verdict.reason}."
    over = _over(verdict)
    twin = "its from-scratch twins" if over else "its from-scratch twin"
    digits = decimals(difference, low, high)
    if verdict.winner == "too close to call":
        return (
            f"{start} cannot be told from {twin} (difference {number(difference, digits)} nats{over}, "
            f"{interval(low, high, digits)}): too close to call."
        )
    near, far = sorted((abs(low), abs(high)))
    side, end = ("below", "pruning pays") if verdict.winner == "pruned" else ("above", "training from scratch pays")
    by = f"{number(abs(difference), digits)} nats {side} {twin}{over}"
    return f"{start} ends {by} ({interval(near, far, digits)}): {end}."


def contradiction(verdict: Verdict, row: QualityRow, among: Sequence[Group]) -> str:
    """A verdict by the held-out loss beside one by tasks that says the opposite."""
    found = row.comparison
    assert found.difference is not None and found.low is not None and found.high is not None
    paths = {"pruned": "pruning", "scratch": "training from scratch"}
    sign = 1 if row.winner == "pruned" else -1
    low, high = sorted((sign * found.low, sign * found.high))
    return (
        f"{_at(verdict.setting)}, {group_name(verdict.group, among, target=True)}: the held-out loss speaks for "
        f"{paths[verdict.winner]}, the accuracy ({found.name}) for {paths[row.winner]}, by "
        f"{points(sign * found.difference)} points (95% interval {points(low)} to {points(high)})."
    )


def _over(verdict: Verdict) -> str:
    """What a pooled verdict is the mean of."""
    if verdict.planned == 1:
        return ""
    if verdict.seeds == verdict.planned:
        return f" on average over {spelled(verdict.seeds)} seeds"
    return f" on average over {spelled(verdict.seeds)} of {spelled(verdict.planned)} seeds"


def _at(setting: Setting) -> str:
    return f"At equal {BUDGETS[setting]}"


def brief(text: str, setting: Setting) -> str:
    """A sentence without the setting that opens it, for where the setting is plain already."""
    return text.removeprefix(f"{_at(setting)}, ")


def headline(verdicts: Sequence[Verdict]) -> str:
    """All verdicts of one setting in one sentence; ``verdicts`` must not be empty and must share their setting."""
    among = [verdict.group for verdict in verdicts]
    start = _at(verdicts[0].setting)
    phrases: tuple[tuple[Winner, str, str], ...] = (
        ("pruned", "pruning wins for {}", "pruning wins for {}"),
        ("scratch", "training from scratch wins for {}", "training from scratch wins for {}"),
        ("too close to call", "{} is too close to call", "{} are too close to call"),
        ("not measured", "{} is not measured", "{} are not measured"),
    )
    parts = []
    for winner, one, many in phrases:
        found = [verdict.group for verdict in verdicts if verdict.winner == winner]
        if found:
            parts.append((one if len(found) == 1 else many).format(_who(found, among)))
    return f"{start}, {'; '.join(parts)}."


def _who(found: Sequence[Group], among: Sequence[Group]) -> str:
    noun = "comparisons" if _several(among) else "methods"
    if len(found) == len(among) > 1:
        return f"{'both' if len(found) == 2 else 'all ' + spelled(len(found))} {noun}"
    if len(found) > _MOST_NAMES:
        return f"{len(found)} of {len(among)} {noun}"
    return join_words([group_name(group, among) for group in found])


def _several(groups: Sequence[Group]) -> bool:
    """Whether comparisons differ in more than their method."""
    return len({(g.parent, g.target, g.retrain_tokens, g.objective, g.seed) for g in groups}) > 1


def answer(verdicts: Sequence[Verdict]) -> str:
    """The study's answer, from the verdicts of all settings: in tokens, then in FLOPs where it has such settings."""
    note = ", as far as it was measured" if any(verdict.winner == "not measured" for verdict in verdicts) else ""
    noun = "comparison" if _several([verdict.group for verdict in verdicts]) else "method"
    texts = []
    for training, total, counted in (("training", "total", "tokens"), ("training-flops", "total-flops", "FLOPs")):
        free, charged = (_lean([v for v in verdicts if v.setting == setting]) for setting in (training, total))
        text = _advice(free, charged, counted, noun)
        if text and counted == "FLOPs":
            text = f"Counted in FLOPs: {text[0].lower()}{text[1:]}"
        texts += [f"{text}{note}."] if text else []
    return " ".join(texts) or "There is no answer yet: no comparison has been measured."


def _advice(free: str, charged: str, counted: str, noun: str) -> str:
    """What to do with the parent at no cost, and charged, its cost being ``counted`` so; empty where nobody knows."""
    clauses = {
        "pruned": "prune",
        "scratch": "train from scratch",
        "too close to call": "the two paths are too close to call",
        "pruned or tie": "pruning wins or is too close to call",
        "scratch or tie": "training from scratch wins or is too close to call",
        "mixed": f"it depends on the {noun}",
        "not measured": "there is no answer yet",
    }
    if {free, charged} <= {"", "not measured"}:
        return ""
    if free == charged and free in ("pruned", "scratch"):
        do = "Prune" if free == "pruned" else "Train from scratch"
        return f"{do}, whether or not the parent's {counted} are counted"
    parts = [f"if the parent is already there, {clauses[free]}"] if free else []
    parts += [f"if its {counted} count too, {clauses[charged]}"] if free and charged else []
    parts += [f"if the parent's {counted} count, {clauses[charged]}"] if charged and not free else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _lean(verdicts: Sequence[Verdict]) -> str:
    """Where the verdicts of one setting point together: a key of the clauses above, or empty without any verdict."""
    winners = {verdict.winner for verdict in verdicts} - {"not measured"}
    decided = winners - {"too close to call"}
    if not winners:
        return "not measured" if verdicts else ""
    if len(decided) == 1:
        return decided.pop() + (" or tie" if len(winners) > 1 else "")
    return "mixed" if decided else "too close to call"
