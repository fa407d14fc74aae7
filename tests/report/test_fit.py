"""Fits of training curves: known truths come back, and what few runs leave open is said to be open."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from secateur.errors import UserError
from secateur.forecast.crossover import REACH, WORTH, crossover, lead, narrowing, next_runs
from secateur.forecast.curve import CURVE_FORMS, CurvePoint, Form, Path, Problem, _huber, law
from secateur.forecast.fit import (
    AVERAGED_FORMS,
    MISFIT,
    NOISE,
    Interval,
    _acceleration,
    _misfit,
    fit_pair,
    leave_last_out,
    pairs,
    percentile_interval,
)

LADDER = (10_000, 30_000, 50_000, 250_000, 500_000)
SHARED = {"scratch": (2.2, 0.4, 0.6, 0.0), "pruned": (2.2, 0.15, 0.3, 0.0)}  # E, G at 50,000 tokens, alpha, H
OWN = {"scratch": (2.3, 0.4, 0.6, 0.0), "pruned": (2.1, 0.15, 0.3, 0.0)}


def points(
    curves: dict[str, tuple[float, float, float, float]], tokens: tuple[int, ...] = LADDER, seeds: int = 1, noise=0.0
) -> list[CurvePoint]:
    random = np.random.default_rng(5)
    paths: tuple[Path, Path] = ("scratch", "pruned")
    return [
        CurvePoint(path, "wanda", 0.5, 100, d, true(curves, path, d) + noise * random.standard_normal(), seed)
        for path in paths
        for d in tokens
        for seed in range(seeds)
    ]


def true(curves: dict[str, tuple[float, float, float, float]], path: str, tokens: float) -> float:
    floor, gap, alpha, head_start = curves[path]
    return floor + gap * ((tokens + head_start) / 50_000) ** -alpha


@pytest.mark.parametrize(
    ("form", "curves"),
    [
        ("own", OWN),
        ("shared-exponent", {"scratch": (2.3, 0.4, 0.5, 0.0), "pruned": (2.1, 0.15, 0.5, 0.0)}),
        ("shared-floor", SHARED),
        ("parent-floor", SHARED),
        ("no-floor", {"scratch": (0.0, 2.7, 0.07, 0.0), "pruned": (0.0, 2.5, 0.03, 0.0)}),
        ("head-start", {"scratch": (2.2, 0.4, 0.6, 0.0), "pruned": (2.2, 0.4, 0.6, 60_000.0)}),
        ("head-start-own-floor", {"scratch": (2.2, 0.4, 0.6, 0.0), "pruned": (2.1, 0.4, 0.6, 60_000.0)}),
    ],
)
def test_a_known_curve_comes_back(form: str, curves: dict[str, tuple[float, float, float, float]]) -> None:
    """Runs without noise, and told to have next to none, leave the priors nothing to say."""
    fit = fit_pair(points(curves), [form], parent_loss=2.2, noise=1e-6, draws=1)
    for path in ("scratch", "pruned"):
        for tokens in (10_000, 120_000, 2_000_000):
            assert float(fit.loss(path, tokens)) == pytest.approx(true(curves, path, tokens), abs=1e-3)


@pytest.mark.parametrize("form", CURVE_FORMS.values(), ids=lambda form: form.name)
def test_slopes_are_those_of_finite_differences(form: Form) -> None:
    problem = Problem(points(OWN, seeds=2), form, 2.1)
    vector = problem.starts()[4] + 0.1 * np.arange(len(problem.centres))
    step = 1e-6 * np.eye(len(vector))
    differences = [(np.log(problem.fitted(vector + d)) - np.log(problem.fitted(vector - d))) / 2e-6 for d in step]
    np.testing.assert_allclose(problem._slopes(vector), np.array(differences).T, atol=1e-7)


def test_a_draw_is_a_fit_of_its_own() -> None:
    """The best vector has the least cost of Huber losses, by a plain loop over them, among its neighbours."""
    found = points(OWN, LADDER[:3], noise=0.02)
    problem = Problem(found, CURVE_FORMS["shared-floor"], None)
    best = problem.solve(problem.losses, problem.centres, 0.01, problem.starts())

    def cost(vector: np.ndarray) -> float:
        total = 0.0
        apart = [math.log(p.loss / f) * p.loss / 0.01 for p, f in zip(found, problem.fitted(vector), strict=True)]
        for deviation in [*apart, *((vector - problem.centres) / problem.widths)]:
            size = abs(deviation)
            total += size**2 / 2 if size <= 1.345 else 1.345 * (size - 1.345 / 2)
        return total

    for i in range(len(best)):
        for step in (-0.02, 0.02):
            assert cost(best + step * np.eye(len(best))[i]) > cost(best)


@pytest.mark.parametrize("form", CURVE_FORMS.values(), ids=lambda form: form.name)
def test_many_fits_at_once_are_the_fits_one_by_one(form: Form) -> None:
    problem = Problem(points(OWN, LADDER[:4], seeds=2), form, 2.1)
    random = np.random.default_rng(3)
    start = problem.solve(problem.losses, problem.centres, 0.01, problem.starts())
    losses = problem.losses + 0.03 * random.standard_normal((6, len(problem.losses)))
    centres = problem.centres + problem.widths * random.standard_normal((6, len(start)))
    noise = np.linspace(0.005, 0.03, 6)
    found = problem.solve_many(losses, centres, noise, start)
    alone = np.array([problem.solve(*of, [start]) for of in zip(losses, centres, noise, strict=True)])
    np.testing.assert_allclose(problem.fitted(found), problem.fitted(alone), atol=5e-4)
    costs = [np.sum(_huber(problem._apart(v, losses, centres, noise)) ** 2, axis=1) for v in (found, alone)]
    assert (costs[0] < costs[1] * (1 + 1e-4)).all()


def test_the_same_runs_give_the_same_draws_in_any_order() -> None:
    found = points(OWN, LADDER[:3])
    one, other = fit_pair(found, draws=5), fit_pair(found[::-1], draws=5)
    assert one.draws.tobytes() == other.draws.tobytes() and one.points == other.points


def test_noise_comes_from_seeds_where_parameters_take_all_other_freedom() -> None:
    quiet = fit_pair(points(SHARED, LADDER[:2]), draws=1)
    loud = fit_pair(points(SHARED, LADDER[:2], seeds=4, noise=0.05), draws=1)
    assert quiet.noise == NOISE and 0.02 < loud.noise < 0.08


def test_fewer_runs_and_farther_budgets_are_less_sure() -> None:
    few, many = (fit_pair(points(SHARED, LADDER[:n]), draws=60) for n in (2, 5))
    width = {(fit.points, d): fit.at("pruned", d).high - fit.at("pruned", d).low for fit in (few, many) for d in LADDER}
    assert width[few.points, 500_000] > 2 * width[many.points, 500_000]
    assert width[few.points, 500_000] > 2 * width[few.points, 30_000]


def test_intervals_hold_the_truth() -> None:
    """Twelve truths apart from the priors' centres, three budgets each; 95% are to be held, most must be."""
    random, held = np.random.default_rng(2), []
    for _ in range(12):
        floor = random.uniform(1.8, 2.6)
        curves = {
            "scratch": (floor, random.uniform(0.2, 0.6), random.uniform(0.25, 0.7), 0.0),
            "pruned": (floor, random.uniform(0.08, 0.3), random.uniform(0.25, 0.7), 0.0),
        }
        noisy = [
            dataclasses.replace(p, loss=p.loss + 0.01 * random.standard_normal()) for p in points(curves, LADDER[:3])
        ]
        fit = fit_pair(noisy, draws=40)
        for path in ("scratch", "pruned"):
            found = fit.at(path, 250_000)
            held.append(found.low <= true(curves, path, 250_000) <= found.high)
    assert np.mean(held) > 0.85


