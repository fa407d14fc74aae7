"""Sentences of the report, computed from verdicts. ASCII, except for the minus sign."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.comparison.ablation import Part
from secateur.comparison.decision import Decision
from secateur.comparison.findings import FindingRow
from secateur.comparison.index import Group
from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.objectives import ObjectiveRow
from secateur.comparison.quality import QualityRow
from secateur.comparison.records import Init, SeedsVary
from secateur.comparison.steps import StepsRow
from secateur.comparison.twins import Setting, Verdict, Winner
from secateur.formatting import count, decimals, join_words, number, plural, points, spelled

__all__ = [
    "contradiction_sentence",
    "coverage_note",
    "drop_setting",
    "finding_sentence",
    "headline",
    "interval",
    "objective_sentence",
    "part_sentence",
    "steps_sentence",
    "study_answer",
    "verdict_sentence",
]

_MOST_CASES = 6  # exceptions of a finding that a sentence names
_MOST_NAMES = 3  # a headline with more comparisons than this gives their number instead of their names


#: The seeds of a study, as in "over two seeds, each with its own parent": by what they vary.
_SEEDS: dict[SeedsVary, str] = {"all": "each with its own parent", "training": "which share one parent"}


def interval(low: float, high: float, digits: int) -> str:
    """``"95% interval 0.43 to 0.47"``."""
    return f"95% interval {number(low, digits)} to {number(high, digits)}"


def verdict_sentence(verdict: Verdict, among: Sequence[Group], seeds_vary: SeedsVary = "training") -> str:
    """One verdict as a sentence.

    With one seed it speaks of this pair of runs; only several seeds say which path pays.

    Args:
        among: the comparisons that the name must distinguish it from.
        seeds_vary: what differs between seeds (:class:`StudyResults`).
    """
    start = f"{_setting_phrase(verdict.setting)}, {group_name(verdict.group, among, target=True)}"
    decision = verdict.decision
    difference, low, high = decision.value, decision.low, decision.high
    if difference is None:
        return f"{start} is not measured: {verdict.reason}."
    if low is None or high is None:
        return f"{start} is undecided: {verdict.reason}."
    digits = decimals(difference, low, high)
    several = decision.seeds > 1
    average = f" on average over {_seeds_phrase(verdict, seeds_vary)}" if several else ""
    twin = "its from-scratch twins" if several else "its from-scratch twin"
    spread = f"difference {number(difference, digits)} nats{average}, {interval(low, high, digits)}"
    if verdict.winner == "equal within margin":
        return f"{start} is equal to {twin} within {decision.margin:g} nats ({spread}){_this_pair(verdict)}."
    if verdict.winner == "undecided":
        return f"{start} against {twin} is undecided ({spread}): {verdict.reason}."
    near, far = sorted((abs(low), abs(high)))
    side = "below" if verdict.winner == "pruned" else "above"
    by = f"{number(abs(difference), digits)} nats {side} {twin}{average} ({interval(near, far, digits)})"
    if not several:
        return f"{start} ends {by}{_this_pair(verdict)}."
    end = "pruning pays" if verdict.winner == "pruned" else "training from scratch pays"
    return f"{start} ends {by}: {end}."


def _this_pair(verdict: Verdict) -> str:
    if verdict.decision.seeds > 1:
        return ""
    return ", in this pair of runs" + (" (its seeds are identical and count as one)" if verdict.seeds > 1 else "")


def _seeds_phrase(verdict: Verdict, seeds_vary: SeedsVary) -> str:
    """``"three seeds, each with its own parent"``; how many of how many, where some are missing."""
    number_of = spelled(verdict.seeds)
    if verdict.seeds < verdict.planned:
        number_of += f" of {spelled(verdict.planned)}"
    return f"{number_of} seeds, {_SEEDS[seeds_vary]}"


def contradiction_sentence(verdict: Verdict, row: QualityRow, among: Sequence[Group]) -> str:
    """A verdict by held-out loss and the opposite verdict by a perplexity or by tasks, as one sentence."""
    figure = row.comparison
    assert figure.difference is not None and figure.low is not None and figure.high is not None
    paths = {"pruned": "pruning", "scratch": "training from scratch"}
    sign = 1 if row.winner == "pruned" else -1
    low, high = sorted((sign * figure.low, sign * figure.high))
    if figure.kind == "accuracy":
        measure, by = f"accuracy ({figure.name})", f"{points(sign * figure.difference)} points"
        span = f"95% interval {points(low)} to {points(high)}"
    else:
        digits = decimals(figure.difference, low, high)
        measure, by = f"loss on {figure.name}", f"{number(sign * figure.difference, digits)} nats"
        span = interval(low, high, digits)
    return (
        f"{_setting_phrase(verdict.setting)}, {group_name(verdict.group, among, target=True)}: by held-out loss "
        f"{paths[verdict.winner]} is better; by {measure} {paths[row.winner]} is better, by {by} ({span})."
    )


#: Name of a part of the advantage, by the models without it and with it; whether it is plural.
_PARTS: dict[tuple[Init, Init], tuple[str, bool]] = {
    ("random-mask", "redrawn"): ("The mask alone, beside a random one,", False),
    ("permuted", "redrawn"): ("The mask alone, beside a permuted one,", False),
    ("redrawn", "pruned"): ("The weights under that mask", True),
    ("redrawn", "redrawn-linears"): ("The parent's embeddings and norms", True),
    ("redrawn-linears", "pruned"): ("The linears' weights under that mask", True),
    ("scratch", "pruned"): ("The weights", True),
    ("redrawn", "shuffled-weights"): ("The distribution of the weights alone", False),
    ("scratch", "shuffled-weights"): ("The distribution of the weights alone", False),
    ("shuffled-weights", "pruned"): ("The arrangement of the weights, beyond their distribution,", False),
    ("dense-twin", "redrawn"): ("The sparse shape, beside a dense one with as many weights,", False),
    ("dense-active", "pruned"): ("The pruned mixture, beside a dense model of its active size,", False),
    ("dense-total", "pruned"): ("The pruned mixture, beside a dense model of its whole size,", False),
    ("scratch", "redrawn"): ("The zeros, beside the whole architecture from scratch,", True),
    ("without-pruning-tokens", "scratch"): ("The tokens that pruning trained on, for the twin,", True),
    ("without-pruning-tokens", "pruned"): ("Pruning and the tokens that it trained on together", True),
    ("pruned", "parent-continued"): ("The part of the parent that pruning removed", False),
}


def part_sentence(part: Part) -> str:
    """Say how many nats a part of the advantage saves."""
    name, plural = _PARTS[part.against, part.of]
    mean, s = part.mean, "" if plural else "s"
    if mean is None or mean.value is None:
        return f"{name.rstrip(',')}: not measured."
    runs = ", in one pair of runs" if mean.seeds == 1 else f", over {spelled(mean.seeds)} seeds"
    if _is_equal(mean):
        return f"{name} make{s} no difference beyond {mean.margin:g} nats ({_spread(mean)}{runs})."
    if not mean.sign:
        return f"{name.rstrip(',')}: undecided ({_spread(mean)}{runs}): {mean.reason}."
    verb = "save" if mean.sign > 0 else "cost"
    return f"{name} {verb}{s} {_size(mean, runs)}."


def finding_sentence(row: FindingRow, among: Sequence[Group]) -> str:
    """Say in how many cases a finding holds, its mean, and the cases in which it does not hold.

    Args:
        among: the comparisons that the names of cases must distinguish them from.
    """
    measured = row.measured
    if not measured:
        return f"{row.scope}: not measured."
    holding = len(measured) - len(row.exceptions)
    text = f"{row.scope}: holds in {holding} of {len(measured)}"
    if len(measured) == 1:
        text = f"{row.scope}: {row.answer}"
    if len(measured) < len(row.cases):
        case = " in the one case" if len(measured) == 1 else ""
        text += f"{case} measured (of {len(row.cases)} planned)"
    mean = row.mean
    if mean is not None and mean.value is not None:
        seeds = f"; up to {spelled(mean.seeds)} seeds" if mean.seeds > 1 else "; one seed"
        text += f"; {'mean ' if len(measured) > 1 else ''}{_spread(mean)}{seeds if len(measured) > 1 else ''}"
    if row.exceptions and len(measured) > 1:
        cases = [f"{group_name(case.group, among, target=True)} ({_case(case.decision)})" for case in row.exceptions]
        more = f", and {len(cases) - _MOST_CASES} more" if len(cases) > _MOST_CASES else ""
        text += f". Not in {'; '.join(cases[:_MOST_CASES])}{more}"
    return f"{text}."


def _case(decision: Decision) -> str:
    words: dict[str, str] = {"second": "the opposite", "first": "ahead"}
    return f"{words.get(decision.verdict, decision.verdict)}: {_spread(decision)}"


def objective_sentence(row: ObjectiveRow) -> str:
    """Compare two training objectives of one pruned model."""
    first, second = (
        f"{group.objective or 'the language-model loss'} on {count(group.retrain_tokens)} tokens"
        for group in (row.first, row.second)
    )
    return _difference_sentence(f"{row.name}, at equal {row.equal}", first, second, row.mean)


def steps_sentence(row: StepsRow) -> str:
    """Compare prunings of one model to one target in different numbers of steps."""
    start = f"{row.name}, pruned and recovered on {count(row.first.retrain_tokens)} tokens"
    start += f" ({row.first.objective})" if row.first.objective else ""
    return _difference_sentence(start, f"in {row.first_steps}", f"in {row.second_steps}", row.mean)


def _difference_sentence(start: str, first: str, second: str, mean: Decision | None) -> str:
    """Which of two runs ends lower, or that it is equal, undecided or not measured."""
    start = f"{start}: {second}"
    if mean is None or mean.value is None:
        return f"{start} against {first} is not measured."
    runs = ", in one pair of runs" if mean.seeds == 1 else f", over {spelled(mean.seeds)} seeds"
    if _is_equal(mean):
        return f"{start} and {first} are equal within {mean.margin:g} nats ({_spread(mean)}{runs})."
    if not mean.sign:
        return f"{start} against {first} is undecided ({_spread(mean)}{runs}): {mean.reason}."
    side = "below" if mean.sign > 0 else "above"
    size, _, span = _size(mean, runs).partition(" (")
    return f"{start} ends {size} {side} {first} ({span}."


def _is_equal(decision: Decision) -> bool:
    return decision.verdict == "equal within margin"


def _spread(decision: Decision) -> str:
    """``"0.45 nats, 95% interval 0.43 to 0.47"``."""
    assert decision.value is not None
    if decision.low is None or decision.high is None:
        return f"{number(decision.value, 3)} nats, without an interval: {decision.reason}"
    digits = decimals(decision.value, decision.low, decision.high)
    return f"{number(decision.value, digits)} nats, {interval(decision.low, decision.high, digits)}"


def _size(decision: Decision, note: str = "") -> str:
    """``"0.45 nats (95% interval 0.43 to 0.47)"``, without a sign; for decisions that name a path."""
    assert decision.value is not None and decision.low is not None and decision.high is not None
    digits = decimals(decision.value, decision.low, decision.high)
    near, far = sorted((abs(decision.low), abs(decision.high)))
    return f"{number(abs(decision.value), digits)} nats ({interval(near, far, digits)}{note})"


def _setting_phrase(setting: Setting) -> str:
    return f"At equal {BUDGETS[setting]}"


def coverage_note(verdicts: Sequence[Verdict], seeds_vary: SeedsVary) -> str:
    """What the intervals of a study's verdicts cover, and on how many documents and comparisons they rest."""
    measured = [verdict for verdict in verdicts if verdict.unit]
    if not measured:
        return ""
    seeds = {verdict.decision.seeds for verdict in measured}
    covers = "held-out text only, since there is one seed: training anew could move each difference further"
    if max(seeds) > 1:
        covers = f"held-out text and seeds ({_SEEDS[seeds_vary]})"
        covers += ", of one seed held-out text only" if min(seeds) == 1 else ""
    decision = measured[0].decision
    documents = (
        f"{plural(decision.documents, 'held-out document')}, worth {decision.effective_documents:.0f} of equal length"
    )
    if measured[0].unit == "windows of known documents":
        groups = plural(
            decision.documents,
            "group of held-out windows that shares no document",
            "groups of held-out windows that share no document",
        )
        documents = f"{groups}, worth {decision.effective_documents:.0f} of equal length"
    elif measured[0].unit == "windows":
        windows = plural(decision.documents, "held-out window")
        documents = f"{windows}; their documents are unknown, so each counts as a document"
    margin = f" Differences within {decision.margin:g} nats count as equal." if decision.margin else ""
    tests = max(verdict.decision.comparisons for verdict in measured)
    holm = ""
    if tests > 1:
        holm = (
            f" A path is named if p is below 0.05 after Holm's correction for up to {tests} comparisons; the intervals "
            "and equality are not corrected."
        )
    return f"Intervals cover {covers}. They rest on {documents}.{margin}{holm}"


