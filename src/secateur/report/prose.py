"""Sentences of the report, computed from verdicts. ASCII, except for the minus sign."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.comparison.ablation import Part
from secateur.comparison.findings import FindingRow
from secateur.comparison.index import Group
from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.objectives import ObjectiveRow
from secateur.comparison.quality import QualityRow
from secateur.comparison.records import Init
from secateur.comparison.twins import Setting, Verdict, Winner
from secateur.formatting import count, decimals, join_words, number, points, spelled

__all__ = [
    "contradiction_sentence",
    "drop_setting",
    "finding_sentence",
    "headline",
    "interval",
    "objective_sentence",
    "part_sentence",
    "study_answer",
    "verdict_sentence",
]

_MOST_NAMES = 3  # a headline with more comparisons than this gives their number instead of their names


def interval(low: float, high: float, digits: int) -> str:
    """``"95% interval 0.43 to 0.47"``."""
    return f"95% interval {number(low, digits)} to {number(high, digits)}"


def verdict_sentence(verdict: Verdict, among: Sequence[Group]) -> str:
    """One verdict as a sentence; ``among`` are the comparisons that the name must distinguish it from."""
    start = f"{_setting_phrase(verdict.setting)}, {group_name(verdict.group, among, target=True)}"
    difference, low, high = verdict.difference, verdict.low, verdict.high
    if difference is None or low is None or high is None:
        return f"{start} is not measured: {verdict.reason}."
    average = _average_phrase(verdict)
    twin = "its from-scratch twins" if average else "its from-scratch twin"
    digits = decimals(difference, low, high)
    if verdict.winner == "too close to call":
        return (
            f"{start} is level with {twin} (difference {number(difference, digits)} nats{average}, "
            f"{interval(low, high, digits)}): too close to call."
        )
    near, far = sorted((abs(low), abs(high)))
    side, end = ("below", "pruning pays") if verdict.winner == "pruned" else ("above", "training from scratch pays")
    by = f"{number(abs(difference), digits)} nats {side} {twin}{average}"
    return f"{start} ends {by} ({interval(near, far, digits)}): {end}."


def contradiction_sentence(verdict: Verdict, row: QualityRow, among: Sequence[Group]) -> str:
    """A verdict by held-out loss and the opposite verdict by a task, as one sentence."""
    accuracy = row.comparison
    assert accuracy.difference is not None and accuracy.low is not None and accuracy.high is not None
    paths = {"pruned": "pruning", "scratch": "training from scratch"}
    sign = 1 if row.winner == "pruned" else -1
    low, high = sorted((sign * accuracy.low, sign * accuracy.high))
    return (
        f"{_setting_phrase(verdict.setting)}, {group_name(verdict.group, among, target=True)}: by held-out loss "
        f"{paths[verdict.winner]} is better; by accuracy ({accuracy.name}) {paths[row.winner]} is better, by "
        f"{points(sign * accuracy.difference)} points (95% interval {points(low)} to {points(high)})."
    )


#: Name of a part of the advantage, by the models without it and with it; whether it is plural.
_PARTS: dict[tuple[Init, Init], tuple[str, bool]] = {
    ("random-mask", "redrawn"): ("The mask alone, beside a random one,", False),
    ("permuted", "redrawn"): ("The mask alone, beside a permuted one,", False),
    ("redrawn", "pruned"): ("The weights under that mask", True),
    ("scratch", "pruned"): ("The weights", True),
    ("redrawn", "shuffled-weights"): ("The distribution of the weights alone", False),
    ("scratch", "shuffled-weights"): ("The distribution of the weights alone", False),
    ("shuffled-weights", "pruned"): ("The arrangement of the weights, beyond their distribution,", False),
    ("dense-twin", "redrawn"): ("The sparse shape, beside a dense one with as many weights,", False),
    ("scratch", "redrawn"): ("The zeros, beside the whole architecture from scratch,", True),
}


def part_sentence(part: Part) -> str:
    """Say how many nats a part of the advantage saves."""
    name, plural = _PARTS[part.against, part.of]
    mean, s = part.mean, "" if plural else "s"
    if mean is None:
        return f"{name.rstrip(',')}: not measured."
    digits = decimals(mean.value, mean.low, mean.high)
    if not mean.sign:
        span = interval(mean.low, mean.high, digits)
        return f"{name} make{s} no clear difference ({number(mean.value, digits)} nats, {span})."
    near, far = sorted((abs(mean.low), abs(mean.high)))
    verb = "save" if mean.sign > 0 else "cost"
    return f"{name} {verb}{s} {number(abs(mean.value), digits)} nats ({interval(near, far, digits)})."


def finding_sentence(row: FindingRow) -> str:
    """Say whether a finding holds for a method, or for several together."""
    mean = row.mean
    if mean is None:
        together = " together" if row.planned > 1 else ""
        return f"{row.scope}{together}: {row.answer}."
    digits = decimals(mean.value, mean.low, mean.high)
    notes = [interval(mean.low, mean.high, digits)]
    if row.comparisons < row.planned:
        notes.append(f"mean of {row.comparisons} of {row.planned} comparisons, those measured with the same seeds")
    elif row.planned > 1:
        notes.append(f"mean of {row.comparisons} comparisons")
    notes += [f"{mean.seeds} seeds"] if mean.seeds > 1 else []
    return f"{row.scope}: {row.answer}, {number(mean.value, digits)} nats ({'; '.join(notes)})."


def objective_sentence(row: ObjectiveRow) -> str:
    """Compare two training objectives of one pruned model."""
    first, second = (
        f"{group.objective or 'the language-model loss'} on {count(group.retrain_tokens)} tokens"
        for group in (row.first, row.second)
    )
    start, mean = f"{row.name}, at equal {row.equal}: {second}", row.mean
    if mean is None:
        return f"{start} against {first} is not measured."
    digits = decimals(mean.value, mean.low, mean.high)
    if not mean.sign:
        span = interval(mean.low, mean.high, digits)
        return f"{start} and {first} are too close to call ({number(mean.value, digits)} nats, {span})."
    near, far = sorted((abs(mean.low), abs(mean.high)))
    side = "below" if mean.sign > 0 else "above"
    return f"{start} ends {number(abs(mean.value), digits)} nats {side} {first} ({interval(near, far, digits)})."


def _average_phrase(verdict: Verdict) -> str:
    """Over how many seeds a verdict averages; empty for one seed."""
    if verdict.planned == 1:
        return ""
    if verdict.seeds == verdict.planned:
        return f" on average over {spelled(verdict.seeds)} seeds"
    return f" on average over {spelled(verdict.seeds)} of {spelled(verdict.planned)} seeds"


def _setting_phrase(setting: Setting) -> str:
    return f"At equal {BUDGETS[setting]}"


def drop_setting(text: str, setting: Setting) -> str:
    """Remove the opening "At equal ...," from a sentence that stands under a heading with the setting."""
    return text.removeprefix(f"{_setting_phrase(setting)}, ")


def headline(verdicts: Sequence[Verdict]) -> str:
    """All verdicts of one setting in one sentence; ``verdicts`` must not be empty and must share their setting."""
    among = [verdict.group for verdict in verdicts]
    phrases: tuple[tuple[Winner, str, str], ...] = (
        ("pruned", "pruning wins for {}", "pruning wins for {}"),
        ("scratch", "training from scratch wins for {}", "training from scratch wins for {}"),
        ("too close to call", "{} is too close to call", "{} are too close to call"),
        ("not measured", "{} is not measured", "{} are not measured"),
    )
    parts = []
    for winner, singular, plural in phrases:
        groups = [verdict.group for verdict in verdicts if verdict.winner == winner]
        if groups:
            parts.append((singular if len(groups) == 1 else plural).format(_list_groups(groups, among)))
    return f"{_setting_phrase(verdicts[0].setting)}, {'; '.join(parts)}."


def _list_groups(groups: Sequence[Group], among: Sequence[Group]) -> str:
    noun = "methods" if _differ_by_method_only(among) else "comparisons"
    if len(groups) == len(among) > 1:
        return f"{'both' if len(groups) == 2 else 'all ' + spelled(len(groups))} {noun}"
    if len(groups) > _MOST_NAMES:
        return f"{len(groups)} of {len(among)} {noun}"
    return join_words([group_name(group, among) for group in groups])


def _differ_by_method_only(groups: Sequence[Group]) -> bool:
    return len({(g.parent, g.target, g.retrain_tokens, g.objective, g.seed) for g in groups}) <= 1


def study_answer(verdicts: Sequence[Verdict]) -> str:
    """The study's answer from the verdicts of all settings: counted in tokens, then in FLOPs where there are any."""
    note = ", as far as measured" if any(verdict.winner == "not measured" for verdict in verdicts) else ""
    noun = "method" if _differ_by_method_only([verdict.group for verdict in verdicts]) else "comparison"
    texts = []
    for training, total, unit in (("training", "total", "tokens"), ("training-flops", "total-flops", "FLOPs")):
        sunk, charged = (_tendency([v for v in verdicts if v.setting == setting]) for setting in (training, total))
        text = _advice(sunk, charged, unit, noun)
        if text and unit == "FLOPs":
            text = f"Counted in FLOPs: {text[0].lower()}{text[1:]}"
        texts += [f"{text}{note}."] if text else []
    return " ".join(texts) or "There is no answer yet: no comparison has been measured."