def test_a_crossover_that_is_known() -> None:
    """Where 0.4 x^-0.6 = 0.15 x^-0.3: x = (0.4 / 0.15)^(1 / 0.3)."""
    fit = fit_pair(points(SHARED), ["shared-floor"], noise=1e-6, draws=20)
    found = crossover(fit)
    assert found
    want = 50_000 * (0.4 / 0.15) ** (1 / 0.3)
    assert found.leader == "pruned" and found.budget.value == pytest.approx(want, rel=0.02)
    assert found.budget.low <= want * 1.02 and found.budget.high >= want / 1.02
    before, after = lead(fit, want / 2), lead(fit, want * 1.5)
    assert before and after
    assert (before.winner, after.winner) == ("pruned", "scratch") and before.likely_pruned == 1


def test_equal_total_tokens_begin_with_scratch_ahead() -> None:
    """With 200,000 tokens more, scratch leads at first; by the same curves pruning catches up where they meet."""
    fit = fit_pair(points(SHARED), ["shared-floor"], noise=1e-6, draws=5)
    found = crossover(fit, 200_000)
    assert found
    at = found.budget.value
    assert found.leader == "scratch" and 10_000 < at < REACH * 500_000
    assert true(SHARED, "scratch", at + 200_000) == pytest.approx(true(SHARED, "pruned", at), abs=2e-3)
    after = lead(fit, 500_000, 200_000)
    assert after and after.winner == "pruned"


def test_no_crossover_within_reach() -> None:
    curves = {"scratch": (2.2, 0.4, 0.4, 0.0), "pruned": (2.2, 0.1, 0.4, 0.0)}
    found = crossover(fit_pair(points(curves), noise=1e-6, draws=5))
    assert found and found.leader == "pruned" and found.horizon == REACH * 500_000
    assert (found.budget.value, found.budget.low, found.budget.high) == (math.inf,) * 3


