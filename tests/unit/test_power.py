"""The power of the decision rule, against scipy's noncentral t and against the rule itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import nct, t

from secateur.comparison.decision import decide
from secateur.comparison.power import Spread, power, seeds_needed, standard_deviations


@pytest.mark.parametrize(("sd", "seeds"), [(0.0047, 3), (0.007, 4), (0.014, 7), (0.028, 18), (0.047, 46)])
def test_without_noise_of_the_text_it_is_the_power_of_a_t_test(sd: float, seeds: int) -> None:
    assert seeds_needed(Spread(sd, 0.0), 1000) == seeds
    for n in (seeds - 1, seeds):
        expected = nct.sf(t.ppf(0.975, n - 1), n - 1, 0.02 / sd * math.sqrt(n))
        assert power(Spread(sd, 0.0), n, 1000) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("seeds", "documents", "spread"), [(3, 60, Spread(0.0047, 0.05)), (5, 25, Spread(0.01, 0.03))])
def test_it_is_the_share_of_verdicts_of_the_rule(seeds: int, documents: int, spread: Spread) -> None:
    draw, runs = np.random.default_rng(0), 400
    labels, verdicts = np.arange(documents), 0
    for _ in range(runs):
        text = draw.normal(0, spread.documents, (1, documents))
        decision = decide(0.02 + draw.normal(0, spread.seeds, (seeds, 1)) + text, labels, margin=0)
        verdicts += decision.verdict == "first"
    expected = power(spread, seeds, documents)
    assert verdicts / runs == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / runs))


def test_more_comparisons_and_more_spread_need_more_seeds() -> None:
    spread = Spread(0.014, 0.08)
    alone, four = (seeds_needed(spread, 400, comparisons=number) for number in (1, 4))
    assert alone and four and alone < four
    assert power(spread, 5, 400) > power(spread, 5, 100) > power(spread, 5, 100, comparisons=4)
    assert power(spread, 5, 100, 0.05) > power(spread, 5, 100, 0.02)
    assert seeds_needed(spread, 20) is None  # the text alone hides 0.02 nats, whatever the seeds
    assert power(Spread(0.0, 0.0), 2, 20) == 1.0


def test_the_spread_of_a_decision_is_that_of_its_seeds_and_documents() -> None:
    draw = np.random.default_rng(1)
    y = draw.normal(0, 0.05, (40, 1)) + draw.normal(0, 0.2, (1, 4000))
    spread = standard_deviations(decide(y, np.arange(4000)))
    assert spread["seed_sd"] == pytest.approx(np.std(y.mean(axis=1), ddof=1))
    assert spread["document_sd"] == pytest.approx(0.2, rel=0.05)
    assert standard_deviations(decide(y[:1], np.arange(4000)))["seed_sd"] is None
