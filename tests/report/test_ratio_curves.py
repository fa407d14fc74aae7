"""Curves between ratios: a known law comes back, nothing outside of what was run, and never better for more removed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import UserError
from secateur.forecast.crossover import crossover, lead
from secateur.forecast.curve import CurvePoint, Path
from secateur.forecast.fit import fit_pair
from secateur.forecast.ratio_curves import _rising, at_ratio

BUDGETS = (10_000, 30_000, 90_000)


def loss(path: Path, ratio: float, tokens: float) -> float:
    """Pruned: the P2 law with g = 2. From scratch: worse with fewer parameters."""
    if path == "pruned":
        return 2.2 + ratio**2 * (0.3 + 0.4 * (tokens / 30_000) ** -0.4)
    return 2.2 + 0.3 * ratio**2 + 0.5 * (tokens / 30_000) ** -0.5


def runs(ratios: tuple[float, ...] = (0.4, 0.6), budgets: tuple[int, ...] = BUDGETS) -> list[CurvePoint]:
    paths: tuple[Path, Path] = ("scratch", "pruned")
    return [
        CurvePoint(path, "wanda", ratio, 100, tokens, loss(path, ratio, tokens))
        for path in paths
        for ratio in ratios
        for tokens in budgets
    ]


def test_a_ratio_between_two_is_interpolated_and_not_the_nearer_one() -> None:
    curves = at_ratio(runs(), 0.5, draws=60)
    assert curves
    for path in ("scratch", "pruned"):
        estimate = curves.at(path, 30_000)
        assert estimate.low <= loss(path, 0.5, 30_000) <= estimate.high
        assert estimate.value == pytest.approx(loss(path, 0.5, 30_000), abs=0.02)
    neighbours = [loss("pruned", ratio, 30_000) for ratio in (0.4, 0.6)]
    assert neighbours[0] + 0.03 < float(curves.loss("pruned", 30_000)) < neighbours[1] - 0.03
    assert {point.ratio for point in curves.points} == {0.4, 0.6}
    standing = lead(curves, 30_000)
    truth = loss("scratch", 0.5, 30_000) - loss("pruned", 0.5, 30_000)
    assert standing and standing.difference.low <= truth <= standing.difference.high
    assert crossover(curves) is not None


def test_a_ratio_that_was_run_is_its_own_fit() -> None:
    alone = fit_pair([p for p in runs() if p.ratio == 0.6], draws=40)
    curves = at_ratio(runs(), 0.6, draws=40)
    assert curves and curves.at("scratch", 50_000) == alone.at("scratch", 50_000)
    assert {point.ratio for point in curves.points} == {0.6}


@pytest.mark.parametrize("ratio", [0.3, 0.38, 0.62, 0.8])
def test_nothing_is_said_outside_of_the_ratios_that_were_run(ratio: float) -> None:
    assert at_ratio(runs(), ratio, draws=5) is None


def test_the_neighbour_that_was_run_less_far_bounds_the_reach() -> None:
    points = [p for p in runs() if p.ratio == 0.4 or p.tokens <= 30_000]
    curves = at_ratio(points, 0.5, draws=20)
    assert curves and curves.budgets("pruned") == [10_000, 30_000]
    assert lead(curves, 100_000) is not None and lead(curves, 150_000) is None


def test_ratios_with_too_few_runs_are_left_out() -> None:
    single = [CurvePoint("pruned", "wanda", 0.8, 100, 10_000, 3.0)]
    assert at_ratio([*runs(), *single], 0.7, draws=5) is None
    with pytest.raises(UserError, match="no ratio has runs of both paths and three budgets"):
        at_ratio(single, 0.8)


def test_a_bad_fit_of_a_neighbour_makes_the_curves_between_bad() -> None:
    bad = [dataclasses.replace(p, loss=p.loss + (0.5 if p.tokens == 30_000 else 0.0)) for p in runs((0.6,))]
    curves = at_ratio([*runs((0.4,)), *bad], 0.5, draws=10)
    assert curves and curves.poor and lead(curves, 30_000) is None and crossover(curves) is None


@settings(max_examples=6, deadline=None)
@given(
    shifts=st.lists(st.floats(-0.4, 0.4), min_size=3, max_size=3),
    tokens=st.floats(5_000, 300_000),
    places=st.lists(st.floats(0.4, 0.8), min_size=3, max_size=3),
)
def test_a_pruned_model_never_gets_better_as_more_is_removed(
    shifts: list[float], tokens: float, places: list[float]
) -> None:
    """For a fixed budget, whatever the runs show, the loss does not fall with the ratio; nor does any draw's."""
    ratios = (0.4, 0.6, 0.8)
    points = [
        dataclasses.replace(p, loss=p.loss + shifts[ratios.index(p.ratio)] * (p.path == "pruned")) for p in runs(ratios)
    ]
    curves = [at_ratio(points, ratio, forms=("shared-floor",), draws=4) for ratio in sorted([*places, *ratios])]
    losses = [float(c.loss("pruned", tokens)) for c in curves if c]
    draws = np.array([c.loss_draws("pruned", tokens) for c in curves if c])
    assert len(losses) == 6 and (np.diff(losses) >= -1e-9).all() and (np.diff(draws, axis=0) >= -1e-9).all()


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_rising_losses_are_the_nearest_by_pooling_neighbours(losses: list[float]) -> None:
    """By the pool-adjacent-violators algorithm, written as a plain loop."""
    blocks: list[list[float]] = []
    for value in losses:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    want = [float(np.mean(block)) for block in blocks for _ in block]
    np.testing.assert_allclose(_rising(np.array(losses)), want, atol=1e-9)
