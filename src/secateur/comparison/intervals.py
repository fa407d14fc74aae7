"""Intervals of paired differences, by the bootstrap and by Student's t, and the sign test."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_interval", "mean_interval", "pooled_interval", "seed_interval", "sign_test"]

RESAMPLES = 10_000
_CHUNK = 500  # resamples drawn at once: bounds the memory, not the result
_SEED = 42


def bootstrap_interval(
    differences: NDArray[np.floating], weights: NDArray[np.floating] | None = None
) -> tuple[float, float]:
    """95% percentile interval of the mean of ``differences``, one value for each window, document or item.

    Resampling the differences draws the same windows for both models, which is what makes the bootstrap paired: what
    makes a window hard for both cancels. The generator is seeded, so the interval is a function of the values.

    Args:
        differences: one value for each window.
        weights: what each counts for in the mean, e.g. its tokens; None for alike.
    """
    return _percentiles(_means(differences, weights))


def pooled_interval(differences: NDArray[np.floating]) -> tuple[float, float]:
    """95% percentile interval of the mean of ``differences`` [seeds, windows], resampling both.

    Each resample draws windows, the same for all seeds, and seeds, the same for all windows (a crossed bootstrap). It
    assumes that the seeds are independent draws of one training noise and the windows of one kind of text, and that
    both are many. They are not: with n seeds the part that comes from them is too narrow by (n - 1) / n in variance,
    by half with two, so that the interval bounds the spread from below. The generator is seeded. With one seed it is
    :func:`bootstrap_interval`, up to rounding.
    """
    seeds, windows = differences.shape
    counts = _window_counts(windows)
    by_seed = np.concatenate([counts[i : i + _CHUNK] @ differences.T for i in range(0, RESAMPLES, _CHUNK)]) / windows
    seed_draws = np.random.default_rng((_SEED, 1)).integers(0, seeds, size=(RESAMPLES, seeds))
    low, high = np.quantile(np.take_along_axis(by_seed, seed_draws, axis=1).mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _window_counts(windows: int) -> NDArray[np.uint16]:
    """How often each resample of ``bootstrap_interval`` draws each window, [resamples, windows]."""
    generator = np.random.default_rng(_SEED)
    counts = np.empty((RESAMPLES, windows), dtype=np.uint16)
    rows = np.arange(_CHUNK)[:, None] * windows
    for start in range(0, RESAMPLES, _CHUNK):
        draws = generator.integers(0, windows, size=(_CHUNK, windows)) + rows
        counts[start : start + _CHUNK] = np.bincount(draws.ravel(), minlength=_CHUNK * windows).reshape(_CHUNK, windows)
    return counts


def mean_interval(groups: Sequence[NDArray[np.floating]], shares: Sequence[float] | None = None) -> tuple[float, float]:
    """95% percentile interval of the mean of the means of several groups, each resampled for itself.

    Args:
        shares: what each group counts, one in all; None where each counts as much.
    """
    means = [_means(group, None, number) for number, group in enumerate(groups)]
    return _percentiles(np.average(means, axis=0, weights=shares))


def _percentiles(means: NDArray[np.floating]) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _means(
    differences: NDArray[np.floating], weights: NDArray[np.floating] | None, stream: int = 0
) -> NDArray[np.floating]:
    """The means of ``RESAMPLES`` resamples; another ``stream`` draws others."""
    generator = np.random.default_rng([_SEED, stream] if stream else _SEED)
    size = len(differences)
    means = []
    for _ in range(RESAMPLES // _CHUNK):
        draws = generator.integers(0, size, size=(_CHUNK, size))
        if weights is None:
            means.append(differences[draws].mean(axis=1))
        else:
            means.append((differences * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1))
    return np.concatenate(means)


def seed_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of paired differences, one for each seed, by Student's t; two seeds or more."""
    from scipy.special import stdtrit  # the quantile of Student's t; the import takes 0.7 s

    values = np.asarray(differences, dtype=np.float64)
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    return mean - half, mean + half


def sign_test(differences: NDArray[np.floating]) -> tuple[int, int, float]:
    """Count the differences above and below zero, with the two-sided p of a fair coin; ties do not count.

    For items that are right or wrong this is McNemar's exact test. Without any difference p is 1.
    """
    from scipy.special import betainc  # the distribution of the binomial

    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    smaller, larger = sorted((above, below))
    return above, below, min(1.0, 2 * float(betainc(larger, smaller + 1, 0.5))) if larger else 1.0
