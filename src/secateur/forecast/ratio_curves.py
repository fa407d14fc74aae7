"""Curves of a ratio between those that were run.

At one parent and budget the P2 law (arXiv:2411.10272) says ``loss = a + b * rho ** g``, for a share ``rho`` removed. So
the loss at a ratio lies between those at its two neighbours, at a place that depends on ``g`` alone: the curves of the
neighbours are fitted by themselves, and ``g``, which they do not tell, is drawn. Outside of the ratios that were run
nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import UserError
from secateur.forecast.curve import CurvePoint, Floats, Path
from secateur.forecast.fit import AVERAGED_FORMS, DRAWS, Curves, Fit, fit_pair, has_enough_runs, pairs

__all__ = ["RatioCurves", "at_ratio"]

_SAME = 0.01  # a ratio this near to one that was run is that one
_TYPICAL_G = 2.0
_LEAST_G, _MOST_G = 0.5, 8.0  # of the draws, even in the logarithm
_SEED = 42


@dataclass(frozen=True)
class RatioCurves(Curves):
    """Both paths at one ratio, interpolated between the neighbouring ratios that were run.

    A pruned model never gets better as more is removed: where noise says so of two ratios, both get the mean.

    Attributes:
        ratio: share removed.
        ratios: that were run, rising.
        fits: of each of these.
        neighbours: places in ``ratios`` of the two neighbours; twice the same where ``ratio`` was run.
        points: the runs of the neighbours.
        noise: the larger noise of the neighbours, in nats.
        misfit: why a neighbour's curves tell nothing, in words; empty where both do.
    """

    ratio: float
    ratios: tuple[float, ...]
    fits: tuple[Fit, ...]
    neighbours: tuple[int, int]
    points: tuple[CurvePoint, ...]
    noise: float
    misfit: str

    def budgets(self, path: Path) -> list[int]:
        """The budgets of the neighbour that was run less far, in tokens, rising."""
        return min((self.fits[place].budgets(path) for place in self.neighbours), key=lambda budgets: budgets[-1])

    def loss(self, path: Path, tokens: float | Floats) -> Floats:
        """The expected loss, nats per token."""
        losses = np.stack([fit.loss(path, tokens) for fit in self.fits])
        return self._interpolated(path, losses, np.asarray(_TYPICAL_G))

    def loss_draws(self, path: Path, tokens: float | Floats) -> Floats:
        """The loss by each draw, which has its own ``g``: ``[draws, *shape of tokens]``."""
        losses = np.stack([fit.loss_draws(path, tokens) for fit in self.fits])
        random = np.random.default_rng([_SEED, path == "pruned"])
        powers = np.exp(random.uniform(np.log(_LEAST_G), np.log(_MOST_G), losses.shape[1]))
        return self._interpolated(path, losses, powers.reshape(-1, *[1] * (losses.ndim - 2)))

    def _interpolated(self, path: Path, losses: Floats, power: Floats) -> Floats:
        """The losses ``[ratios, ...]`` at this ratio."""
        if path == "pruned":
            losses = _rising(losses)
        below, above = self.neighbours
        if below == above:
            return losses[below]
        low, high = self.ratios[below] ** power, self.ratios[above] ** power
        share = (self.ratio**power - low) / (high - low)
        return losses[below] + share * (losses[above] - losses[below])


def at_ratio(
    points: Sequence[CurvePoint],
    ratio: float,
    *,
    forms: Sequence[str] = AVERAGED_FORMS,
    noise: float | None = None,
    draws: int = DRAWS,
) -> RatioCurves | None:
    """Fit the runs of one method at every ratio, and interpolate between the neighbours of ``ratio``.

    Losses are those of the runs' parent. For a parent of another size scale the tokens by the parents' sizes, not by
    the pruned models': then the predicted loss of a budget does not fall as more is removed.

    Args:
        points: finished runs of one method, of any number of ratios; those of a ratio too few for a fit are left out.
        ratio: share to remove.
        forms: as for :func:`~secateur.forecast.fit.fit_pair`, and so are ``noise`` and ``draws``.

    Returns:
        The curves; None where ``ratio`` lies outside of the ratios that were run.

    Raises:
        UserError: if no ratio has enough runs, or runs contradict one another.
    """
    groups = {run: group for (_, run), group in sorted(pairs(points).items()) if has_enough_runs(group)}
    if not groups:
        raise UserError("`points`: no ratio has runs of both paths and three budgets in all; finish more runs")
    fits = {run: fit_pair(group, forms, noise=noise, draws=draws) for run, group in groups.items()}
    ratios = tuple(fits)
    near = min(range(len(ratios)), key=lambda place: abs(ratios[place] - ratio))
    if abs(ratios[near] - ratio) <= _SAME:
        return _between(ratio, fits, (near, near))
    if not ratios[0] < ratio < ratios[-1]:
        return None
    above = next(place for place, run in enumerate(ratios) if run > ratio)
    return _between(ratio, fits, (above - 1, above))


def _between(ratio: float, fits: Mapping[float, Fit], neighbours: tuple[int, int]) -> RatioCurves:
    near = [tuple(fits.values())[place] for place in sorted(set(neighbours))]
    return RatioCurves(
        ratio,
        tuple(fits),
        tuple(fits.values()),
        neighbours,
        points=tuple(point for fit in near for point in fit.points),
        noise=max(fit.noise for fit in near),
        misfit=next((fit.misfit for fit in near if fit.misfit), ""),
    )


def _rising(losses: Floats) -> Floats:
    """The nearest losses that do not fall along the first axis: isotonic least squares, by the max-min formula."""
    number = len(losses)
    sums = np.concatenate([np.zeros_like(losses[:1]), np.cumsum(losses, axis=0)])
    rising = np.empty_like(losses)
    for place in range(number):
        means = [
            np.min([(sums[end] - sums[start]) / (end - start) for end in range(place + 1, number + 1)], axis=0)
            for start in range(place + 1)
        ]
        rising[place] = np.max(means, axis=0)
    return rising
