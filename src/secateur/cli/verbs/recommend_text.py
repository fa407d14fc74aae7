"""A recommendation for people, from the answer for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.formatting import MINUS, count, number, scientific, signed
from secateur.report.forecast_prose import catches_up

__all__ = ["text"]

_WIDTH = 100
_ACCOUNTS = {"training": "equal training tokens", "total": "equal total tokens", "flops": "equal FLOPs"}


def text(answer: Mapping[str, Any]) -> str:
    """The whole answer, at most 100 columns wide."""
    lines = [*_headline(answer)]
    for case in answer["cases"]:
        lines += ["", *_case(case)]
    for reason in answer["not_fitted"]:
        lines += ["", *_wrapped(f"not fitted: {reason}")]
    lines += ["", *_evidence(answer["evidence"]), "", *_costs(answer["costs"])]
    if answer["pilot"]:
        lines += ["", *_wrapped(f"pilot study: {answer['pilot']['file']}. {answer['pilot']['says']}")]
    return "\n".join(lines).replace("\u00a0", " ").replace(MINUS, "-")


def _headline(answer: Mapping[str, Any]) -> list[str]:
    question, advice = answer["question"], answer["recommendation"]
    tokens, parent = question["parent_tokens"], question["parent"]
    trained = f" on {count(tokens)} tokens" if tokens else ""
    shared = f", shared by {question['children']} children" if question["children"] > 1 else ""
    had = "is there already" if parent == "have" else f"must be trained{trained}{shared}"
    lines = _wrapped(
        f"A parent of {count(question['parameters'])} parameters, ratio {question['ratio']:g}, "
        f"R = {count(question['tokens'])} "
        f"tokens. The parent {had}, so {_ACCOUNTS[advice['decided_by']]} decide."
    )
    if question["granularity"] == "sparse":
        lines += _wrapped("Single weights become zero: parameters, and FLOPs of dense kernels, stay the parent's.")
    note = " (outside of what was run: see the distances)" if advice["extrapolates"] else ""
    return [*lines, "", *_wrapped(f"{advice['choice'].upper()}{note}. {advice['why'][0].upper()}{advice['why'][1:]}.")]


def _case(case: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{case['method']} at ratio {case['ratio']:g} ({case['granularity']}), losses in nats/token with 95% intervals"
    ]
    pruned = _interval(case["pruned_loss"])
    for account in case["accounts"]:
        lines += _wrapped(
            f"{_ACCOUNTS[account['name']]}: P-R {pruned}; from scratch on {count(account['scratch_tokens'])} tokens "
            f"{_interval(account['scratch_loss'])}; difference {_interval(account['difference'], sign=True)}: "
            f"{account['winner']}. {catches_up(account['crossover'])}",
            "  ",
        )
    lines += [f"  {line}" for line in _distances(case["distances"])]
    if case["next_runs"]:
        best = case["next_runs"][0]
        lines += _wrapped(
            f"What would tell most: one more {best['path']} run on {count(best['tokens'])} tokens there; it would be "
            f"expected to leave {100 * best['width']:.0f}% of the interval of the crossover.",
            "  ",
        )
    return lines


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
        f"Evidence: {evidence['source']}; {evidence['runs']} runs, parent of {count(evidence['parent_parameters'])} "
        f"parameters{trained}. Where the parent is of another size, curves are read at equal tokens a "
        "parameter, and losses are those of the evidence's size."
    )
    if evidence["runs_without_a_loss"]:
        lines += _wrapped(f"{evidence['runs_without_a_loss']} runs have no held-out loss and are left out.", "  ")
    for finding in evidence["findings"]:
        lines += _wrapped(f"At {_ACCOUNTS[finding['account']]}, it says: {finding['says']}.", "  ")
    if evidence["accuracies"]:
        accuracies = "; ".join(f"{a['method']} {a['scratch']:g} and {a['pruned']:g}" for a in evidence["accuracies"])
        lines += _wrapped(
            f"Zero-shot accuracy, scratch and pruned, at equal total tokens, one seed: {accuracies}.", "  "
        )
    return lines


def _costs(costs: Mapping[str, Any]) -> list[str]:
    money = "  money" if any(row["money"] is not None for row in costs["paths"]) else ""
    lines = [f"{'cost':30}  {'tokens':>9}  {'FLOPs':>13}{money}"]
    for row in [*costs["terms"], *costs["paths"]]:
        tokens = "-" if row["tokens"] is None else count(row["tokens"])
        flops = "not known" if row["flops"] is None else scientific(row["flops"])
        money = f"  {row['money']:,.2f}" if row["money"] is not None else ""
        lines.append(f"  {row['name']:28}  {tokens:>9}  {flops:>13}{money}")
    return [*lines, *_wrapped(costs["formula"], "  ")]


def _interval(interval: Mapping[str, float], *, sign: bool = False) -> str:
    value, low, high = ((signed(interval[k], 2) if sign else number(interval[k], 2)) for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _wrapped(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(line, _WIDTH, initial_indent=indent, subsequent_indent=indent + ("  " if indent else ""))
