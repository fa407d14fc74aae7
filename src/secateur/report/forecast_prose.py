"""Forecasts as sentences and as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from secateur.comparison.naming import BUDGETS
from secateur.forecast.crossover import REACH, WORTH, Crossover
from secateur.forecast.curve import PATHS
from secateur.forecast.fit import Interval
from secateur.forecast.ladder import AccountName, Forecast, Forecasts, Outlook, Standing
from secateur.forecast.ratios import MethodLaw
from secateur.formatting import count, decimals, loss, number, scientific
from secateur.report.prose import interval

__all__ = [
    "ACCOUNT_NAMES",
    "catches_up",
    "crossover_brief",
    "forecasts_json",
    "further_sentence",
    "laws_json",
    "next_sentence",
    "outlook_sentence",
    "standing_sentence",
]

#: The quantity that is equal for both paths on each account.
ACCOUNT_NAMES: dict[AccountName, str] = {
    "training": BUDGETS["training"],
    "total": BUDGETS["total"],
    "training-flops": "FLOPs, the parent sunk",
    "shared-flops": "FLOPs, the parent shared",
    "total-flops": "FLOPs, the parent charged",
}
_PATHS = {"pruned": "pruning", "scratch": "training from scratch"}


def catches_up(crossover: Mapping[str, Any]) -> str:
    """A sentence on where the trailing path catches up, from its record (:meth:`Crossover.record`)."""
    low, high, horizon = crossover["low"], crossover["high"], count(crossover["horizon"])
    if crossover["leader"] is None:
        return f"Both paths are level at {count(crossover['lowest'])} tokens."
    path = _PATHS["scratch" if crossover["leader"] == "pruned" else "pruned"]
    path = path[0].upper() + path[1:]
    if low is None:
        return f"{path} does not catch up within {horizon} tokens."
    at_first = low <= crossover["lowest"]
    if at_first and high is None:
        return f"Undecided: these runs cannot tell whether or where {path[0].lower()}{path[1:]} catches up."
    start = f"{count(crossover['lowest'])} or less" if at_first else count(low)
    span = f"95%: {start} to " + (f"beyond {horizon}" if high is None else count(high))
    if crossover["budget"] is None:
        return f"{path} may catch up, but these runs cannot tell where ({span} tokens)."
    return f"{path} catches up at about R = {count(crossover['budget'])} tokens ({span})."


def crossover_brief(crossover: Crossover | None) -> str:
    """The crossover's budget and its interval, for a legend or a table."""
    if crossover is None:
        return "no forecast"
    budget, low, high = crossover.budget.value, crossover.budget.low, crossover.budget.high
    horizon = count(crossover.horizon)
    if math.isinf(low):
        return f"not within {horizon}"
    if low <= crossover.lowest and math.isinf(high):
        return "undecided"
    if math.isinf(budget):
        return "undecided" if low <= crossover.lowest else f"not before {count(low)}"
    return f"{count(budget)} ({count(low)} to {f'beyond {horizon}' if math.isinf(high) else count(high)})"


def outlook_sentence(outlook: Outlook) -> str:
    """Where the trailing path catches up on one account."""
    start = f"At equal {ACCOUNT_NAMES[outlook.allowance.account]}"
    if outlook.crossover is not None:
        text = catches_up(outlook.crossover.record())
        return f"{start}: {text[0].lower()}{text[1:]}"
    if outlook.standings[0].difference is None:
        return f"{start}: {_no_forecast(outlook.standings[0])}."
    if any(standing.basis == "measured" for standing in outlook.standings):
        return f"{start}: no crossover, because the fitted curves disagree with the measured comparisons."
    return f"{start}: no crossover, because budgets beyond the smallest are out of reach."


def standing_sentence(standing: Standing, account: AccountName) -> str:
    """Which path is ahead on one account at one budget, by how much, and whether that was measured or fitted."""
    start = f"At equal {ACCOUNT_NAMES[account]} and R = {count(standing.tokens)}"
    difference = standing.difference
    if difference is None:
        return f"{start}: {_no_forecast(standing)}."
    digits = decimals(difference.value, difference.low, difference.high)
    basis = standing.basis if standing.basis == "measured" else f"by the fitted curves, {standing.basis}"
    if standing.winner not in _PATHS:  # undecided, or measured to be equal
        span = interval(difference.low, difference.high, digits)
        return f"{start}: {standing.winner}, difference {number(difference.value, digits)} nats ({span}; {basis})."
    near, far = sorted((abs(difference.low), abs(difference.high)))
    lead = f"{_PATHS[standing.winner]} is ahead by {number(abs(difference.value), digits)} nats"
    return f"{start}: {lead} ({interval(near, far, digits)}; {basis})."


