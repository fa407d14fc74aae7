"""A recommendation for people, from the answer for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.formatting import MINUS, count, number, plural, scientific, signed
from secateur.report.advice_prose import findings_lines, next_run_sentence, unreached
from secateur.report.forecast_prose import catches_up

__all__ = ["text"]

_WIDTH = 100
_FINDINGS = 3  #: shown; the others are in the JSON
_ACCOUNTS = {"training": "equal training tokens", "total": "equal total tokens", "flops": "equal FLOPs"}


def text(answer: Mapping[str, Any]) -> str:
    """The whole answer, at most 100 columns wide."""
    lines = [*_headline(answer)]
    for case in answer["cases"]:
        lines += ["", *_case(case, answer)]
    for reason in answer["not_fitted"]:
        lines += ["", *_wrapped(f"not fitted: {reason}")]
    lines += ["", *_evidence(answer["evidence"]), "", *_findings(answer["findings"]), "", *_costs(answer["costs"])]
    if answer["pilot"]:
        lines += ["", *_wrapped(f"pilot study: {answer['pilot']['file']}. {answer['pilot']['says']}")]
    return "\n".join(lines).replace("\u00a0", " ").replace(MINUS, "-")


def _headline(answer: Mapping[str, Any]) -> list[str]:
    question, advice = answer["question"], answer["recommendation"]
    tokens, parent = question["parent_tokens"], question["parent"]
    trained = f"trained on {count(tokens)} tokens" if tokens else ""
    shared = f", shared by {question['children']} children" if question["children"] > 1 else ""
    had = "is there already" + (f", {trained}" if trained else "") if parent == "have" else f"must be {trained}"
    lines = _wrapped(
        f"A parent of {count(question['parameters'])} parameters, ratio {question['ratio']:g}, "
        f"R = {count(question['tokens'])} "
        f"tokens. The parent {had}{shared}, so {_ACCOUNTS[advice['decided_by']]} decide."
    )
    if question["granularity"] == "sparse":
        lines += _wrapped("Single weights become zero: parameters, and FLOPs of dense kernels, stay the parent's.")
    lines += ["", *_wrapped(advice["statement"])]
    for sentence in advice["assumptions"]:
        lines += _wrapped(sentence)
    if advice["cheapest_pilot"]:
        lines += _wrapped(advice["cheapest_pilot"]["sentence"])
        if answer["evidence"]["published"]:
            lines += _wrapped("A study at toy size, to rehearse it: --pilot FILE.")
    return lines


def _case(case: Mapping[str, Any], answer: Mapping[str, Any]) -> list[str]:
    ratios = " and ".join(f"{ratio:g}" for ratio in case["ratios"])
    between = ", read between them" if len(case["ratios"]) > 1 else ""
    lines = _wrapped(
        f"{case['method']} at ratio {ratios}{between} ({case['granularity']}), losses in nats/token with 95% intervals"
    )
    for account in case["accounts"]:
        if account["difference"] is None:
            reason = unreached(case, account, answer["question"])
            lines += _wrapped(f"{_ACCOUNTS[account['name']]}: out of reach, {reason}", "  ")
            continue
        crossing = f" {catches_up(account['crossover'])}" if account["crossover"] else ""
        difference = f"difference {_interval(account['difference'], sign=True)}: {account['winner']}"
        if account["basis"] == "measured":
            paths = f"measured against {count(account['scratch_tokens'])} tokens from scratch, {difference}"
        else:
            scratch = f"from scratch on {count(account['scratch_tokens'])} tokens {_interval(account['scratch_loss'])}"
            paths = f"P-R {_interval(case['pruned_loss'])}; {scratch}; {difference}"
        lines += _wrapped(f"{_ACCOUNTS[account['name']]}: {paths}.{crossing}", "  ")
    lines += [f"  {line}" for line in _distances(case["distances"])]
    sentence = "" if answer["evidence"]["published"] else next_run_sentence(case, answer["costs"]["currency"])
    return [*lines, *(_wrapped(sentence, "  ") if sentence else [])]


def _distances(distances: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the question lies, beside what was run."""
    lines = []
    for d in distances:
        ran = f"{d['low']:.3g}" if d["low"] == d["high"] else f"{d['low']:.3g} to {d['high']:.3g}"
        far = "within" if not d["outside"] else f"x{d['factor']:.2g}" if d["factor"] > 1 else f"/{1 / d['factor']:.2g}"
        lines.append(f"{d['what']:32} asked {d['asked']:>9.3g}   run {ran:>18}   {far}")
    return lines


def _evidence(evidence: Mapping[str, Any]) -> list[str]:
    trained = f", trained on {count(evidence['parent_tokens'])} tokens" if evidence["parent_tokens"] else ""
    lines = _wrapped(
        f"Evidence: {evidence['source']}; {plural(evidence['runs'], 'run')}, parent of "
        f"{count(evidence['parent_parameters'])} parameters{trained}."
    )
    if evidence["runs_without_a_loss"]:
        lines += _wrapped(f"Left out: {plural(evidence['runs_without_a_loss'], 'run')} without a held-out loss.", "  ")
    if evidence["accuracies"]:
        accuracies = "; ".join(f"{a['method']} {a['scratch']:g} and {a['pruned']:g}" for a in evidence["accuracies"])
        where = "at ratio 0.5 and equal total tokens, one seed"
        lines += _wrapped(f"Zero-shot accuracy, scratch and pruned, {where}: {accuracies}.", "  ")
    return lines


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"published findings, those that bear on the question first ({_FINDINGS} of {len(findings)}; all: --json)"]
    for paragraph in findings_lines(findings, _FINDINGS):
        lines += _wrapped(paragraph, "  ")
    return lines


def _costs(costs: Mapping[str, Any]) -> list[str]:
    money = f"  {costs['currency']:>12}" if costs["currency"] else ""
    lines = [f"{'cost':30}  {'tokens':>9}  {'FLOPs':>13}{money}"]
    for row in [*costs["terms"], *costs["paths"]]:
        tokens = "-" if row["tokens"] is None else count(row["tokens"])
        flops = "not known" if row["flops"] is None else scientific(row["flops"])
        money = f"  {row['money']:>12,.2f} {costs['currency']}" if row["money"] is not None else ""
        lines.append(f"  {row['name']:28}  {tokens:>9}  {flops:>13}{money}")
    return [*lines, *_wrapped(costs["formula"], "  ")]


def _interval(interval: Mapping[str, float], *, sign: bool = False) -> str:
    value, low, high = ((signed(interval[k], 2) if sign else number(interval[k], 2)) for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _wrapped(line: str, indent: str = "") -> list[str]:
    hanging = indent + ("  " if indent else "")
    return textwrap.wrap(line, _WIDTH, initial_indent=indent, subsequent_indent=hanging, break_on_hyphens=False)
