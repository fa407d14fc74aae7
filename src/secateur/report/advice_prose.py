"""A recommendation in sentences: one statement, what it assumes, and the pilot where figures cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.forecast.crossover import REACH
from secateur.forecast.evidence import SLACK
from secateur.forecast.published import HIGHEST, LOWEST
from secateur.formatting import count, decimals, duration, join_words, number, scientific, signed
from secateur.methods.registry import method_name

__all__ = ["assumptions", "explain", "findings_lines", "next_run_sentence", "pilot_sentence", "statement", "unreached"]

_AHEAD = {"pruned": "pruning ahead", "scratch": "training from scratch ahead", "undecided": "undecided"}


def explain(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with its sentences: ``statement`` and ``assumptions``, and one with the pilot."""
    advice = answer["recommendation"]
    pilot = advice["cheapest_pilot"]
    if pilot:
        pilot = {**pilot, "sentence": pilot_sentence(pilot, answer["question"])}
    sentences = {"statement": statement(answer), "assumptions": assumptions(answer), "cheapest_pilot": pilot}
    return {**answer, "recommendation": {**advice, **sentences}}


def statement(answer: Mapping[str, Any]) -> str:
    """The one sentence that answers, with what it rests on; the choice in capitals."""
    advice, question = answer["recommendation"], answer["question"]
    choice = advice["choice"].upper()
    if advice["basis"] in ("curves", "measured"):
        text = f"{choice}: {_by_curves(answer)}"
    elif advice["basis"] == "finding":
        text = f"{choice}: {_by_finding(answer)}"
        if question["granularity"] in ("sparse", "depth+width") and not advice["method_without_figures"]:
            return f"No losses were published for {_without_losses(question)}; {text}."
    else:
        return f"{choice}: {'; '.join(_reasons(answer))}."
    if not advice["method_without_figures"]:
        return f"{text}."
    source = "published figures" if answer["evidence"]["published"] else "runs"
    nearest = join_words([_title(case["method"]) for case in answer["cases"]]) or _nearest(question["granularity"])
    return f"No {source} for {question['method']}; the nearest, {nearest}, says {text}."


def _nearest(granularity: str) -> str:
    """The method of the published study that removes the same."""
    nearest = {"depth": "minitron-depth", "width": "minitron-width", "depth+width": "sheared", "sparse": "sparsegpt"}
    return method_name(nearest[granularity])


def _title(method: str) -> str:
    """The authors' spelling of a method, with the pattern or objective that follows its name."""
    name, *rest = method.split(" ", 1)
    return " ".join([method_name(name), *rest])


def _by_curves(answer: Mapping[str, Any]) -> str:
    decides = answer["recommendation"]["decided_by"]
    phrases = []
    for case in answer["cases"]:
        accounts = {account["name"]: account for account in case["accounts"]}
        phrase = _lead(case, accounts[decides], answer["question"])
        flops = accounts.get("flops")
        if decides == "total" and flops and flops["winner"] != accounts[decides]["winner"]:
            ahead = _AHEAD.get(flops["winner"], "out of reach")
            phrase += f" (at equal FLOPs, {count(flops['scratch_tokens'])} tokens from scratch: {ahead})"
        phrases.append(phrase)
    return "; ".join(phrases)


def _lead(case: Mapping[str, Any], account: Mapping[str, Any], question: Mapping[str, Any]) -> str:
    """Who is ahead of whom on an account, by how much, and whether that was measured."""
    name, gap = _title(case["method"]), account["difference"]
    if gap is None:
        return f"{name}: {unreached(case, account, question)}"
    measured, seeds = account["basis"] == "measured", account["seeds"]
    runs = "in one pair of runs" if seeds == 1 else f"over {seeds} seeds"
    start = f"measured {runs}, " if measured else ""
    return start + _comparison(name, account, "" if measured or seeds > 1 else ", one seed")


def unreached(case: Mapping[str, Any], account: Mapping[str, Any], question: Mapping[str, Any]) -> str:
    """Which path's budgets leave the question out of reach, and on which side."""
    budgets = {"P-R": question["tokens"], "from scratch": account["scratch_tokens"]}
    for name, path in (("P-R", "pruned"), ("from scratch", "scratch")):
        low, high = (case["budgets"][path][end] * case["scale"] for end in (0, -1))
        if budgets[name] < low:
            return f"{count(budgets[name])} tokens {name} are fewer than any run had, {count(low)} or more"
        if budgets[name] > REACH * high:
            return (
                f"{count(budgets[name])} tokens {name} are beyond {REACH:g} times the most that was run, {count(high)}"
            )
    return "these budgets were not measured, and no curve fits the runs"


