"""The power of the decision rule: how likely it tells a true difference, by seeds and held-out documents.

The mean difference d of n seeds over K documents is normal around the true difference with variance A + B, where
A = (standard deviation between seeds)^2 / n and B = (standard deviation between documents)^2 / K. The rule of
:mod:`secateur.comparison.decision` estimates both, as A chi^2(n - 1) / (n - 1) and B chi^2(K - 1) / (K - 1). For each
pair of estimates, the probability that the interval lies above 0 is a normal integral. The power is its mean over a
grid of quantiles of both.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np

from secateur.comparison.decision import LEVEL, MARGIN, Decision

__all__ = ["MOST_SEEDS", "Spread", "power", "seeds_needed", "standard_deviations"]

MOST_SEEDS = 100  #: a study that needs more seeds is not planned
_GRID = (400, 40)  # quantiles of the estimates of A and of B; A has few degrees of freedom, so it needs more


@dataclass(frozen=True)
class Spread:
    """How far a paired difference of losses varies, in nats per token."""

    seeds: float  #: standard deviation between seeds
    documents: float  #: standard deviation between documents


def power(spread: Spread, seeds: int, documents: float, difference: float = MARGIN, *, comparisons: int = 1) -> float:
    """The probability that the interval of a true difference lies above 0 altogether.

    The margin of equality is left out: of intervals above 0, the few that lie within the margin as well are called
    equal (at most 2.5% at a true difference of the margin).

    Args:
        seeds: two or more; with one seed the rule speaks of one pair of runs, not of the paths.
        documents: effective number of documents, above 1.
        difference: the true difference, nats per token, above 0.
        comparisons: how many comparisons decide together. Each then needs p < 0.05 / comparisons: what Holm's method
            requires of the smallest p; it requires less of the others.
    """
    from scipy.special import chdtri, ndtr, stdtrit  # the import takes 0.7 s

    noise, text = spread.seeds**2 / seeds, spread.documents**2 / documents
    if not noise + text:
        return 1.0
    df_a, df_b, quantile = seeds - 1, documents - 1, 1 - LEVEL / comparisons / 2
    a, b = (
        variance * chdtri(df, (np.arange(size) + 0.5) / size) / df
        for variance, df, size in zip((noise, text), (df_a, df_b), _GRID, strict=True)
    )
    a, b = a[:, None], b[None, :]
    both = stdtrit((a + b) ** 2 / (a**2 / df_a + b**2 / df_b), quantile) * np.sqrt(a + b)
    half = np.maximum(both, np.maximum(stdtrit(df_a, quantile) * np.sqrt(a), stdtrit(df_b, quantile) * np.sqrt(b)))
    return float(ndtr((difference - half) / math.sqrt(noise + text)).mean())


def seeds_needed(
    spread: Spread, documents: float, difference: float = MARGIN, *, share: float = 0.8, comparisons: int = 1
) -> int | None:
    """The smallest number of seeds with a power of at least ``share``; None if ``MOST_SEEDS`` are too few."""
    numbers = range(2, MOST_SEEDS + 1)
    first = bisect.bisect_left(
        numbers, share, key=lambda seeds: power(spread, seeds, documents, difference, comparisons=comparisons)
    )
    return numbers[first] if first < len(numbers) else None


def standard_deviations(decision: Decision) -> dict[str, float | None]:
    """``seed_sd`` and ``document_sd`` of a difference, as a :class:`Spread` has them; None where there is none."""
    noise, text, documents = decision.noise, decision.text, decision.effective_documents
    return {
        "seed_sd": math.sqrt(noise.variance * decision.seeds) if noise else None,
        "document_sd": math.sqrt(text.variance * documents) if text and documents else None,
    }
