"""Fit both curves of a pair to finished runs, with the uncertainty that the runs leave.

Few points cannot tell all parameters of the law, nor which form is right. So each parameter has a prior, wide and the
same for all curves, and every form has a share of the draws of a :class:`Fit`, a small one where it fits badly.
docs/prediction.md lists the assumptions, and how often intervals hold where the forms are wrong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import UserError, did_you_mean
from secateur.forecast.curve import CURVE_FORMS, PATHS, CurvePoint, Floats, Form, Path, Problem, law
from secateur.formatting import number, plural

__all__ = [
    "AVERAGED_FORMS",
    "DRAWS",
    "LEVEL",
    "MISFIT",
    "NOISE",
    "Curves",
    "Fit",
    "Interval",
    "LeftOut",
    "far_off",
    "fit_pair",
    "has_enough_runs",
    "leave_last_out",
    "noise_between_seeds",
    "pairs",
    "percentile_interval",
]

#: The forms that forecasts average over: all that need no loss of the parent.
AVERAGED_FORMS = tuple(name for name, form in CURVE_FORMS.items() if form.floor != "parent")
LEVEL = 0.95  #: of every interval
DRAWS = 400  #: of the bootstrap, shared by the forms
NOISE = 0.01  #: standard deviation of a run's loss between seeds, in nats, as far as the runs do not tell
MISFIT = 4  #: a fit whose runs are off any curve by this many times the noise has no figures

_NEAR_BEST = 1.5  # a form fits badly if the runs scatter around it by more than so many times the best form's scatter
_NEAR_NOISE = 2.5  # and so many times the noise
_BAD_WEIGHT = 0.1  # of a form that fits badly, beside 1: with few runs it may still be the right one
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


class Curves(ABC):
    """The loss of both paths by their training tokens, with draws of what it could be.

    Attributes:
        points: the finished runs behind the curves.
        noise: standard deviation of a run's loss, in nats.
        misfit: why the curves tell nothing, in words; empty where the runs are on them.
    """

    points: tuple[CurvePoint, ...]
    noise: float
    misfit: str

    @property
    def poor(self) -> bool:
        """Whether the runs are off any curve, so that every figure is to be withheld."""
        return bool(self.misfit)

    @abstractmethod
    def loss(self, path: Path, tokens: float | Floats) -> Floats:
        """The expected loss, in nats per token, after ``tokens`` of training."""

    @abstractmethod
    def loss_draws(self, path: Path, tokens: float | Floats) -> Floats:
        """The same for each draw: ``[draws, *shape of tokens]``."""

    def at(self, path: Path, tokens: float) -> Interval:
        """The loss at a budget, with what the fit leaves open; a single run scatters by ``noise`` around it."""
        return percentile_interval(float(self.loss(path, tokens)), self.loss_draws(path, tokens))

    def budgets(self, path: Path) -> list[int]:
        """The budgets that were run, in tokens, rising."""
        return sorted({p.tokens for p in self.points if p.path == path})


@dataclass(frozen=True)
class Fit(Curves):
    """The two curves of one pair, and other curves that the same runs could have come from.

    Attributes:
        forms: that were averaged over.
        weights: of each form; they sum to 1.
        points: the runs.
        scale: ``D_0``, tokens.
        noise: standard deviation of a run's loss, in nats: the assumed one and that of the runs, pooled.
        scatter: of the runs around the curves of the best form, in nats, pooled with the noise.
        misfit: why the curves tell nothing: the scatter is :data:`MISFIT` times the noise that the assumption and
            several seeds tell, or more, or the loss from scratch falls faster and faster by as much.
        best: each path's curve by each form ``[forms, 2, 4]`` (scratch first): E and G in nats, alpha, H over ``D_0``.
        draws: the same for each draw of the bootstrap, ``[draws, 2, 4]``.
    """

    forms: tuple[Form, ...]
    weights: Floats
    points: tuple[CurvePoint, ...]
    scale: float
    noise: float
    scatter: float
    misfit: str
    best: Floats
    draws: Floats

    def loss(self, path: Path, tokens: float | Floats) -> Floats:
        """The weighted mean over the forms of the fitted loss, in nats per token."""
        return np.tensordot(self.weights, self._losses(self.best, path, tokens), 1)

    def loss_draws(self, path: Path, tokens: float | Floats) -> Floats:
        """The loss by each draw: ``[draws, *shape of tokens]``."""
        return self._losses(self.draws, path, tokens)

    def _losses(self, curves: Floats, path: Path, tokens: float | Floats) -> Floats:
        budgets = np.asarray(tokens, dtype=float)
        return law(curves[:, PATHS.index(path)].T.reshape(4, -1, *[1] * budgets.ndim), budgets / self.scale)


def pairs(points: Sequence[CurvePoint]) -> dict[tuple[str, float], list[CurvePoint]]:
    """The points by method and ratio: what a pruned model is compared with has its shape, or its mask."""
    groups: dict[tuple[str, float], list[CurvePoint]] = {}
    for point in points:
        groups.setdefault((point.method, point.ratio), []).append(point)
    return groups


def has_enough_runs(points: Sequence[CurvePoint]) -> bool:
    """Whether a pair has runs of both paths, and three budgets or more in all."""
    budgets = {(p.path, p.tokens) for p in points}
    return {path for path, _ in budgets} == set(PATHS) and len(budgets) > 2


def fit_pair(
    points: Sequence[CurvePoint],
    forms: Sequence[str] = AVERAGED_FORMS,
    *,
    parent_loss: float | None = None,
    noise: float | None = None,
    draws: int = DRAWS,
) -> Fit:
    """Fit both curves of one pair of paths together, by every form, and average over the forms.

    The best curve of a form has the least sum of Huber losses of the deviations, in logarithms of the loss and over
    the noise, of points and priors alike; it is the best of several starts. All forms
    weigh the same, but for those around which the runs scatter by more than 1.5 times what they do around the best form
    and more than 2.5 times the noise: those weigh a tenth. Each draw fits anew what the runs might have shown: every
    point moved by normal noise of a size that is itself drawn, every prior's centre by the prior's width. For a linear
    law this draws from the posterior, and for this one nearly. The same points give the same draws.

    Args:
        points: finished runs of one method and ratio, both paths among them.
        forms: names in :data:`CURVE_FORMS`.
        parent_loss: held-out loss of the parent, in nats; for the form ``parent-floor``.
        noise: standard deviation of a run's loss, in nats; :data:`NOISE` and what the runs tell, unless given.
        draws: how many, shared by the forms according to their weights.

    Raises:
        UserError: on an unknown form, too few points, or points that contradict one another.
    """
    for form in forms:
        if form not in CURVE_FORMS:
            raise UserError(f"form: {form!r} is not known{did_you_mean(form, CURVE_FORMS)}")
        if CURVE_FORMS[form].floor == "parent" and parent_loss is None:
            raise UserError(f"form {form}: needs the parent's held-out loss")
    _check(points)
    points = tuple(sorted(points, key=lambda p: (p.path, p.tokens, p.seed, p.name)))  # their order tells nothing
    fits = [_FormFit.of(Problem(points, CURVE_FORMS[form], parent_loss), CURVE_FORMS[form], noise) for form in forms]
    scatter = min(fit.scatter for fit in fits)
    most = max(_NEAR_BEST * scatter, _NEAR_NOISE * (noise or NOISE))
    fair = np.array([fit.scatter <= most for fit in fits])
    weights = np.where(fair, 1.0, _BAD_WEIGHT)
    weights /= weights.sum()
    random = np.random.default_rng(_SEED)
    numbers = np.diff(np.round(draws * np.cumsum([0, *weights])).astype(int))
    return Fit(
        forms=tuple(fit.form for fit in fits),
        weights=weights,
        points=points,
        scale=fits[0].problem.scale,
        noise=math.sqrt(float(np.mean([fit.noise**2 for fit, good in zip(fits, fair, strict=True) if good]))),
        scatter=scatter,
        misfit=_misfit(points, scatter, noise or _noise_of_seeds(points)[0]),
        best=np.stack([fit.problem.curves(fit.best) for fit in fits]),
        draws=np.concatenate([fit.draw(random, number) for fit, number in zip(fits, numbers, strict=True) if number]),
    )


@dataclass(frozen=True)
class _FormFit:
    """The best curves of one form."""

    problem: Problem
    form: Form
    best: Floats  #: the vector of the problem
    noise: float  #: of a run, in nats
    freedom: int | None  #: degrees of freedom of the noise; None: it is known
    scatter: float  #: of the runs around the curves, pooled with the assumed noise

    @classmethod
    def of(cls, problem: Problem, form: Form, noise: float | None) -> _FormFit:
        """Fit; ``noise`` is that of a run where it is known, and else told by the runs."""
        best = problem.solve(problem.losses, problem.centres, noise or NOISE, problem.starts())
        if noise is not None:
            return cls(problem, form, best, noise, None, _scatter(problem, best, noise))
        size, freedom = _pooled_noise(problem, best)
        best = problem.solve(problem.losses, problem.centres, size, [best, *problem.starts()])
        return cls(problem, form, best, size, freedom, _scatter(problem, best, NOISE))

    def draw(self, random: np.random.Generator, draws: int) -> Floats:
        """Fit anew what the runs might have shown: curves ``[draws, 2, 4]``."""
        problem, shape = self.problem, (draws, len(self.problem.losses))
        sizes = np.full(draws, self.noise)
        if self.freedom is not None:
            sizes *= np.sqrt(self.freedom / random.chisquare(self.freedom, draws))
        moves = sizes[:, None] / problem.losses * random.standard_normal(shape)
        losses = problem.losses * np.exp(moves)  # in logarithms, as the fit has it: no loss falls below zero
        centres = problem.centres + problem.widths * random.standard_normal((draws, len(self.best)))
        return problem.curves(problem.solve_many(losses, centres, sizes, self.best))


def _pooled_noise(problem: Problem, best: Floats) -> tuple[float, int]:
    """The noise that the runs show, pooled with the assumed one, and its degrees of freedom.

    Runs show it in their distance from the fit where they outnumber its parameters, else in that between seeds.
    """
    freedom = len(problem.losses) - len(best)
    return _pool(_squares(problem, best), freedom) if freedom > 0 else _noise_of_seeds(problem.points)


def _scatter(problem: Problem, best: Floats, noise: float) -> float:
    """The distance of the runs from the fit, pooled with ``noise``, even where no freedom is left."""
    return _pool(_squares(problem, best), max(len(problem.losses) - len(best), 0), noise)[0]


def _squares(problem: Problem, best: Floats) -> float:
    return float(np.sum((problem.losses - problem.fitted(best)) ** 2))


def _noise_of_seeds(points: Sequence[CurvePoint]) -> tuple[float, int]:
    groups: dict[tuple[str, int], list[float]] = {}
    for p in points:
        groups.setdefault((p.path, p.tokens), []).append(p.loss)
    return noise_between_seeds(groups.values())


def _misfit(points: Sequence[CurvePoint], scatter: float, noise: float) -> str:
    """Why no curve fits, in words; empty where one does."""
    if scatter >= MISFIT * noise:
        return far_off(scatter, noise, "any curve")
    if _acceleration(points, noise) >= MISFIT:
        return "its loss from scratch falls faster and faster with the logarithm of the tokens, as no curve here does"
    return ""


def far_off(scatter: float, noise: float, law: str) -> str:
    """Why a fit is withheld: its runs scatter by ``scatter`` nats where ``noise`` is that of a run."""
    return (
        f"its runs scatter by {number(scatter, 3)} nats around {law}, {MISFIT} times the noise of a run "
        f"({number(noise, 3)}) or more"
    )


def _acceleration(points: Sequence[CurvePoint], noise: float) -> float:
    """How much faster the loss from scratch falls after a budget than before it, in standard deviations of the noise.

    By the logarithm of the tokens; the largest over the budgets. Every law falls ever slower, whatever its floor and
    exponent.
    """
    losses: dict[int, list[float]] = {}
    for p in sorted(points, key=lambda p: p.tokens):
        if p.path == "scratch":
            losses.setdefault(p.tokens, []).append(p.loss)
    ends = np.log(list(losses))
    means = np.array([np.mean(group) for group in losses.values()])
    spreads = noise / np.sqrt([len(group) for group in losses.values()])
    first, second = 1 / np.diff(ends)[:-1], 1 / np.diff(ends)[1:]
    weights = np.stack([first, -first - second, second])  # of the losses at three budgets, in the change of the slope
    triples = np.stack([np.arange(len(first)) + i for i in range(3)])
    changes = np.sum(weights * means[triples], axis=0)
    deviations = np.sqrt(np.sum((weights * spreads[triples]) ** 2, axis=0))
    return float(np.max(-changes / deviations, initial=0.0))


def noise_between_seeds(groups: Collection[Sequence[float]]) -> tuple[float, int]:
    """The noise within groups of losses that differ by the seed alone, pooled with the assumed one.

    Returns:
        The standard deviation, nats, and its degrees of freedom.
    """
    squares = sum(float(np.sum((np.array(losses) - np.mean(losses)) ** 2)) for losses in groups)
    return _pool(squares, sum(map(len, groups)) - len(groups))


def _pool(squares: float, freedom: int, noise: float = NOISE) -> tuple[float, int]:
    return math.sqrt((squares + _NOISE_WEIGHT * noise**2) / (freedom + _NOISE_WEIGHT)), freedom + _NOISE_WEIGHT


def _check(points: Sequence[CurvePoint]) -> None:
    """Refuse points that are not those of one pair."""
    who = " and ".join(f"{method} at ratio {ratio:g}" for method, ratio in pairs(points)) or "no run"
    if len(pairs(points)) != 1:
        raise UserError(f"curves: a pair of paths is of one method and ratio, not {who}")
    keys: set[tuple[str, str, int, int]] = set()
    for p in points:
        if not (math.isfinite(p.loss) and p.loss > 0) or p.tokens < 1:
            raise UserError(
                f"{who}: a run of {plural(p.tokens, 'token')} with a loss of {p.loss} cannot be fitted; leave it out"
            )
        if (p.path, p.name, p.tokens, p.seed) in keys:
            raise UserError(f"{who}: two {p.path} runs of {p.tokens} tokens have seed {p.seed}; keep one of them")
        keys.add((p.path, p.name, p.tokens, p.seed))
    missing = [path for path in PATHS if not any(p.path == path for p in points)]
    if missing:
        raise UserError(f"{who}: no finished {missing[0]} run; a comparison needs both paths")
    if not has_enough_runs(points):
        raise UserError(f"{who}: two finished runs tell no curve; run one of the paths at another budget as well")


@dataclass(frozen=True)
class LeftOut:
    """A run that was left out of a fit, and what the fit of the shorter ones says of it."""

    point: CurvePoint
    predicted: Interval
    poor: bool  #: whether that fit's figures would be withheld

    @property
    def error(self) -> float:
        """Predicted less measured, in nats."""
        return self.predicted.value - self.point.loss


def leave_last_out(
    points: Sequence[CurvePoint],
    forms: Sequence[str] = AVERAGED_FORMS,
    *,
    last: int = 1,
    parent_loss: float | None = None,
    draws: int = DRAWS,
) -> list[LeftOut]:
    """Leave the longest runs of each curve out and predict them from the others.

    Args:
        points: finished runs of any number of pairs.
        forms: names in :data:`CURVE_FORMS`, averaged over.
        last: how many budgets of each path are left out, the largest ones.

    Returns:
        The runs that were left out, pair by pair. A pair of which too little would be left is not among them.
    """
    predictions = []
    for group in pairs(points).values():
        out = {path: sorted({p.tokens for p in group if p.path == path})[-last:] for path in PATHS}
        shorter_runs = [p for p in group if p.tokens not in out[p.path]]
        if has_enough_runs(shorter_runs):
            shorter = fit_pair(shorter_runs, forms, parent_loss=parent_loss, draws=draws)
            longest = [p for p in group if p.tokens in out[p.path]]
            predictions += [LeftOut(p, shorter.at(p.path, p.tokens), shorter.poor) for p in longest]
    return predictions