def drop_setting(text: str, setting: Setting) -> str:
    """Remove the opening "At equal ...," from a sentence that stands under a heading with the setting."""
    return text.removeprefix(f"{_setting_phrase(setting)}, ")


def headline(verdicts: Sequence[Verdict]) -> str:
    """All verdicts of one setting in one sentence; ``verdicts`` must not be empty and must share their setting."""
    among = [verdict.group for verdict in verdicts]
    lower = (
        "ends lower" if any(verdict.decision.seeds > 1 for verdict in verdicts) else "ended lower in its pair of runs"
    )
    phrases: tuple[tuple[Winner, str], ...] = (
        ("pruned", f"the pruned model {lower} for {{}}"),
        ("scratch", f"the from-scratch model {lower} for {{}}"),
        ("equal within margin", "both are equal within the margin for {}"),
        ("undecided", "undecided for {}"),
        ("not measured", "not measured for {}"),
    )
    parts = []
    for winner, phrase in phrases:
        groups = [verdict.group for verdict in verdicts if verdict.winner == winner]
        if groups:
            parts.append(phrase.format(_list_groups(groups, among)))
    return f"{_setting_phrase(verdicts[0].setting)}: {'; '.join(parts)}."


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
    several = any(verdict.decision.seeds > 1 for verdict in verdicts)
    texts = []
    for training, total, unit in (("training", "total", "tokens"), ("training-flops", "total-flops", "FLOPs")):
        sunk, charged = (_tendency([v for v in verdicts if v.setting == setting]) for setting in (training, total))
        text = _advice(sunk, charged, unit, noun, several)
        if text and unit == "FLOPs":
            text = f"Counted in FLOPs: {text[0].lower()}{text[1:]}"
        texts += [f"{text}{note}."] if text else []
    if texts and not several:
        texts.append("One seed: this is about these runs; another seed may end differently.")
    return " ".join(texts) or "There is no answer yet: no comparison has been measured."