def test_runs_that_tie_are_level() -> None:
    curves = {"scratch": SHARED["scratch"], "pruned": SHARED["scratch"]}
    fit = fit_pair(points(curves), draws=40)
    level = lead(fit, 100_000)
    assert level and level.winner == "undecided"
    same = dataclasses.replace(fit, best=np.repeat(fit.best[:, :1], 2, 1), draws=np.repeat(fit.draws[:, :1], 2, 1))
    found, level = crossover(same), lead(same, 100_000)
    assert found and found.leader is None and found.budget.value == found.lowest == 10_000
    assert level and level.winner == "undecided"


def test_there_is_no_verdict_out_of_reach() -> None:
    fit = fit_pair(points(SHARED), draws=20)
    assert lead(fit, REACH * 500_000) and lead(fit, 10_000)
    assert lead(fit, 1.01 * REACH * 500_000) is None and lead(fit, 9_900) is None
    assert lead(fit, 500_000, REACH * 500_000) is None  # the twin's tokens
    crossing = crossover(fit, 500_000)
    assert crossing and crossing.horizon == (REACH - 1) * 500_000  # there the twin has REACH * 500,000
    assert crossover(fit, REACH * 500_000) is None


def test_forms_share_the_draws_and_bad_ones_have_few() -> None:
    """Runs on two floors: one curve with a head start, and power laws that fall to zero, are far off."""
    fit = fit_pair(points(OWN), draws=100)
    weights = {form.name: weight for form, weight in zip(fit.forms, fit.weights, strict=True)}
    assert list(weights) == list(AVERAGED_FORMS) and sum(weights.values()) == pytest.approx(1)
    for form in ("head-start", "no-floor"):
        assert weights[form] == pytest.approx(0.1 * weights["own"])
    assert fit.draws.shape == (100, 2, 4) and fit.best.shape == (6, 2, 4)
    runs = points(SHARED, LADDER[:2])
    few = fit_pair(runs, draws=100)
    assert few.weights == pytest.approx(np.full(6, 1 / 6))  # two budgets tell no form from another
    alone = [float(fit_pair(runs, [form.name], draws=1).loss("pruned", 1e6)) for form in few.forms]
    assert float(few.loss("pruned", 1e6)) == pytest.approx(np.mean(alone))


def test_runs_far_off_every_curve_have_no_figures() -> None:
    bad = [dataclasses.replace(p, loss=p.loss + 0.3 * (p.tokens == 30_000)) for p in points(OWN)]
    fit = fit_pair(bad, draws=5)
    assert fit.poor and fit.scatter >= MISFIT * NOISE
    assert lead(fit, 100_000) is None and crossover(fit) is None and narrowing(fit, crossover(fit)) == []
    assert not fit_pair(bad, noise=0.2, draws=5).poor  # with such noise they are not far off
    loud = fit_pair(points(OWN, seeds=6, noise=0.08), draws=5)
    assert loud.noise > MISFIT * NOISE and not loud.poor  # seeds scatter as much


def test_a_loss_that_falls_faster_and_faster_is_on_no_curve() -> None:
    """Models at the start of their training: a plateau, then a fall. By hand: slopes of -0.1 and -0.6 a factor of e."""
    budgets = (10_000, round(10_000 * math.e), round(10_000 * math.e**2))
    paths: tuple[Path, Path] = ("scratch", "pruned")
    runs = [
        CurvePoint(path, "wanda", 0.5, 100, d, loss)
        for path in paths
        for d, loss in zip(budgets, (7.0, 6.9, 6.3), strict=True)
    ]
    assert _acceleration(runs, 0.01) == pytest.approx(0.5 / (0.01 * math.sqrt(1 + 4 + 1)), rel=1e-3)
    fit = fit_pair(runs, draws=5)
    assert fit.poor and lead(fit, 20_000) is None
    assert _misfit(runs, 0.01, 0.01).startswith("its loss from scratch falls faster and faster")
    for curves in (OWN, SHARED):
        assert _acceleration(points(curves), 0.01) == 0
    assert _acceleration(runs[:2], 0.01) == 0


def test_a_run_that_tells_little_is_not_named() -> None:
    fit = fit_pair(points(SHARED, LADDER[:4], noise=0.01), draws=100)
    crossing = crossover(fit)
    assert crossing
    runs = narrowing(fit, crossing)
    assert all(run.width <= WORTH for run in runs)
    beyond = dataclasses.replace(crossing, budget=Interval(math.inf, crossing.budget.low, math.inf))
    assert narrowing(fit, beyond) == [] and narrowing(fit, None) == []


