"""The decision rule errs seldom enough in simulated studies: a small version of ``benchmarks/coverage.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for benchmarks/

from benchmarks.coverage import ALLOWED, Cell, Rates, grid, noise, simulate, text

TRIALS = 1500


@pytest.mark.parametrize(
    "cell",
    [
        Cell("single", "clustered", 1, 0.0, 0.08),  # windows as units: .70
        Cell("single", "clustered", 3, 0.005, 0.08),  # t over seeds alone: .66
        Cell("single", "clustered", 2, 0.0141, 0.0),  # Satterthwaite's sum alone: .11
        Cell("single", "equal", 2, 0.05, 0.0),  # text alone: .94
        Cell("average, seeds in common", "clustered", 3, 0.05, 0.0),  # degrees of freedom of all comparisons: .10
        Cell("independent", "clustered", 2, 0.0141, 0.08),
        Cell("tasks", 0, 1, 0.0),
    ],
    ids=str,
)
def test_false_verdicts_are_few(cell: Cell) -> None:
    rates = simulate(cell, TRIALS)
    assert cell in grid()
    assert 0.005 < rates.no_margin <= ALLOWED
    assert rates.margin <= rates.no_margin


def test_a_true_difference_is_seen() -> None:
    rates = [simulate(Cell("single", "equal", 3, 0.005, 0.03, difference), 200) for difference in (0.02, 0.05, 0.1)]
    assert rates[0].margin < rates[1].margin and rates[1].margin > 0.9 and rates[2].margin == 1.0


def test_the_simulated_noise_is_the_cell_s() -> None:
    """Variances of the simulated differences: of seeds, of documents and of windows."""
    cell = Cell("single", "equal", 2, 0.05, 0.08)
    y = noise(np.random.default_rng(0), cell, 400, "equal")
    of_seeds = (y[:, 0] - y[:, 1]).mean(axis=1)
    assert of_seeds.std() == pytest.approx(0.05 * 2**0.5, rel=0.15)
    of_windows = (y[:, 0] - y[:, 1]).std(axis=1).mean()
    assert of_windows == pytest.approx(0.03, rel=0.05)  # only the half that is each seed's own
    assert y.std(axis=2).mean() == pytest.approx((0.08**2 + 0.03**2) ** 0.5, rel=0.05)
    documents, weights = text("clustered")
    shares = np.bincount(documents, weights) / weights.sum()
    assert (len(documents), len(shares), shares.max()) == (256, 29, 52 / 256)
    assert 10.5 < 1 / (shares**2).sum() < 11.5
    assert not Cell("single", "equal", 1, 0.05).covered and isinstance(simulate(cell, 2), Rates)
