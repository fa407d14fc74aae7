"""Fit both curves of a pair to finished runs, with the uncertainty that the runs leave.

Few points cannot tell all parameters of the law. So each has a prior, wide and the same for all curves, and what the
points leave open is open in the draws of a :class:`Fit` as well. docs/prediction.md lists the assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import UserError, did_you_mean
from secateur.forecast.curve import CURVE_FORMS, PATHS, CurvePoint, Floats, Form, Path, Problem, law

__all__ = [
    "DEFAULT_FORM",
    "DRAWS",
    "LEVEL",
    "NOISE",
    "Fit",
    "Interval",
    "LeftOut",
    "fit_pair",
    "leave_last_out",
    "pairs",
    "percentile_interval",
]

#: Chosen by leave-last-out on the published ladder; docs/prediction.md has the errors of all.
DEFAULT_FORM = "shared-floor"
LEVEL = 0.95  #: of every interval
DRAWS = 400  #: of the bootstrap
NOISE = 0.01  #: standard deviation of a run's loss between seeds, in nats, as far as the runs do not tell

_NOISE_WEIGHT = 4  # the assumed noise counts as so many degrees of freedom, beside those of the runs
_SEED = 42


@dataclass(frozen=True)
class Interval:
    """A figure with its interval at :data:`LEVEL`."""

    value: float
    low: float
    high: float


def percentile_interval(value: float, draws: Floats) -> Interval:
    """``value`` with the percentile interval of its draws, which may hold infinities; it never lies outside."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), method="inverted_cdf")
    return Interval(value, min(float(low), value), max(float(high), value))


@dataclass(frozen=True)
class Fit:
    """The two curves of one pair, and other curves that the same runs could have come from.

    Attributes:
        form: what was fitted.
        points: the runs.
        scale: ``D_0``, tokens.
        noise: standard deviation of a run's loss, in nats: the assumed one and that of the runs, pooled.
        best: each path's curve ``[2, 4]`` (scratch first): E and G in nats, alpha, H over ``D_0``.
        draws: the same for each draw of the bootstrap, ``[draws, 2, 4]``.
    """

    form: Form
    points: tuple[CurvePoint, ...]
    scale: float
    noise: float
    best: Floats
    draws: Floats

    def loss(self, path: Path, tokens: float | Floats) -> Floats:
        """The fitted loss, in nats per token, after ``tokens`` of training."""
        return law(self.best[PATHS.index(path)], np.asarray(tokens, dtype=float) / self.scale)

    def loss_draws(self, path: Path, tokens: float | Floats) -> Floats:
        """The same for each draw: ``[draws, *shape of tokens]``."""
        budgets = np.asarray(tokens, dtype=float)
        curves = self.draws[:, PATHS.index(path)].T
        return law(curves.reshape(4, -1, *[1] * budgets.ndim), budgets / self.scale)

    def at(self, path: Path, tokens: float) -> Interval:
        """The loss at a budget, with what the fit leaves open; a single run scatters by ``noise`` around it."""
        return percentile_interval(float(self.loss(path, tokens)), self.loss_draws(path, tokens))

    def budgets(self, path: Path) -> list[int]:
        """The budgets that were run, in tokens, rising."""
        return sorted({p.tokens for p in self.points if p.path == path})


def pairs(points: Sequence[CurvePoint]) -> dict[tuple[str, float], list[CurvePoint]]:
    """The points by method and ratio: what a pruned model is compared with has its shape, or its mask."""
    groups: dict[tuple[str, float], list[CurvePoint]] = {}
    for point in points:
        groups.setdefault((point.method, point.ratio), []).append(point)
    return groups


def fit_pair(
    points: Sequence[CurvePoint],
    form: str = DEFAULT_FORM,
    *,
    parent_loss: float | None = None,
    noise: float | None = None,
    draws: int = DRAWS,
) -> Fit:
    """Fit both curves of one pair of paths together.

    The best curve has the least sum of Huber losses of the deviations, in logarithms of the loss and over the noise,
    of points and priors alike; it is the best of several starts. Each draw fits anew what the runs might have shown:
    every point moved by normal noise of a size that is itself drawn, every prior's centre by the prior's width. For
    a linear law this draws from the posterior, and for this one nearly. The same points give the same draws.

    Args:
        points: finished runs of one method and ratio, both paths among them.
        form: a name in :data:`FORMS`.
        parent_loss: held-out loss of the parent, in nats; for the form ``parent-floor``.
        noise: standard deviation of a run's loss, in nats; :data:`NOISE` and what the runs tell, unless given.

    Raises:
        UserError: on an unknown form, too few points, or points that contradict one another.
    """
    if form not in CURVE_FORMS:
        raise UserError(f"form: {form!r} is not known{did_you_mean(form, CURVE_FORMS)}")
    if CURVE_FORMS[form].floor == "parent" and parent_loss is None:
        raise UserError(f"form {form}: needs the parent's held-out loss")
    _check(points)
    points = tuple(sorted(points, key=lambda p: (p.path, p.tokens, p.seed, p.name)))  # their order tells nothing
    problem = Problem(points, CURVE_FORMS[form], parent_loss)
    deviation, freedom = noise or NOISE, _NOISE_WEIGHT
    best = problem.solve(problem.losses, problem.centres, deviation, problem.starts())
    if noise is None:
        deviation, freedom = _pooled_noise(points, problem, best)
        best = problem.solve(problem.losses, problem.centres, deviation, [best, *problem.starts()])
    random = np.random.default_rng(_SEED)
    sizes, losses, centres = np.empty(draws), np.empty((draws, len(points))), np.empty((draws, len(best)))
    for draw in range(draws):
        sizes[draw] = deviation if noise else deviation * math.sqrt(freedom / random.chisquare(freedom))
        moved = sizes[draw] / problem.losses * random.standard_normal(len(points))
        losses[draw] = problem.losses * np.exp(moved)  # in logarithms, as the fit has it: no loss falls below zero
        centres[draw] = problem.centres + problem.widths * random.standard_normal(len(best))
    curves = problem.curves(problem.solve_many(losses, centres, sizes, best))
    return Fit(CURVE_FORMS[form], points, problem.scale, deviation, problem.curves(best), curves)