def test_the_average_holds_where_one_form_does_not() -> None:
    """Floors apart and five budgets: at four times the largest the default of one floor held about a half."""
    random, held = np.random.default_rng(3), {"average": 0, "shared-floor": 0}
    for _ in range(12):
        curves = {
            "scratch": (2.2 + random.uniform(-0.1, 0.1), random.uniform(0.2, 0.6), random.uniform(0.25, 0.7), 0.0),
            "pruned": (2.2 + random.uniform(-0.1, 0.1), random.uniform(0.08, 0.3), random.uniform(0.25, 0.7), 0.0),
        }
        runs = [dataclasses.replace(p, loss=p.loss + 0.01 * random.standard_normal()) for p in points(curves)]
        far = 4.0 * LADDER[-1]
        truth = true(curves, "scratch", far) - true(curves, "pruned", far)
        for name, forms in (("average", AVERAGED_FORMS), ("shared-floor", ("shared-floor",))):
            standing = lead(fit_pair(runs, forms, draws=60), far)
            held[name] += standing is None or standing.difference.low <= truth <= standing.difference.high
    assert held["average"] >= 11 and held["shared-floor"] <= 8


def test_a_further_run_narrows_as_refitting_with_it_does() -> None:
    """The expected width after a run is near that of fits with the run added, its loss taken from draws."""
    fit = fit_pair(points(OWN, LADDER[:2], noise=0.01), noise=0.01, draws=200)
    far = fit.loss_draws("pruned", 250_000)
    ranked = next_runs(fit, far)
    assert [run.width for run in ranked] == sorted(run.width for run in ranked)
    best = ranked[0]
    assert best.path == "pruned" and best.tokens > 30_000 and best.width < 0.9
    now = percentile_interval(0.0, far - np.median(far))
    widths = []
    for draw in range(0, 200, 50):
        shown = float(fit.loss_draws("pruned", best.tokens)[draw])
        more = [*fit.points, CurvePoint("pruned", "wanda", 0.5, 100, best.tokens, shown, seed=9)]
        then = fit_pair(more, noise=0.01, draws=40).at("pruned", 250_000)
        widths.append((then.high - then.low) / (now.high - now.low))
    assert best.width == pytest.approx(np.mean(widths), abs=0.2)


def test_nothing_to_narrow() -> None:
    fit = fit_pair(points(OWN, LADDER[:2]), draws=10)
    assert next_runs(fit, np.full(10, 3.0)) == []


def test_an_interval_with_infinities_holds_its_value() -> None:
    found = percentile_interval(4.0, np.array([5.0, 6.0, math.inf, math.inf]))
    assert (found.low, found.high) == (4.0, math.inf)


def test_leave_last_out_predicts_the_longest_runs_of_each_pair() -> None:
    other = [dataclasses.replace(p, method="flap") for p in points(OWN, LADDER[:1])]
    left = leave_last_out([*points(SHARED, seeds=2), *other], draws=2)
    assert [(run.point.path, run.point.tokens) for run in left] == [
        (p, 500_000) for p in ("scratch",) * 2 + ("pruned",) * 2
    ]
    assert all(abs(run.error) < 0.01 for run in left)
    assert {run.point.tokens for run in leave_last_out(points(SHARED), last=2, draws=2)} == {250_000, 500_000}


def test_the_law_is_the_usual_one() -> None:
    """E + A / D^alpha, with A = G D_0^alpha."""
    curve = np.array([2.0, 0.3, 0.5, 0.0])
    assert float(law(curve, np.asarray(400.0 / 100.0))) == pytest.approx(2.0 + 0.3 * 100**0.5 / 400**0.5)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (lambda found: [], "a pair of paths is of one method and ratio, not no run"),
        (lambda found: [*found, dataclasses.replace(found[0], ratio=0.7)], "wanda at ratio 0.5 and wanda at ratio 0.7"),
        (
            lambda found: [*found, dataclasses.replace(found[0], loss=3.3)],
            "two scratch runs of 10000 tokens have seed 0",
        ),
        (
            lambda found: [*found, dataclasses.replace(found[0], seed=1, loss=math.nan)],
            "a loss of nan cannot be fitted",
        ),
        (lambda found: [p for p in found if p.path == "scratch"], "no finished pruned run"),
        (lambda found: [found[0], found[-1]], "two finished runs tell no curve"),
    ],
)
def test_runs_that_cannot_be_fitted(change, want: str) -> None:
    with pytest.raises(UserError, match=want):
        fit_pair(change(points(OWN)))


def test_forms_that_are_not_there() -> None:
    with pytest.raises(UserError, match="did you mean 'shared-floor'"):
        fit_pair(points(OWN), ["shared-flor"])
    with pytest.raises(UserError, match="parent's held-out loss"):
        fit_pair(points(OWN), ["parent-floor"])
    assert list(pairs(points(OWN))) == [("wanda", 0.5)]