def _comparison(name: str, account: Mapping[str, Any], note: str) -> str:
    """The difference with its interval; ``note`` follows it."""
    gap = account["difference"]
    digits = decimals(*gap.values())
    near, far = sorted((abs(gap["low"]), abs(gap["high"])))
    margin = f"by {number(abs(gap['value']), digits)} nats (95%: {number(near, digits)} to {number(far, digits)}{note})"
    if account["winner"] == "pruned":
        return f"{name} is ahead of training from scratch {margin}"
    if account["winner"] == "scratch":
        return f"training from scratch is ahead of {name} {margin}"
    value, low, high = (signed(gap[key], digits) for key in ("value", "low", "high"))
    if account["reason"] and gap["low"] * gap["high"] > 0:  # else the interval says why
        note += "; " + account["reason"].replace(" (Holm)", " by Holm's method")
    span = f"(advantage {value} nats, 95%: {low} to {high}{note})"
    if account["winner"] == "equal within margin":
        return f"{name} and training from scratch are equal within the margin {span}"
    return f"{name} against training from scratch is undecided {span}"


def _by_finding(answer: Mapping[str, Any]) -> str:
    """The published finding that stands in for a curve."""
    finding, question = answer["recommendation"]["finding"], answer["question"]
    ratio, extra = f"{question['ratio']:g}", count(answer["costs"]["extra_scratch_tokens"] or 0)
    advantage = "at equal training tokens the advantage of pruning is nearly gone at ratio 0.8"
    if finding["beyond"] and finding["trend"] != "ahead":
        advantage += f" and shrinks as more is removed; nothing was run at {ratio}"
    if finding["trend"] == "ahead" and finding["beyond"]:
        return (
            "by the published trend alone, pruning is ahead at ratios 0.5 to 0.8, and by more the less is removed; "
            f"nothing was run at {ratio}"
        )
    if finding["trend"] == "ahead":
        where = f"; no losses were published at {ratio}"
        if abs(question["ratio"] - LOWEST) <= SLACK:
            where = "" if question["granularity"] in ("sparse", "depth+width") else "; no curve is so short"
        return (
            "by the published finding, pruning is ahead at ratios 0.5 to 0.8 at equal training tokens, by less the "
            f"more is removed{where}"
        )
    if finding["trend"] == "nearly gone":
        return f"by the published finding, {advantage}"
    if finding["trend"] == "accuracies":
        gaps = [
            f"{_title(a['method'])} {signed(a['pruned'] - a['scratch'], 1)}" for a in answer["evidence"]["accuracies"]
        ]
        return (
            f"zero-shot accuracy after pruning less that "
            f"from scratch, one seed without an interval, in points: {', '.join(gaps)}"
        )
    if question["ratio"] < HIGHEST - SLACK:
        return (
            "by the published trend, training from scratch on all tokens is ahead of Minitron-depth at ratio 0.5 "
            f"(perplexity 9.01 against 9.41), and pruning gains nothing as more is removed; no losses at {ratio}"
        )
    return f"by inference, {advantage}, and training from scratch gets {extra} tokens more here"


def _without_losses(question: Mapping[str, Any]) -> str:
    return {"sparse": "sparse methods"}.get(question["granularity"], f"{question['granularity']}")


def _reasons(answer: Mapping[str, Any]) -> list[str]:
    """Why the figures do not answer, a clause each."""
    question, evidence = answer["question"], answer["evidence"]
    obstacles = answer["recommendation"]["obstacles"]
    about_ratio = all(obstacle["kind"] == "ratio" for obstacle in obstacles)
    if (
        evidence["published"]
        and about_ratio
        and question["ratio"] >= HIGHEST - SLACK
        and question["granularity"] != "sparse"
    ):
        return ["the finding at ratio 0.8 is of 50 B tokens for 8 B parameters, and fewer favour pruning"]
    scattered = [obstacle for obstacle in obstacles if obstacle["kind"] == "fit"]
    clauses = [_misfit(scattered)] if scattered else []
    clauses += [_reason(obstacle, question, evidence) for obstacle in obstacles if obstacle not in scattered]
    return list(dict.fromkeys(clauses)) or [
        f"nothing was published at ratio {question['ratio']:g} for this budget at equal "
        f"{'total' if question['parent'] == 'must-train' else 'training'} tokens"
    ]


def _misfit(obstacles: Sequence[Mapping[str, Any]]) -> str:
    """One clause for all methods whose runs fit no curve."""
    methods: dict[str, list[str]] = {}
    for obstacle in obstacles:
        methods.setdefault(obstacle["reason"], []).append(_title(obstacle["method"]))
    clauses = [f"{join_words(names)}: {reason}" for reason, names in methods.items()]
    return f"{'; '.join(clauses)}; the study's report has the comparisons that were measured"


