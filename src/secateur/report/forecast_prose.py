"""Forecasts in words, and as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from secateur.comparison.naming import BUDGETS
from secateur.forecast.crossover import REACH, Crossover
from secateur.forecast.fit import NOISE, Interval
from secateur.forecast.ladder import AccountName, Forecast, Forecasts, Outlook, Standing
from secateur.forecast.ratios import MethodLaw
from secateur.formatting import count, decimals, loss, number
from secateur.report.prose import interval

__all__ = [
    "ACCOUNT_NAMES",
    "catches_up",
    "crossover_brief",
    "crossover_json",
    "forecasts_json",
    "further_sentence",
    "laws_json",
    "misfit_sentence",
    "next_sentence",
    "outlook_sentence",
    "standing_sentence",
]

#: What both paths have as much of on each account.
ACCOUNT_NAMES: dict[AccountName, str] = {
    "training": BUDGETS["training"],
    "total": BUDGETS["total"],
    "training-flops": "FLOPs, the parent sunk",
    "shared-flops": "FLOPs, the parent shared",
    "total-flops": "FLOPs, the parent charged",
}
_MISFIT = 4  # times the assumed noise, from which on the curves are said to fit badly
_PATHS = {"pruned": "pruning", "scratch": "training from scratch"}


def crossover_json(found: Crossover, scale: float = 1.0) -> dict[str, Any]:
    """A crossover as plain values, tokens times ``scale``; None for a budget beyond what the runs can tell."""
    budgets = {"budget": found.budget.value, "low": found.budget.low, "high": found.budget.high}
    budgets |= {"lowest": found.lowest, "horizon": found.horizon}
    return {
        "leader": found.leader,
        **{key: tokens * scale if math.isfinite(tokens) else None for key, tokens in budgets.items()},
    }


def catches_up(found: Mapping[str, Any]) -> str:
    """From which budget on the path behind has caught up, in a sentence, from :func:`crossover_json`."""
    low, high, end = found["low"], found["high"], f"{count(found['horizon'])} tokens"
    if found["leader"] is None:
        return f"Both are level at {count(found['lowest'])} tokens."
    behind = _PATHS["scratch" if found["leader"] == "pruned" else "pruned"]
    behind = behind[0].upper() + behind[1:]
    if low is None:
        return f"{behind} does not catch up within {end}."
    start = f"by {count(found['lowest'])}" if low <= found["lowest"] else f"from {count(low)}"
    if found["budget"] is None:
        return f"{behind} may catch up {start} tokens on, or not within {end}: beyond what these runs can tell."
    if high is None:
        return f"{behind} catches up at about R = {count(found['budget'])}, {start} tokens on or not within {end}."
    return f"{behind} catches up at about R = {count(found['budget'])} tokens ({count(low)} to {count(high)})."


def crossover_brief(found: Crossover | None) -> str:
    """The budget alone, with its interval, for a legend or a table."""
    if found is None:
        return "out of reach"
    budget, low, high = found.budget.value, found.budget.low, found.budget.high
    if math.isinf(low):
        return f"not within {count(found.horizon)}"
    if math.isinf(budget):
        return "cannot be told" if low <= found.lowest else f"not before {count(low)}"
    return f"{count(budget)} (" + (f"from {count(low)} on)" if math.isinf(high) else f"{count(low)} to {count(high)})")


def outlook_sentence(outlook: Outlook) -> str:
    """Where the path behind catches up on one account."""
    start = f"At equal {ACCOUNT_NAMES[outlook.allowance.account]}"
    if outlook.crossover is None:
        first = outlook.standings[0]
        return f"{start}: {_out_of_reach(first)}."
    told = catches_up(crossover_json(outlook.crossover))
    return f"{start}: {told[0].lower()}{told[1:]}"


def standing_sentence(standing: Standing, account: AccountName) -> str:
    """Who is ahead on one account at one budget, by how much, and what that rests on."""
    start = f"At equal {ACCOUNT_NAMES[account]} and R = {count(standing.tokens)}"
    difference = standing.difference
    if difference is None:
        return f"{start}: {_out_of_reach(standing)}."
    digits = decimals(difference.value, difference.low, difference.high)
    by = standing.basis if standing.basis == "measured" else f"by the fitted curves, {standing.basis}"
    if standing.winner == "too close to call":
        span = interval(difference.low, difference.high, digits)
        return f"{start}: too close to call, difference {number(difference.value, digits)} nats ({span}; {by})."
    near, far = sorted((abs(difference.low), abs(difference.high)))
    ahead = f"{_PATHS[standing.winner]} is ahead by {number(abs(difference.value), digits)} nats"
    return f"{start}: {ahead} ({interval(near, far, digits)}; {by})."


def _out_of_reach(standing: Standing) -> str:
    return (
        f"beyond what these runs can tell, since the twin would get {count(standing.scratch_tokens)} tokens, more than "
        f"{REACH} times the most that was run"
    )


def further_sentence(found: Forecast) -> str:
    """The loss of each path at the budget that was not run."""
    pruned, scratch = (_span(found.loss(path)) for path in ("pruned", "scratch"))
    return (
        f"At R = {count(found.further)}, twice the largest that was run: P-R {pruned}; from scratch on as many tokens "
        f"{scratch}."
    )


def _span(found: Interval) -> str:
    return f"{loss(found.value)} ({loss(found.low)} to {loss(found.high)})"


def next_sentence(found: Forecast) -> str:
    """Which further run would narrow the crossover at equal training tokens most."""
    run = found.next_run
    if run is None:
        return "No single further run would tell more of that crossover: every curve that fits these runs agrees on it."
    path = {"pruned": "P-R", "scratch": "from-scratch"}[run.path]
    return (
        f"What would tell most of that crossover: one more {path} run on {count(run.tokens)} tokens, expected to leave "
        f"{100 * run.width:.0f}% of its interval."
    )


def misfit_sentence(found: Forecast) -> str:
    """A warning where the runs lie off their curves by far more than noise; empty where they do not."""
    if found.fit.noise < _MISFIT * NOISE:
        return ""
    return (
        f"Beware: these runs scatter by {number(found.fit.noise, 2)} nats around the curves, where about "
        f"{number(NOISE, 2)} is noise. This law fits them badly, and what it says of other budgets is worth little."
    )


def forecasts_json(forecasts: Forecasts) -> dict[str, Any]:
    """Every ladder as plain values; None for what these runs cannot tell."""
    return {"forecasts": [_forecast_json(one) for one in forecasts.found], "not_forecast": list(forecasts.unfitted)}


def _forecast_json(found: Forecast) -> dict[str, Any]:
    return {
        **asdict(found.model),
        "objective": found.objective,
        "form": found.fit.form.name,
        "noise": found.fit.noise,
        "misfit": misfit_sentence(found) or None,
        "runs": len(found.fit.points),
        "budgets": {path: found.fit.budgets(path) for path in ("pruned", "scratch")},
        "further": {
            "tokens": found.further,
            "pruned": asdict(found.loss("pruned")),
            "scratch": asdict(found.loss("scratch")),
        },
        "accounts": [
            {
                "account": outlook.allowance.account,
                "crossover": None if outlook.crossover is None else crossover_json(outlook.crossover),
                "sentence": outlook_sentence(outlook),
                "budgets": [
                    {**asdict(standing), "sentence": standing_sentence(standing, outlook.allowance.account)}
                    for standing in outlook.standings
                ],
            }
            for outlook in found.outlooks
        ],
        "next_run": None if found.next_run is None else asdict(found.next_run),
    }


def laws_json(laws: Sequence[MethodLaw]) -> list[dict[str, Any]]:
    """The laws across ratios as plain values."""
    return [
        {
            "method": one.method,
            "objective": one.objective,
            "reason": one.reason or None,
            "runs": len(one.law.runs) if one.law else None,
            "parameters": [{**asdict(term), "told": term.told} for term in one.law.terms] if one.law else [],
            "folded": one.law.folded if one.law else {},
            "error": one.law.error if one.law else None,
            "left_out_error": one.left_out_error,
            "left_out": [
                {"ratio": run.run.ratio, "tokens": run.run.tokens, "error": run.error} for run in one.left_out
            ],
            "cannot_be_left_out": list(one.refused),
            "predictions": [asdict(prediction) for prediction in one.predictions],
        }
        for one in laws
    ]
