"""Verdicts in plain English, computed and never written by hand. ASCII, but for the minus sign."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.report.compare import Group, Setting, Verdict, Winner
from secateur.report.words import decimals, listing, method_name, number, spelled

__all__ = ["answer", "brief", "group_name", "headline", "sentence"]

_AT: dict[Setting, str] = {"training": "At equal training tokens", "total": "At equal total tokens"}
_MOST_NAMES = 3  # a headline that lists more than these is no headline: it counts instead


def group_name(group: Group, among: Sequence[Group], *, ratio: bool = False) -> str:
    """The shortest name that tells ``group`` from the others; ``ratio`` names the ratio even where there is but one."""
    name = method_name(group.method)
    if ratio or len({other.ratio for other in among}) > 1:
        name += f" at ratio {group.ratio:g}"
    if len({other.seed for other in among}) > 1:
        name += f" (seed {group.seed})"
    return name


def sentence(verdict: Verdict, among: Sequence[Group]) -> str:
    """One verdict as one sentence."""
    start = f"{_AT[verdict.setting]}, {group_name(verdict.group, among, ratio=True)}"
    difference, low, high = verdict.difference, verdict.low, verdict.high
    if difference is None or low is None or high is None:
        return f"{start} is not measured: {verdict.reason}."
    digits = decimals(difference, low, high)
    if verdict.winner == "too close to call":
        span = f"{number(low, digits)} to {number(high, digits)}"
        return (
            f"{start} cannot be told from its from-scratch twin (difference {number(difference, digits)} nats, "
            f"95% interval {span}): too close to call."
        )
    near, far = sorted((abs(low), abs(high)))
    side, end = ("below", "pruning pays") if verdict.winner == "pruned" else ("above", "training from scratch pays")
    return (
        f"{start} ends {number(abs(difference), digits)} nats {side} its from-scratch twin "
        f"(95% interval {number(near, digits)} to {number(far, digits)}): {end}."
    )


def brief(text: str, setting: Setting) -> str:
    """A sentence without the setting that opens it, for where the setting is plain already."""
    return text.removeprefix(f"{_AT[setting]}, ")


def headline(verdicts: Sequence[Verdict]) -> str:
    """All verdicts of one setting in one sentence; ``verdicts`` must not be empty and must share their setting."""
    among = [verdict.group for verdict in verdicts]
    start = _AT[verdicts[0].setting]
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
    single = len({(group.ratio, group.seed) for group in among}) == 1
    noun = "methods" if single else "comparisons"
    if len(found) == len(among) > 1:
        return f"{'both' if len(found) == 2 else 'all ' + spelled(len(found))} {noun}"
    if len(found) > _MOST_NAMES:
        return f"{len(found)} of {len(among)} {noun}"
    return listing([group_name(group, among) for group in found])


def answer(verdicts: Sequence[Verdict]) -> str:
    """The study's answer in one sentence, from the verdicts of both settings."""
    training, total = (_lean([v for v in verdicts if v.setting == setting]) for setting in ("training", "total"))
    partly = any(verdict.winner == "not measured" for verdict in verdicts)
    if training == total == "not measured":
        return "There is no answer yet: no comparison has been measured."
    note = ", as far as it was measured" if partly else ""
    if training == total and training in ("pruned", "scratch"):
        do = "Prune" if training == "pruned" else "Train from scratch"
        return f"{do}, whether or not the parent's tokens are counted{note}."
    several = len({(verdict.group.ratio, verdict.group.seed) for verdict in verdicts}) > 1
    clauses = {
        "pruned": "prune",
        "scratch": "train from scratch",
        "too close to call": "the two paths are too close to call",
        "pruned or tie": "pruning wins or is too close to call",
        "scratch or tie": "training from scratch wins or is too close to call",
        "mixed": f"it depends on the {'comparison' if several else 'method'}",
        "not measured": "there is no answer yet",
    }
    return f"If the parent is already there, {clauses[training]}; if its tokens count too, {clauses[total]}{note}."


def _lean(verdicts: Sequence[Verdict]) -> str:
    """Where the measured verdicts of one setting point together: a key of the clauses above."""
    winners = {verdict.winner for verdict in verdicts} - {"not measured"}
    decided = winners - {"too close to call"}
    if not winners:
        return "not measured"
    if len(decided) == 1:
        return decided.pop() + (" or tie" if len(winners) > 1 else "")
    return "mixed" if decided else "too close to call"