def _reason(obstacle: Mapping[str, Any], question: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    kind = obstacle["kind"]
    if kind == "size":
        return (
            f"the parent has {count(obstacle['asked'])} parameters, that of the evidence {count(obstacle['low'])}, "
            f"{_times(obstacle['factor'])}"
        )
    if kind == "parent tokens":
        return (
            f"the parent has seen {_round(obstacle['asked'])} tokens a parameter, that of the evidence "
            f"{_round(obstacle['low'])}, {_times(obstacle['factor'])}"
        )
    if kind == "teacher":
        return "the evidence is of retraining without a teacher"
    if kind == "control":
        return f"{question['method']} is a control, of which nothing was published"
    if kind == "granularity":
        of = question["method"] or _without_losses(question)
        where = "were published, and no finding is of this ratio and budget" if evidence["published"] else "are there"
        return f"no losses of {of} {where}"
    if kind == "budget":
        return (
            f"{obstacle['what']}: {_round(obstacle['asked'])}, in the evidence {_round(obstacle['low'])} to "
            f"{_round(obstacle['high'])}, and nothing is read "
            f"{'below that' if obstacle['factor'] < 1 else f'beyond {REACH:g} times that'}"
        )
    if obstacle["low"] == obstacle["high"]:
        return f"losses are there at ratio {obstacle['low']:g} only, not at {question['ratio']:g}"
    return f"ratio {question['ratio']:g} lies outside of those run, {obstacle['low']:g} to {obstacle['high']:g}"


def _round(value: float) -> str:
    return count(float(f"{value:.2g}")) if value >= 1 else f"{value:.2g}"


def _times(factor: float) -> str:
    return f"{factor:.2g} times less" if factor > 1 else f"{1 / factor:.2g} times more"


def assumptions(answer: Mapping[str, Any]) -> list[str]:
    """What the statement takes for granted, a sentence each."""
    question, evidence = answer["question"], answer["evidence"]
    if answer["recommendation"]["basis"] == "none":
        return []
    sentences = []
    if question["parent_tokens"] is None and evidence["parent_tokens"]:
        rate = evidence["parent_tokens"] / evidence["parent_parameters"]
        more = ", and public models have often seen far more" if evidence["published"] else ""
        sentences.append(
            f"Assumes a parent that has seen about {_round(rate)} tokens a parameter, as the evidence's: its tokens "
            f"are not given{more}."
        )
    if not 1 / 1.1 <= question["parameters"] / evidence["parent_parameters"] <= 1.1:
        sentences.append(
            f"Read from a parent of {count(evidence['parent_parameters'])} parameters at equal tokens a parameter."
        )
    return sentences


def pilot_sentence(pilot: Mapping[str, Any], question: Mapping[str, Any]) -> str:
    """The cheapest runs that would answer, with their cost."""
    if pilot["parent_tokens"]:
        parent = (
            f"train a parent of {count(pilot['parent_parameters'])} parameters on {count(pilot['parent_tokens'])} "
            "tokens, prune it"
        )
    else:
        parent = "prune this parent"
    if question["method"]:
        parent += f" by {_title(question['method'])}"
    longer = f", from scratch on {count(pilot['longer_scratch'])} too" if pilot["longer_scratch"] else ""
    budgets = join_words([count(budget) for budget in pilot["budgets"]])
    money = f", {pilot['money']:,.2f} {pilot['currency']}" if pilot["money"] is not None else ""
    return (
        f"Cheapest pilot: {parent} at ratio {question['ratio']:g}, and train it and its twin from scratch on {budgets} "
        f"tokens{longer}: {count(pilot['tokens'])} tokens and {scientific(pilot['flops'])} FLOPs in all, "
        f"{_hours(pilot['hours'])} of an accelerator at {scientific(pilot['flops_per_second'])} FLOPs a second{money}."
    )


def _hours(hours: float) -> str:
    if hours >= 2:
        return f"{count(round(hours))} hours"
    return duration(hours * 3600) if hours * 60 >= 1 else "less than a minute"


def next_run_sentence(case: Mapping[str, Any], currency: str | None) -> str:
    """The further run of a study that would narrow its crossover most, with its cost; empty if none would."""
    if not case["next_runs"]:
        return ""
    run: Mapping[str, Any] = case["next_runs"][0]
    path = {"pruned": "P-R", "scratch": "from scratch"}[run["path"]]
    money = f", {run['money']:,.2f} {currency}" if run["money"] is not None else ""
    return (
        f"What would tell most: one more run {path} on {count(run['tokens'])} tokens ({scientific(run['flops'])} FLOPs"
        f"{money}); it should leave {100 * run['width']:.0f}% of the interval of the crossover."
    )


def findings_lines(findings: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """The first of the findings, a paragraph each."""
    lines = []
    for finding in findings[:most]:
        teacher = {True: "with a teacher", False: "without a teacher", None: "teacher not stated"}
        figures = "; ".join(f"{name} {value:g}" for name, value in finding["figures"])
        lines.append(
            f"{finding['statement']}{f' {figures}.' if figures else ''} [{finding['source']}, {finding['table']}; "
            f"{finding['conditions']}; {finding['tokens']}; {teacher[finding['distilled']]}]"
        )
    return lines
