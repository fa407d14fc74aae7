"""The law across ratios: a known law comes back, and what runs cannot tell is said to be untold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from secateur.errors import UserError
from secateur.forecast.ratio_law import (
    Retrained,
    Term,
    _losses,
    _model_inputs,
    _slopes,
    fit_ratios,
    leave_one_ratio_out,
)

BUDGETS = (1_000_000, 2_000_000, 4_000_000, 16_000_000)
RATIOS = (0.2, 0.35, 0.5, 0.7)


def published(size: float, tokens: float, ratio: float, parent_loss: float) -> float:
    """The law as arXiv:2411.10272 writes it, gamma negative, tokens in millions and parameters in billions."""
    part = 0.3 / size**0.4 + 0.5 / (tokens / 1e6) ** 0.45 + 0.25
    return parent_loss + (1 / ratio) ** -1.3 * (1 / size) ** 0.2 * part


def runs(
    sizes: tuple[float, ...] = (1.0,),
    ratios: tuple[float, ...] = RATIOS,
    budgets: tuple[int, ...] = BUDGETS,
    noise: float = 0.0,
    below: float = 0.0,
) -> list[Retrained]:
    """Every ratio and budget of parents of so many billions; ``below``: how far under the law they all end."""
    random = np.random.default_rng(4)
    found = []
    for size, (ratio, tokens) in itertools.product(sizes, itertools.product(ratios, budgets)):
        parent_loss = 2.5 - 0.1 * math.log(size)
        loss = published(size, tokens, ratio, parent_loss) - below + noise * random.standard_normal()
        found.append(Retrained(f"{size}b", round(size * 1e9), parent_loss, ratio, tokens, loss))
    return found


def values(terms: tuple[Term, ...]) -> dict[str, float]:
    return {term.name: term.value for term in terms}


def test_a_known_law_comes_back_with_parents_of_several_sizes() -> None:
    law = fit_ratios(runs(sizes=(0.5, 1.0, 3.0, 8.0)))
    found = values(law.terms)
    assert set(found) == {"g", "beta", "C", "B", "delta", "alpha", "K"} and not law.folded
    assert found["g"] == pytest.approx(1.3, rel=0.01) and found["beta"] == pytest.approx(0.45, rel=0.02)
    assert law.error < 1e-3
    far = Retrained("13b", 13_000_000_000, 2.3, 0.6, 50_000_000, 9.9)
    assert law.loss(far) == pytest.approx(published(13.0, 50e6, 0.6, 2.3), abs=0.01)


def test_slopes_are_those_of_finite_differences() -> None:
    names = ["g", "beta", "C", "B", "delta", "alpha", "K", "S"]
    inputs = _model_inputs(runs(sizes=(0.5, 2.0)), 1e9, 3e6)
    vector = np.log([1.3, 0.5, 0.3, 0.4, 0.2, 0.4, 0.2, 0.1])
    step = 1e-6 * np.eye(len(names))
    differences = [(_losses(vector + d, names, inputs) - _losses(vector - d, names, inputs)) / 2e-6 for d in step]
    np.testing.assert_allclose(_slopes(vector, names, inputs), np.array(differences).T, atol=1e-8)


def test_with_one_parent_size_is_folded_and_predictions_stand() -> None:
    law = fit_ratios(runs())
    found = values(law.terms)
    assert set(law.folded) == {"delta", "alpha", "K"} and "same size" in law.folded["delta"]
    assert found["g"] == pytest.approx(1.3, rel=0.01)
    assert found["C"] == pytest.approx(0.3 + 0.25, rel=0.05)  # N_C / N_0^alpha and E have become one
    budget = math.exp(np.mean(np.log(BUDGETS)))
    assert found["B"] == pytest.approx(0.5 / (budget / 1e6) ** 0.45, rel=0.05)
    assert law.loss(Retrained("x", 10**9, 2.5, 0.9, 100_000_000, 1.0)) == pytest.approx(
        published(1.0, 1e8, 0.9, 2.5), abs=0.01
    )


def test_two_parents_tell_delta_and_no_more() -> None:
    law = fit_ratios(runs(sizes=(1.0, 4.0)))
    assert "delta" in values(law.terms) and set(law.folded) == {"alpha", "K"}


def test_runs_below_their_parent_shift_the_floor() -> None:
    assert "S" not in values(fit_ratios(runs()).terms)
    law = fit_ratios(runs(below=0.6))
    assert values(law.terms)["S"] == pytest.approx(0.6, rel=0.1)
    assert values(law.terms)["g"] == pytest.approx(1.3, rel=0.1) and law.error < 1e-3


def test_what_the_runs_hardly_tell_is_marked() -> None:
    """Budgets next to each other, and noise: an exponent of the budget is anybody's guess; that of the ratio is not."""
    close = fit_ratios(runs(budgets=(1_000_000, 1_050_000, 1_100_000), noise=0.005))
    told = {term.name: term.identified for term in close.terms}
    assert told["g"] and not told["beta"]
    assert all(term.identified for term in fit_ratios(runs()).terms if term.name != "C")


def test_leaving_a_ratio_out_predicts_its_runs() -> None:
    """At two of the ratios there is one budget alone, as in a study whose ladder is at one ratio."""
    grid = [run for run in runs(noise=0.005) if run.ratio == 0.5 or run.tokens == 2_000_000]
    left, refused = leave_one_ratio_out(grid)
    assert [run.run.ratio for run in left] == [0.2, 0.35, 0.7]
    assert list(refused) == [0.5] and "3 budgets" in refused[0.5]
    assert max(abs(run.error) for run in left) < 0.05
    naive = max(abs(2.5 + 0.9 - run.run.loss) for run in left)
    assert naive > 0.2  # runs differ by far more than the errors


def test_the_same_runs_in_any_order_are_one_fit() -> None:
    grid = runs(noise=0.01)
    assert fit_ratios(grid) == fit_ratios(grid[::-1])


@pytest.mark.parametrize(
    ("grid", "want"),
    [
        (runs(ratios=(0.5,)), "needs 2 ratios and 3 budgets, and the finished runs have 1 and 4"),
        (runs(budgets=BUDGETS[:2]), "have 4 and 2"),
        (runs(ratios=(0.2, 0.5))[:4] + runs(ratios=(0.7,))[:0], "have 1 and 4"),
        ([*runs(ratios=(0.5,))[:3], runs(ratios=(0.7,))[0]], "4 parameters here, too many for 4 runs"),
    ],
)
def test_too_little_to_go_by(grid: list[Retrained], want: str) -> None:
    with pytest.raises(UserError, match=want):
        fit_ratios(grid)