def _no_forecast(standing: Standing) -> str:
    return (
        f"out of reach, because R = {count(standing.tokens)} or the twin's {count(standing.scratch_tokens)} tokens lie "
        f"below the budgets of that path or beyond {REACH} times the largest"
    )


def further_sentence(forecast: Forecast) -> str:
    """Who is ahead at twice the largest budget run at equal training tokens, with the expected losses."""
    standing = forecast.outlooks[0].further
    pruned, scratch = forecast.loss("pruned"), forecast.loss("scratch")
    if pruned is None or scratch is None:
        return standing_sentence(standing, "training")
    return (
        f"{standing_sentence(standing, 'training')} Expected losses there: P-R {_loss_with_interval(pruned)}; from "
        f"scratch {_loss_with_interval(scratch)}."
    )


def _loss_with_interval(estimate: Interval) -> str:
    return f"{loss(estimate.value)} ({loss(estimate.low)} to {loss(estimate.high)})"


def next_sentence(forecast: Forecast) -> str:
    """The further run that would narrow the crossover at equal training tokens most, with its cost."""
    run = forecast.next_run
    if run is None:
        return (
            "No single further run is worth naming: the crossover at equal training tokens is out of reach, or no run "
            f"would shrink its interval to {100 * WORTH:.0f}% of its width."
        )
    path = {"pruned": "P-R", "scratch": "from scratch"}[run.path]
    flops = f", {scientific(run.flops)} FLOPs" if run.flops else ""
    return (
        f"Most informative next run for equal training tokens: {path} on {count(run.tokens)} tokens{flops}. It should "
        f"shrink the interval to {100 * run.width:.0f}% of its width."
    )


def forecasts_json(forecasts: Forecasts) -> dict[str, Any]:
    """Every ladder as plain values; None for what these runs do not determine."""
    return {
        "forecasts": [_forecast_json(forecast) for forecast in forecasts.fitted],
        "not_forecast": list(forecasts.unfitted),
    }


def _forecast_json(forecast: Forecast) -> dict[str, Any]:
    return {
        **asdict(forecast.model),
        "objective": forecast.objective,
        "forms": {f.name: float(w) for f, w in zip(forecast.fit.forms, forecast.fit.weights, strict=True)},
        "noise": forecast.fit.noise,
        "runs": len(forecast.fit.points),
        "budgets": {path: forecast.fit.budgets(path) for path in ("pruned", "scratch")},
        "further": {
            "tokens": forecast.further,
            **{path: asdict(estimate) if (estimate := forecast.loss(path)) else None for path in PATHS},
        },
        "accounts": [
            {
                "account": outlook.allowance.account,
                "crossover": None if outlook.crossover is None else outlook.crossover.record(),
                "sentence": outlook_sentence(outlook),
                "budgets": [
                    {**asdict(standing), "sentence": standing_sentence(standing, outlook.allowance.account)}
                    for standing in outlook.standings
                ],
            }
            for outlook in forecast.outlooks
        ],
        "next_run": None if forecast.next_run is None else asdict(forecast.next_run),
    }


def laws_json(laws: Sequence[MethodLaw]) -> list[dict[str, Any]]:
    """The laws across ratios as plain values."""
    return [
        {
            "method": row.method,
            "objective": row.objective,
            "reason": row.reason or None,
            "runs": len(row.law.runs) if row.law else None,
            "parameters": [{**asdict(term), "told": term.identified} for term in row.law.terms] if row.law else [],
            "folded": row.law.folded if row.law else {},
            "error": row.law.error if row.law else None,
            "left_out_error": row.left_out_error,
            "left_out": [
                {"ratio": run.run.ratio, "tokens": run.run.tokens, "error": run.error} for run in row.left_out
            ],
            "cannot_be_left_out": list(row.refused),
            "predictions": [asdict(prediction) for prediction in row.predictions],
        }
        for row in laws
    ]