def _advice(sunk: str, charged: str, unit: str, noun: str) -> str:
    """What to do if the parent's cost is sunk and if it is charged, counted in ``unit``; empty without a verdict."""
    clauses = {
        "pruned": "prune",
        "scratch": "train from scratch",
        "too close to call": "the two paths are too close to call",
        "pruned or tie": "pruning wins or is too close to call",
        "scratch or tie": "training from scratch wins or is too close to call",
        "mixed": f"it depends on the {noun}",
        "not measured": "there is no answer yet",
    }
    if {sunk, charged} <= {"", "not measured"}:
        return ""
    if sunk == charged and sunk in ("pruned", "scratch"):
        action = "Prune" if sunk == "pruned" else "Train from scratch"
        return f"{action}, whether or not the parent's {unit} are counted"
    parts = [f"if the parent is already there, {clauses[sunk]}"] if sunk else []
    parts += [f"if its {unit} count too, {clauses[charged]}"] if sunk and charged else []
    parts += [f"if the parent's {unit} count, {clauses[charged]}"] if charged and not sunk else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _tendency(verdicts: Sequence[Verdict]) -> str:
    """Where the verdicts of one setting point together: a key of `clauses` in `_advice`, or empty without verdicts."""
    winners = {verdict.winner for verdict in verdicts} - {"not measured"}
    decided = winners - {"too close to call"}
    if not winners:
        return "not measured" if verdicts else ""
    if len(decided) == 1:
        return decided.pop() + (" or tie" if len(winners) > 1 else "")
    return "mixed" if decided else "too close to call"
