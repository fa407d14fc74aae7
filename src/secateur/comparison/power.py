"""The power of the decision rule: how likely a true difference is told, by seeds and held-out documents.

The mean difference d of n seeds over K documents is normal around the true difference with variance A + B, where
A = (standard deviation between seeds)^2 / n and B = (standard deviation between documents)^2 / K. The rule of
:mod:`secateur.comparison.decision` estimates A and B with n - 1 and K - 1 degrees of freedom. Both estimates are drawn;
given them, the probability that the interval leaves out 0 is a normal integral. What is printed is its mean over the
draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.comparison.decision import LEVEL, MARGIN

__all__ = ["MOST_SEEDS", "Spread", "power", "seeds_needed"]

MOST_SEEDS = 100  #: beyond this a study is not planned
DRAWS = 4000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How far a paired difference of losses varies, in nats per token."""

    seeds: float  #: standard deviation between seeds
    documents: float  #: standard deviation between documents


def power(
    spread: Spread,
    seeds: int,
    documents: float,
    difference: float = MARGIN,
    *,
    comparisons: int = 1,
    draws: int = DRAWS,
) -> float:
    """The probability that the rule tells a true difference: the verdict ``first`` of a positive one.

    Args:
        seeds: two or more; with one seed the rule speaks of one pair of runs, not of the paths.
        documents: effective number of documents, two or more.
        difference: the true difference, nats per token, above 0.
        comparisons: how many comparisons decide together. Each then needs p < 0.05 / comparisons: what Holm's method
            asks of the smallest p, and at most what it asks of the others.
        draws: of the two variances; the generator is seeded.
    """
    generator = np.random.default_rng((seeds, round(16 * documents)))
    noise, text = spread.seeds**2 / seeds, spread.documents**2 / documents
    return _power(noise, text, seeds - 1, documents - 1, difference, LEVEL / comparisons, generator, draws)


def _power(
    noise: float,
    text: float,
    noise_df: float,
    text_df: float,
    difference: float,
    level: float,
    generator: np.random.Generator,
    draws: int,
) -> float:
    from scipy.special import ndtr, stdtrit  # the import takes 0.7 s

    a = noise * generator.chisquare(noise_df, draws) / noise_df
    b = text * generator.chisquare(text_df, draws) / text_df
    both = a + b
    if not both.all():  # nothing varies: every difference is told
        return 1.0
    df = both**2 / (a**2 / noise_df + b**2 / text_df)
    quantile = 1 - level / 2
    half = np.maximum(stdtrit(df, quantile) * np.sqrt(both), stdtrit(noise_df, quantile) * np.sqrt(a))
    half = np.maximum(half, stdtrit(text_df, quantile) * np.sqrt(b))
    return float(ndtr((difference - half) / math.sqrt(noise + text)).mean())


def seeds_needed(
    spread: Spread, documents: float, difference: float = MARGIN, *, share: float = 0.8, comparisons: int = 1
) -> int | None:
    """The smallest number of seeds with a power of at least ``share``; None if ``MOST_SEEDS`` are too few."""

    def enough(seeds: int) -> bool:
        return power(spread, seeds, documents, difference, comparisons=comparisons) >= share

    return next((seeds for seeds in range(2, MOST_SEEDS + 1) if enough(seeds)), None) if enough(MOST_SEEDS) else None