#: What the verdicts of a setting come to (:func:`_tendency`): as advice, and of one seed.
_CLAUSES: dict[str, tuple[str, str]] = {
    "pruned": ("prune", "the pruned models ended lower"),
    "scratch": ("train from scratch", "the from-scratch models ended lower"),
    "equal within margin": ("the two paths are equal within the margin", "the two paths ended equal within the margin"),
    "undecided": ("it is undecided", "it is undecided"),
    "pruned or open": ("prune where a path is named", "the pruned models ended lower where a path is named"),
    "scratch or open": (
        "train from scratch where a path is named",
        "the from-scratch models ended lower where a path is named",
    ),
    "not measured": ("there is no answer yet", "there is no answer yet"),
}


def _advice(sunk: str, charged: str, unit: str, noun: str, several: bool) -> str:
    """What to do if the parent's cost is sunk and if it is charged, counted in ``unit``; empty without a verdict."""
    if {sunk, charged} <= {"", "not measured"}:
        return ""
    clauses = {key: pair[0 if several else 1] for key, pair in _CLAUSES.items()}
    clauses["mixed"] = f"it depends on the {noun}"
    if sunk == charged and sunk in ("pruned", "scratch"):
        action = clauses[sunk]
        return f"{action[0].upper()}{action[1:]}, whether or not the parent's {unit} are counted"
    parts = [f"if the parent is already there, {clauses[sunk]}"] if sunk else []
    parts += [f"if its {unit} count too, {clauses[charged]}"] if sunk and charged else []
    parts += [f"if the parent's {unit} count, {clauses[charged]}"] if charged and not sunk else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _tendency(verdicts: Sequence[Verdict]) -> str:
    """Where the verdicts of one setting point together: a key of ``_CLAUSES``, "mixed", or empty without verdicts."""
    winners = {verdict.winner for verdict in verdicts} - {"not measured"}
    decided = winners & {"pruned", "scratch"}
    if not winners:
        return "not measured" if verdicts else ""
    if len(decided) == 1:
        return decided.pop() + (" or open" if len(winners) > 1 else "")
    if decided:
        return "mixed"
    return "equal within margin" if winners == {"equal within margin"} else "undecided"
