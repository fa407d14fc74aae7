from __future__ import annotations

import math

import numpy as np
import pytest

from secateur.comparison.intervals import bootstrap_interval, mean_interval, seed_interval, sign_test


def test_weights_count() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 200)
    tokens = np.random.default_rng(1).integers(1, 50, 200).astype(float)
    low, high = bootstrap_interval(values, tokens)
    generator = np.random.default_rng(7)
    means = []
    for _ in range(4000):
        drawn = generator.integers(0, 200, 200)
        means.append((values[drawn] * tokens[drawn]).sum() / tokens[drawn].sum())
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)
    assert bootstrap_interval(values, np.ones(200)) == pytest.approx(bootstrap_interval(values))
    assert bootstrap_interval(values, tokens) == (low, high)


def test_the_mean_of_groups_is_as_wide_as_its_parts_make_it() -> None:
    generator = np.random.default_rng(0)
    groups = [generator.normal(mean, 1, size) for mean, size in ((0, 100), (1, 400), (2, 900))]
    low, high = mean_interval(groups)
    error = math.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)) / 3
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(np.mean([group.mean() for group in groups]), abs=0.01)
    alike = mean_interval([groups[0], groups[0]])  # resampled apart, though the values are the same
    assert alike[1] - alike[0] < 0.8 * np.subtract(*bootstrap_interval(groups[0])[::-1])


def test_seeds_by_student_s_t() -> None:
    low, high = seed_interval([0.1, 0.2, 0.3])
    half = 4.30265 * 0.1 / math.sqrt(3)  # the 0.975 quantile of t with two degrees of freedom, from a table
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
    assert seed_interval([0.1, 0.3])[0] < 0 < seed_interval([0.1, 0.3])[1]  # two seeds say little


def test_the_sign_test_counts_without_ties() -> None:
    above, below, p = sign_test(np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 50))
    wanted = 2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10
    assert (above, below) == (8, 2) and p == pytest.approx(wanted)
    assert sign_test(np.zeros(5)) == (0, 0, 1.0)
    assert sign_test(np.array([1.0, -1.0]))[2] == 1.0


def test_quantiles_and_p_values_are_those_of_scipy_stats() -> None:
    from scipy.stats import binomtest, t

    for seeds in range(2, 30):
        values = np.random.default_rng(seeds).normal(0.1, 1, seeds)
        half = t.ppf(0.975, seeds - 1) * values.std(ddof=1) / math.sqrt(seeds)
        assert seed_interval(values.tolist()) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-12)
    for above, below in ((1, 0), (0, 3), (4, 4), (5, 4), (8, 2), (60, 39), (0, 200), (2600, 2400), (10_000, 9_000)):
        p = sign_test(np.array([1.0] * above + [-1.0] * below))[2]
        assert p == pytest.approx(binomtest(above, above + below).pvalue, rel=1e-12)
