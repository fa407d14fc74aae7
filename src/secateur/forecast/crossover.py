"""Predict which path is ahead at a budget, where the other catches up, and which further run is most informative.

``R`` is the budget of the pruned model. The from-scratch model gets ``rate * R + extra`` tokens: none extra at equal
training tokens, those of the parent at equal total tokens, or as many as the parent's FLOPs would pay for; the rate is
one unless a token of retraining costs other FLOPs than one from scratch, as under a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from secateur.forecast.curve import PATHS, Floats, Path
from secateur.forecast.fit import LEVEL, Curves, Interval, percentile_interval

__all__ = [
    "REACH",
    "WORTH",
    "Crossover",
    "Lead",
    "NextRun",
    "crossover",
    "lead",
    "narrowing",
    "next_runs",
    "within_reach",
]

#: There is a verdict, a crossover or a loss up to this many times the largest budget that a path was run on. Up to
#: there the intervals of the difference held 90% of truths or more for each kind of truth that was tried, also where no
#: form is right; below the smallest budget they held less (docs/prediction.md, "Whether the intervals hold").
REACH = 4
WORTH = 0.9  #: a further run is worth naming if it shrinks the interval to this share of its width or less

_GRID = 300  # budgets looked at, evenly spread in the logarithm
_TRUTHS = 100  # draws that are taken for the truth, one after the other, to see what a further run would tell
_SEED = 42


@dataclass(frozen=True)
class Lead:
    """Who is ahead at one budget within reach. A forecast never says that the paths are equal."""

    difference: Interval  #: loss(scratch) - loss(pruned), nats per token: positive where pruning is ahead
    likely_pruned: float  #: share of the draws in which it is

    @property
    def winner(self) -> Literal["pruned", "scratch", "undecided"]:
        """The path ahead, if the whole interval says so."""
        low, high = self.difference.low, self.difference.high
        return "pruned" if low > 0 else "scratch" if high < 0 else "undecided"


@dataclass(frozen=True)
class Crossover:
    """Where the path that is behind at the smallest budget catches up with the other.

    Attributes:
        leader: the path ahead at ``lowest``, by the best curves; None where they are level.
        budget: R, in tokens, of the first budget at which the other is no worse: ``lowest`` where it is so from the
            start, infinite where it is not so up to ``horizon``.
        lowest: the smallest budget that is looked at: the smallest within the runs of both paths.
        horizon: the largest: there the budget of one path is :data:`REACH` times the largest that it was run on.
        draws: the budget of each draw.
    """

    leader: Path | None
    budget: Interval
    lowest: float
    horizon: float
    draws: Floats

    def record(self, scale: float = 1.0) -> dict[str, Any]:
        """Plain values, tokens times ``scale``; None for a budget beyond the horizon."""
        budgets = {"budget": self.budget.value, "low": self.budget.low, "high": self.budget.high}
        budgets |= {"lowest": self.lowest, "horizon": self.horizon}
        tokens = {key: value * scale if math.isfinite(value) else None for key, value in budgets.items()}
        return {"leader": self.leader, **tokens}


def within_reach(curves: Curves, tokens: float, scratch_tokens: float) -> bool:
    """Whether both budgets lie between the smallest and :data:`REACH` times the largest that their path was run on.

    Args:
        tokens: R, of the pruned model.
        scratch_tokens: of the model from scratch.
    """
    for path in PATHS:
        budget, budgets = tokens if path == "pruned" else scratch_tokens, curves.budgets(path)
        if not budgets[0] <= budget <= REACH * budgets[-1]:
            return False
    return True


def lead(curves: Curves, tokens: float, extra: float = 0.0, rate: float = 1.0) -> Lead | None:
    """Compare the paths at R = ``tokens``, where the from-scratch model gets ``rate * tokens + extra``.

    Returns:
        Who is ahead; None out of reach, and where the runs lie too far off the curves (:attr:`Curves.poor`).
    """
    scratch_tokens = rate * tokens + extra
    if curves.poor or not within_reach(curves, tokens, scratch_tokens):
        return None
    draws = curves.loss_draws("scratch", scratch_tokens) - curves.loss_draws("pruned", tokens)
    best = float(curves.loss("scratch", scratch_tokens) - curves.loss("pruned", tokens))
    return Lead(percentile_interval(best, draws), float(np.mean(draws > 0)))


def crossover(curves: Curves, extra: float = 0.0, rate: float = 1.0) -> Crossover | None:
    """Find where the path behind catches up, where the from-scratch model gets ``rate * R + extra`` tokens.

    Returns:
        The crossover; None where no R is in reach (:func:`within_reach`), and where the runs lie too far off the
        curves.
    """
    pruned, scratch = curves.budgets("pruned"), curves.budgets("scratch")
    lowest = max(float(pruned[0]), (scratch[0] - extra) / rate)
    horizon = min(float(REACH * pruned[-1]), (REACH * scratch[-1] - extra) / rate)
    if curves.poor or horizon <= lowest:
        return None
    budgets = np.geomspace(lowest, horizon, _GRID)
    scratch_tokens = rate * budgets + extra
    ahead = curves.loss("scratch", scratch_tokens) - curves.loss("pruned", budgets)
    draws = curves.loss_draws("scratch", scratch_tokens) - curves.loss_draws("pruned", budgets)
    leader: Path | None = "pruned" if ahead[0] > 0 else "scratch" if ahead[0] < 0 else None
    sign = -1.0 if leader == "scratch" else 1.0
    crossings = _first_not_above(sign * np.vstack([ahead, draws]), budgets)
    return Crossover(leader, percentile_interval(float(crossings[0]), crossings[1:]), lowest, horizon, crossings[1:])


def _first_not_above(leads: Floats, budgets: Floats) -> Floats:
    """For each row the first budget at which it is zero or less, between two of them by their logarithms."""
    under = leads <= 0
    at = np.where(under.any(axis=1), under.argmax(axis=1), -1)
    crossings = np.full(len(leads), math.inf)
    crossings[at == 0] = budgets[0]
    rows = np.flatnonzero(at > 0)
    before, after = leads[rows, at[rows] - 1], leads[rows, at[rows]]
    logs = np.log(budgets)
    step = logs[1] - logs[0]
    crossings[rows] = np.exp(logs[at[rows] - 1] + step * before / (before - after))
    return crossings


@dataclass(frozen=True)
class NextRun:
    """What one more run would be expected to do to an interval."""

    path: Path
    tokens: int
    width: float  #: of the interval after it, as a share of what it is now; a mean over what the run may show
    flops: float | None = None  #: of training; None where a token's FLOPs are not known


def next_runs(curves: Curves, quantity: Floats, candidates: Sequence[tuple[Path, int]] | None = None) -> list[NextRun]:
    """Rank further runs by how much each would narrow the interval of ``quantity``, the best first.

    Each of many draws is taken for the truth. The run then shows that draw's loss with noise, and the draws are
    weighted by how well they agree with it; the interval is that of the weighted draws. It is what adding the run and
    fitting again comes to, without the fitting.

    Args:
        quantity: what is to be told, for each draw; finite.
        candidates: path and tokens of each run; unless given, every budget of either path once more, those halfway
            between neighbours, and twice the largest.

    Returns:
        The runs; none where there is nothing to narrow.
    """
    order = np.argsort(quantity, kind="stable")
    values = quantity[order]
    width = _width(values, np.full((1, len(values)), 1 / len(values)))[0]
    if width == 0:
        return []
    truths = np.linspace(0, len(values) - 1, min(_TRUTHS, len(values))).astype(int)
    noise = curves.noise * np.random.default_rng(_SEED).standard_normal(len(truths))
    runs = []
    for path, tokens in candidates or _candidates(curves):
        losses = curves.loss_draws(path, tokens)[order]
        outcomes = losses[truths] + noise
        agreement = np.exp(-0.5 * ((losses - outcomes[:, None]) / curves.noise) ** 2)
        then = _width(values, agreement / agreement.sum(axis=1, keepdims=True))
        runs.append(NextRun(path, tokens, float(np.mean(then) / width)))
    return sorted(runs, key=lambda run: (run.width, run.tokens, run.path))


def narrowing(curves: Curves, crossing: Crossover | None) -> list[NextRun]:
    """The further runs that would tell something of a crossover, the best first.

    A run counts if it should shrink the interval of the crossover's logarithm to :data:`WORTH` of its width or less; a
    draw without a crossover counts as the horizon. There is none where the crossover itself is out of reach.
    """
    if crossing is None or not crossing.lowest < crossing.budget.value <= crossing.horizon:
        return []
    runs = next_runs(curves, np.log(np.minimum(crossing.draws, crossing.horizon)))
    return [run for run in runs if run.width <= WORTH]


def _candidates(curves: Curves) -> list[tuple[Path, int]]:
    every = sorted({p.tokens for p in curves.points})
    between = [round(math.sqrt(a * b)) for a, b in pairwise(every) if b > 1.5 * a]
    return [(path, tokens) for path in PATHS for tokens in sorted({*every, *between, 2 * every[-1]})]


def _width(values: Floats, weights: Floats) -> Floats:
    """Width of the interval of rising ``values`` under each row of weights."""
    tail = (1 - LEVEL) / 2
    sums = np.cumsum(weights, axis=1)
    low, high = ((sums < q).sum(axis=1).clip(max=len(values) - 1) for q in (tail, 1 - tail))
    return values[high] - values[low]