def _pooled_noise(points: Sequence[CurvePoint], problem: Problem, best: Floats) -> tuple[float, int]:
    """The noise that the runs show, pooled with the assumed one, and its degrees of freedom.

    Runs show it in their distance from the fit where they outnumber its parameters, else in that between seeds.
    """
    freedom = len(points) - len(best)
    apart = problem.losses - problem.fitted(best)
    if freedom <= 0:
        groups: dict[tuple[str, int], list[float]] = {}
        for p in points:
            groups.setdefault((p.path, p.tokens), []).append(p.loss)
        apart = np.concatenate([np.array(losses) - np.mean(losses) for losses in groups.values()])
        freedom = len(points) - len(groups)
    square = float(np.sum(apart**2)) + _NOISE_WEIGHT * NOISE**2
    return math.sqrt(square / (freedom + _NOISE_WEIGHT)), freedom + _NOISE_WEIGHT


def _check(points: Sequence[CurvePoint]) -> None:
    """Refuse points that are not those of one pair."""
    who = " and ".join(f"{method} at ratio {ratio:g}" for method, ratio in pairs(points)) or "no run"
    if len(pairs(points)) != 1:
        raise UserError(f"curves: a pair of paths is of one method and ratio, not {who}")
    keys: set[tuple[str, str, int, int]] = set()
    for p in points:
        if not (math.isfinite(p.loss) and p.loss > 0) or p.tokens < 1:
            raise UserError(f"{who}: a run of {p.tokens} tokens with a loss of {p.loss} cannot be fitted; leave it out")
        if (p.path, p.name, p.tokens, p.seed) in keys:
            raise UserError(f"{who}: two {p.path} runs of {p.tokens} tokens have seed {p.seed}; keep one of them")
        keys.add((p.path, p.name, p.tokens, p.seed))
    budgets = {path: len({p.tokens for p in points if p.path == path}) for path in PATHS}
    missing = [path for path, number in budgets.items() if not number]
    if missing:
        raise UserError(f"{who}: no finished {missing[0]} run; a comparison needs both paths")
    if sum(budgets.values()) < 3:
        raise UserError(f"{who}: two finished runs tell no curve; run one of the paths at another budget as well")


@dataclass(frozen=True)
class LeftOut:
    """A run that was left out of a fit, and what the fit of the shorter ones says of it."""

    point: CurvePoint
    predicted: Interval

    @property
    def error(self) -> float:
        """Predicted less measured, in nats."""
        return self.predicted.value - self.point.loss


def leave_last_out(
    points: Sequence[CurvePoint],
    form: str = DEFAULT_FORM,
    *,
    last: int = 1,
    parent_loss: float | None = None,
    draws: int = DRAWS,
) -> list[LeftOut]:
    """Leave the longest runs of each curve out and predict them from the others.

    Args:
        points: finished runs of any number of pairs.
        form: a name in :data:`FORMS`.
        last: how many budgets of each path are left out, the largest ones.

    Returns:
        The runs that were left out, pair by pair. A pair of which too little would be left is not among them.
    """
    predictions = []
    for group in pairs(points).values():
        out = {path: sorted({p.tokens for p in group if p.path == path})[-last:] for path in PATHS}
        shorter_runs = [p for p in group if p.tokens not in out[p.path]]
        if {p.path for p in shorter_runs} == set(PATHS) and len({(p.path, p.tokens) for p in shorter_runs}) > 2:
            shorter = fit_pair(shorter_runs, form, parent_loss=parent_loss, draws=draws)
            predictions += [LeftOut(p, shorter.at(p.path, p.tokens)) for p in group if p.tokens in out[p.path]]
    return predictions
