"""The decision rule against plain loops over the formula, and on records that a wrong rule would judge wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from example import cell, example
from scipy.stats import binomtest, t

from secateur.comparison.decision import Decision, adjust, decide, decide_average, decide_independent
from secateur.comparison.items import compare_results
from secateur.comparison.records import Cell, DocumentLoss, Evaluation, StudyResults
from secateur.errors import UserError
from secateur.evaluation.results import LOSS, EvaluationResults, Measurement
from secateur.report.judgement import answer_json, judge

Rows = Sequence[Sequence[float]]


@dataclass
class Reference:
    """What the formula of issue 20 gives, computed with plain loops."""

    value: float
    low: float
    high: float
    p: float
    effective: float
    text: float
    noise: float | None


def interval_of(value: float, parts: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The widest interval and the largest p of (variance, df) pairs."""
    lows, highs, ps = [], [], []
    for variance, df in parts:
        half = float(t.ppf(0.975, df)) * math.sqrt(variance)
        lows.append(value - half)
        highs.append(value + half)
        ps.append(2 * float(t.sf(abs(value) / math.sqrt(variance), df)))
    return min(lows), max(highs), max(ps)


def text_variance(
    mean: Sequence[float], documents: Sequence[Any], w: Sequence[float], strata: Sequence[Any]
) -> tuple[float, float]:
    """The jackknife over documents and their effective number."""
    centre = {}
    for stratum in set(strata):
        inside = [i for i, s in enumerate(strata) if s == stratum]
        centre[stratum] = sum(w[i] * mean[i] for i in inside) / sum(w[i] for i in inside)
    variance = squares = 0.0
    for document in set(documents):
        share = residual = 0.0
        for i, label in enumerate(documents):
            if label == document:
                share += w[i]
                residual += w[i] * (mean[i] - centre[strata[i]])
        variance += (residual / (1 - share)) ** 2
        squares += share**2
    return variance, 1 / squares


def with_noise(text: float, effective: float, noise: float, seeds: int) -> list[tuple[float, float]]:
    total = text + noise
    df = total**2 / (noise**2 / (seeds - 1) + text**2 / (effective - 1))
    return [(text, effective - 1), (noise, seeds - 1), (total, df)]


def reference(
    differences: Rows, documents: Sequence[Any], weights: Sequence[float] | None = None, strata: Any = None
) -> Reference:
    """The decision's figures for ``differences`` [seeds, units]."""
    units, seeds = len(documents), len(differences)
    total = sum(weights) if weights is not None else units
    w = [(weights[i] if weights is not None else 1.0) / total for i in range(units)]
    mean = [sum(row[i] for row in differences) / seeds for i in range(units)]
    value = sum(w[i] * mean[i] for i in range(units))
    text, effective = text_variance(mean, documents, w, strata if strata is not None else [0] * units)
    if seeds == 1:
        return Reference(value, *interval_of(value, [(text, effective - 1)]), effective, text, None)
    by_seed = [sum(w[i] * row[i] for i in range(units)) for row in differences]
    noise = sum((m - value) ** 2 for m in by_seed) / (seeds - 1) / seeds
    return Reference(value, *interval_of(value, with_noise(text, effective, noise, seeds)), effective, text, noise)


def same(decision: Decision, expected: Reference) -> None:
    assert decision.value == pytest.approx(expected.value, abs=1e-10)
    assert decision.low == pytest.approx(expected.low, abs=1e-10)
    assert decision.high == pytest.approx(expected.high, abs=1e-10)
    assert decision.p == pytest.approx(expected.p, abs=1e-10)
    assert decision.effective_documents == pytest.approx(expected.effective, abs=1e-10)
    share = expected.text / (expected.text + (expected.noise or 0.0))
    assert decision.text_share == pytest.approx(share, abs=1e-10)
    assert decision.seed_share == pytest.approx(1 - share, abs=1e-10)


def noisy(
    seeds: int, units: int, value: float = 0.1, sd: float = 0.1, seed_sd: float = 0.02, salt: int = 0
) -> np.ndarray:
    """Differences [seeds, units] whose mean over all is exactly ``value``; the same for the same arguments."""
    generator = np.random.default_rng([seeds, units, salt])
    rows = generator.normal(0.0, sd, units) + generator.normal(0.0, seed_sd, (seeds, 1))
    rows = rows + generator.normal(0.0, sd / 5, (seeds, units))
    return rows + value - rows.mean()


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_figures_are_those_of_plain_loops(seeds: int, seed_sd: float, weighted: bool) -> None:
    """Unequal documents, in no order, with unequal weights."""
    generator = np.random.default_rng(1)
    documents = [int(d) for d in generator.permutation([min(i // 2, 23) for i in range(60)])]
    weights = [float(w) for w in generator.uniform(1, 300, 60)] if weighted else None
    rows = noisy(seeds, 60, seed_sd=seed_sd)
    same(decide(rows, documents, weights=weights), reference(rows.tolist(), documents, weights))


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figures_of_tasks_are_centred_task_by_task(seeds: int) -> None:
    """Tasks whose means lie far apart: an average over tasks does not vary with which tasks there are."""
    tasks = ["a"] * 40 + ["b"] * 25 + ["c"] * 90
    rows = noisy(seeds, 155) + np.repeat([-0.5, 0.9, 0.0], [40, 25, 90])
    weights = [1 / 40] * 40 + [1 / 25] * 25 + [1 / 90] * 90
    decision = decide(rows, range(155), weights=weights, strata=tasks)
    same(decision, reference(rows.tolist(), range(155), weights, tasks))
    apart = decide(rows, range(155), weights=weights)
    assert apart.low is not None and decision.low is not None and apart.low < decision.low - 0.05


@pytest.mark.parametrize("numbers", [(1, 1), (3, 1), (2, 3, 5)])
def test_an_average_is_that_of_plain_loops(numbers: tuple[int, ...]) -> None:
    """Comparisons with unequal numbers of seeds: each mean is over its own, noise is pooled over the fewest."""
    documents = [i // 2 for i in range(60)]
    parts = [noisy(n, 60, value=0.1 * (k + 1)) for k, n in enumerate(numbers)]
    decision = decide_average(parts, documents)
    mean = [sum(sum(float(r[i]) for r in part) / len(part) for part in parts) / len(parts) for i in range(60)]
    w = [1 / 60] * 60
    value, (text, effective) = sum(mean) / 60, text_variance(mean, documents, w, [0] * 60)
    squares, degrees = 0.0, 0
    for part in parts:
        means = [sum(map(float, row)) / 60 for row in part]
        squares += sum((m - sum(means) / len(means)) ** 2 for m in means)
        degrees += len(means) - 1
    variances = [(text, effective - 1)]
    if degrees:
        variances = with_noise(text, effective, squares / degrees / min(numbers), max(numbers))
    assert decision.value == pytest.approx(value, abs=1e-10)
    assert (decision.low, decision.high, decision.p) == pytest.approx(interval_of(value, variances), abs=1e-10)
    assert decision.seeds == max(numbers)


def test_an_average_of_one_comparison_is_that_comparison() -> None:
    rows, documents = noisy(3, 40), [i // 2 for i in range(40)]
    alone, average = decide(rows, documents), decide_average([rows], documents)
    assert (average.value, average.low, average.high, average.p) == pytest.approx(
        (alone.value, alone.low, alone.high, alone.p), abs=1e-12
    )


def test_a_seed_that_one_comparison_lacks_costs_the_average_no_other_seed() -> None:
    """Leaving out all seeds but the common one would take the mean of seed 0 alone, .1."""
    base = np.random.default_rng(5).normal(0.0, 0.01, 40)
    base -= base.mean()
    three = np.stack([base + v for v in (0.1, 0.3, 0.5)])
    decision = decide_average([three, three[:1]], range(40))
    assert decision.value == pytest.approx((0.3 + 0.1) / 2)


@pytest.mark.parametrize("seeds", [(1, 1), (2, 1), (3, 5)])
def test_two_texts_are_independent_samples(seeds: tuple[int, int]) -> None:
    """Variances add, and Satterthwaite's degrees of freedom apply to texts, to seeds and to the whole."""
    rows = [noisy(n, units, value=v) for n, units, v in zip(seeds, (60, 44), (0.3, 0.1), strict=True)]
    decision = decide_independent(*(decide(row, range(row.shape[1])) for row in rows))
    parts = [reference(row.tolist(), range(row.shape[1])) for row in rows]

    def summed(*terms: tuple[float, float]) -> tuple[float, float]:
        variance = sum(v for v, _ in terms)
        return variance, variance**2 / sum(v**2 / df for v, df in terms)

    text = summed(*((part.text, part.effective - 1) for part in parts))
    noises = [(part.noise, n - 1) for part, n in zip(parts, seeds, strict=True) if part.noise is not None]
    variances = [text]
    if noises:
        noise = summed(*noises)
        variances += [noise, summed(text, noise)]
    value = parts[0].value - parts[1].value
    assert decision.value == pytest.approx(value, abs=1e-10)
    assert (decision.low, decision.high, decision.p) == pytest.approx(interval_of(value, variances), abs=1e-10)


# --- records that a wrong rule judges wrongly -------------------------------------------------------------------------


def test_p_below_the_level_is_an_interval_without_zero() -> None:
    """Whatever the mixture of seeds and documents: neither says more than the other."""
    generator = np.random.default_rng(8)
    for salt in range(300):
        seeds, units = int(generator.integers(1, 6)), int(generator.integers(20, 60))
        seed_sd = float(generator.choice([0.0, 0.01, 0.05]))
        rows = noisy(seeds, units, float(generator.normal(0, 0.05)), seed_sd=seed_sd, salt=salt)
        decision = decide(rows, range(units), margin=0)
        assert decision.p is not None and decision.low is not None and decision.high is not None
        excludes = decision.low > 0 or decision.high < 0
        assert excludes == (decision.p < 0.05)
        assert (decision.verdict in ("first", "second")) == excludes


def test_exchanging_the_paths_exchanges_the_verdict() -> None:
    rows = noisy(3, 40)
    there, back = decide(rows, range(40)), decide(-rows, range(40))
    assert (there.verdict, back.verdict) == ("first", "second")
    assert there.value and there.low and there.high
    assert (-there.value, -there.high, -there.low, there.p) == pytest.approx((back.value, back.low, back.high, back.p))


def test_ties_are_equal_and_without_a_margin_undecided() -> None:
    equal, open_ = decide(np.zeros((2, 40)), range(40)), decide(np.zeros((2, 40)), range(40), margin=None)
    assert (equal.verdict, equal.value, equal.low, equal.high, equal.p) == ("equal within margin", 0.0, 0.0, 0.0, 1.0)
    assert (open_.verdict, open_.p, open_.margin) == ("undecided", 1.0, 0.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_loss_that_is_not_finite_is_no_measurement(wrong: float) -> None:
    """Also where it is one seed of several, or a unit of little weight."""
    rows = noisy(2, 40)
    rows[1, 7] = wrong
    decision = decide(rows, range(40), weights=[1.0] * 7 + [1e-9] + [1.0] * 32)
    assert (decision.verdict, decision.value, decision.low, decision.high, decision.p) == ("not measured", *[None] * 4)
    assert "not finite" in decision.reason
    assert decide_average([noisy(2, 40), rows], range(40)).verdict == "not measured"
    assert decide_independent(decide(noisy(2, 40), range(40)), decision).verdict == "not measured"


@pytest.mark.parametrize("shape", [(0, 40), (2, 0)])
def test_nothing_is_not_measured(shape: tuple[int, int]) -> None:
    decision = decide(np.zeros(shape), range(shape[1]))
    assert (decision.verdict, decision.value, decision.p) == ("not measured", None, None)
    assert decide([], []).verdict == "not measured"


@pytest.mark.parametrize("documents", [1, 2, 19])
def test_few_documents_decide_nothing_however_many_windows(documents: int) -> None:
    """The bootstrap of windows called two documents "pruning pays"."""
    rows = noisy(3, 400, value=1.0, sd=0.01, seed_sd=0.001)
    decision = decide(rows, [i % documents for i in range(400)])
    assert decision.verdict == "undecided"
    assert decision.value == pytest.approx(1.0)
    assert str(documents) in decision.reason and "document" in decision.reason
    assert decision.documents == documents


def test_twenty_documents_can_decide() -> None:
    rows = noisy(3, 400, value=1.0, sd=0.01, seed_sd=0.001)
    assert decide(rows, [i % 20 for i in range(400)]).verdict == "first"


def test_one_document_gives_no_interval() -> None:
    decision = decide(noisy(3, 40, value=1.0), [0] * 40)
    assert (decision.low, decision.high, decision.p) == (None, None, None)


def test_few_documents_are_no_equality() -> None:
    assert decide(np.full((2, 40), 1e-4), [i % 5 for i in range(40)]).verdict == "undecided"


def test_windows_of_one_document_are_one_cluster() -> None:
    """The measured case: an effect common to a document's windows. Windows as units would see 12 times the evidence."""
    effects = np.random.default_rng(11).normal(0.0, 0.08, 24)
    effects += 0.02 - effects.mean()
    rows = np.repeat(effects, 12)[None] + np.random.default_rng(12).normal(0, 0.005, (1, 288))
    documents = np.repeat(range(24), 12)
    clusters, windows = decide(rows, documents, margin=0), decide(rows, range(288), margin=0)
    assert clusters.p is not None and windows.p is not None and windows.p < 1e-4 < 0.05 < clusters.p
    assert (clusters.verdict, windows.verdict) == ("undecided", "first")


def test_one_dominating_document_decides_nothing() -> None:
    """Half of all tokens in one document: its own luck is half of the mean."""
    values = np.full((1, 60), 0.0)
    values[0, 0] = 1.0
    values[0, 1:] += np.random.default_rng(2).normal(0, 0.01, 59)
    weights = [59.0] + [1.0] * 59
    decision = decide(values, range(60), weights=weights)
    same(decision, reference(values.tolist(), range(60), weights))
    assert decision.verdict == "undecided"
    assert decision.value == pytest.approx(0.5, abs=0.01)
    assert decision.effective_documents == pytest.approx(4, abs=0.2)


def test_an_interval_without_an_end_is_none() -> None:
    """All weight in one of twenty documents: there is no degree of freedom left, and JSON knows no infinity."""
    decision = decide(noisy(1, 20, value=1.0), range(20), weights=[1e9] + [1.0] * 19)
    assert decision.verdict == "undecided"
    assert (decision.low, decision.high) == (None, None)
    assert decision.value is not None and decision.reason


def test_units_without_weight_do_not_count() -> None:
    """Nor their values, however wild, nor their documents."""
    rows = noisy(2, 40)
    wild = np.concatenate([rows, np.full((2, 30), math.nan)], axis=1)
    weights = [1.0] * 40 + [0.0] * 30
    alone, both = decide(rows, range(40)), decide(wild, range(70), weights=weights)
    assert (both.verdict, both.value, both.low, both.documents) == (alone.verdict, alone.value, alone.low, 40)
    assert decide(rows, range(40), weights=[0.0] * 40).verdict == "not measured"


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": [-1.0] + [1.0] * 39},
        {"weights": [math.nan] + [1.0] * 39},
        {"weights": [1.0] * 39},
        {"documents": range(39)},
        {"strata": ["a"] * 41},
        {"weights": ["a"] * 40},
        {"weights": [[1.0], [1.0, 2.0]]},
        {"documents": 5},
        {"documents": [None] * 40},
        {"documents": [None, *"ab" * 19, "c"]},
        {"documents": [(1, 2)] * 40},
        {"documents": [(1,), (1, 2)] * 20},
        {"strata": [None, *"ab" * 19, "c"]},
        {"margin": -0.1},
        {"margin": "wide"},
        {"differences": np.zeros(40)},
        {"differences": [[0.1] * 40, [0.1] * 39]},
        {"differences": [["a"] * 40]},
        {"differences": [[{}] * 40]},
    ],
)
def test_arguments_that_do_not_fit_are_errors(wrong: dict[str, Any]) -> None:
    arguments = {"differences": noisy(1, 40), "documents": range(40), **wrong}
    with pytest.raises(UserError, match=f"`{next(iter(wrong))}`"):
        decide(arguments.pop("differences"), arguments.pop("documents"), **arguments)


def test_identical_seeds_count_as_one() -> None:
    """Two copies of a run are no evidence about seeds; their spread of zero would narrow the interval."""
    rows = noisy(1, 40)
    alone, copied = decide(rows, range(40)), decide(np.repeat(rows, 3, axis=0), range(40))
    assert copied == alone and copied.seeds == 1 and copied.seed_share == 0
    third = rows + 0.05
    pair = decide(np.concatenate([rows, third]), range(40))
    assert decide(np.concatenate([rows, rows, third]), range(40)) == pair
    assert decide_average([np.repeat(rows, 3, axis=0)], range(40)).low == alone.low


def test_seeds_that_disagree_are_undecided_and_seeds_that_agree_are_not() -> None:
    """Of [.30, .40] the bootstrap of the report said "pruned", t over seeds (-.31 to 1.00) does not."""
    base = np.random.default_rng(3).normal(0.0, 0.02, 115)
    base -= base.mean()
    two = decide(np.stack([base + 0.30, base + 0.40]), range(115))
    assert two.verdict == "undecided"
    assert (two.low, two.high) == pytest.approx((0.35 - 12.7062 * 0.05, 0.35 + 12.7062 * 0.05), abs=1e-3)
    three = decide(np.stack([base + v for v in (0.30, 0.40, 0.35)]), range(115))
    assert three.verdict == "first" and three.covers == "held-out text and seeds"
    assert decide(base[None] + 0.3, range(115)).covers == "held-out text"


def test_one_of_many_seeds_that_is_far_off_is_seen() -> None:
    base = np.random.default_rng(4).normal(0.0, 0.01, 60)
    rows = np.stack([base + v for v in (0.05, 0.05001, 0.05002, 0.9)])
    assert decide(rows, range(60)).verdict == "undecided"


def test_equality_comes_before_a_side() -> None:
    """A difference that is certain and negligible: the interval excludes 0 and lies within the margin."""
    rows = 0.01 + np.random.default_rng(6).normal(0, 0.001, (1, 60))
    decision = decide(rows, range(60))
    assert decision.low is not None and decision.low > 0
    assert decision.p is not None and decision.p < 1e-10
    assert decision.verdict == "equal within margin"
    assert decide(rows, range(60), margin=0).verdict == decide(rows, range(60), margin=None).verdict == "first"
    assert decide(rows, range(60), margin=0.005).verdict == "first"
    wide = decide(rows * 1.99, range(60))
    assert (wide.high is not None and wide.high < 0.02) or wide.verdict == "first"


def test_an_interval_that_ends_beyond_the_margin_is_no_equality() -> None:
    rows = np.random.default_rng(7).normal(0, 0.1, (1, 60))
    decision = decide(rows - rows.mean(), range(60))
    assert decision.value == pytest.approx(0, abs=1e-12) and decision.verdict == "undecided"


# --- tasks ------------------------------------------------------------------------------------------------------------


def right_or_wrong(better: int, worse: int, alike: int) -> np.ndarray:
    """Differences of items: the first model alone is right, the second alone, both or neither."""
    return np.array([[1.0] * better + [-1.0] * worse + [0.0] * alike])


@pytest.mark.parametrize(
    ("items", "better", "verdict"),
    [
        (19, 19, "undecided"),  # too few, however clear
        (20, 20, "first"),
        (20, 6, "first"),  # six of six: the sign test's p is .031
        (20, 5, "undecided"),  # five of five: .0625, though t excludes zero
        (29, 5, "undecided"),
        (30, 5, "first"),  # from 30 items on t decides alone
    ],
)
def test_few_items_need_the_sign_test(items: int, better: int, verdict: str) -> None:
    rows = right_or_wrong(better, 0, items - better)
    if better < items:
        assert t.sf(rows.mean() / (rows.std(ddof=1) / math.sqrt(items)), items - 1) < 0.025, "t alone would decide"
    for sign, name in ((1, verdict), (-1, "second" if verdict == "first" else verdict)):
        decision = decide(sign * rows, range(items), strata=["task"] * items)
        assert decision.verdict == name
        assert bool(decision.reason) == (verdict == "undecided")
    assert (binomtest(better, better).pvalue < 0.05) == (better != 5)


def test_the_sign_test_is_for_tasks_alone() -> None:
    """Losses of 20 documents are decided by t: documents are not right or wrong."""
    rows = right_or_wrong(5, 0, 15)
    assert decide(rows, range(20)).verdict == "first"


def test_a_sign_test_against_the_mean_is_no_agreement() -> None:
    """Few items with large gains, many with small losses: mean and signs contradict each other."""
    rows = np.array([[1.0] * 7 + [-0.01] * 18])
    decision = decide(rows, range(25), strata=["perplexity"] * 25)
    assert decision.low is not None and decision.low > 0
    assert decision.verdict == "undecided" and "sign test" in decision.reason


# --- several comparisons ----------------------------------------------------------------------------------------------


def with_p(p: float, sign: int = 1) -> Decision:
    """A decision of one seed whose p is ``p``."""
    base = np.tile([-1.0, 1.0], 20)
    scale = math.sqrt(40) / 39  # of the mean of -1 and 1, by the formula
    rows = (base + sign * float(t.isf(p / 2, 39)) * scale)[None]
    return decide(rows, range(40), margin=0)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p, by its definition: the largest of (m - j) p_(j) over the smaller or equal ones."""
    ranks = sorted(range(len(ps)), key=lambda i: ps[i])
    return [max(min(1.0, (len(ps) - j) * ps[ranks[j]]) for j in range(ranks.index(i) + 1)) for i in range(len(ps))]


@pytest.mark.parametrize(
    "ps", [[0.04], [0.01, 0.04], [0.04, 0.03, 0.02], [0.012, 0.011, 0.2, 0.04], [0.5, 0.9, 0.001], [0.03, 0.03]]
)
def test_several_comparisons_by_holms_method(ps: list[float]) -> None:
    decisions = [with_p(p, sign) for p, sign in zip(ps, (1, -1, 1, -1), strict=False)]
    adjusted = adjust(decisions)
    assert [d.p for d in adjusted] == pytest.approx(ps)
    assert [d.adjusted_p for d in adjusted] == pytest.approx(holm(ps))
    for before, after, p in zip(decisions, adjusted, holm(ps), strict=True):
        assert after.verdict == (before.verdict if p < 0.05 else "undecided")
        assert (after.low, after.high, after.comparisons) == (before.low, before.high, len(ps))
        if after.verdict != before.verdict:
            assert "Holm" in after.reason


def test_equality_and_missing_ones_are_not_adjusted() -> None:
    equal = decide(0.01 + np.random.default_rng(6).normal(0, 0.02, (1, 60)), range(60))
    missing = decide(np.full((1, 60), math.nan), range(60))
    assert equal.verdict == "equal within margin" and equal.p is not None
    after = adjust([equal, missing, with_p(0.04), with_p(0.04)])
    assert [d.verdict for d in after] == ["equal within margin", "not measured", "undecided", "undecided"]
    assert after[1] == missing
    assert after[2].comparisons == 3, "what was not measured is no comparison"


# --- one rule, whoever asks -------------------------------------------------------------------------------------------


def evaluations(losses: np.ndarray, tokens: Sequence[int]) -> list[Evaluation]:
    """One evaluation for each seed, of documents with the mean losses [seeds, documents]."""
    return [
        Evaluation(
            loss=float(np.average(row, weights=tokens)),
            perplexity=float(np.exp(np.average(row, weights=tokens))),
            tokens=sum(tokens),
            protocol="p",
            windows=tuple(map(float, row)),
            sparsity=0.0,
            documents=tuple(
                DocumentLoss(number, n, float(value) * n)
                for number, (value, n) in enumerate(zip(row, tokens, strict=True))
            ),
        )
        for row in losses
    ]


def results_of(evaluation: Evaluation) -> EvaluationResults:
    """The same losses as ``secateur eval`` writes them."""
    items = [
        {"value": d.loss_sum / d.tokens, "tokens": d.tokens, "document": f"{d.number}"} for d in evaluation.documents
    ]
    protocol = {"source": "text", "fingerprint": "p"}
    return EvaluationResults("model", [Measurement(LOSS, "loss", evaluation.loss, protocol, "documents", items)])


def study_of(pruned: Sequence[Evaluation], scratch: Sequence[Evaluation]) -> StudyResults:
    cells: list[Cell] = []
    for seed, pair in enumerate(zip(pruned, scratch, strict=True)):
        for name, measured in zip(("P-R", "S_R"), pair, strict=True):
            cells.append(replace(cell("wanda", name, 5.0, seed=seed), evaluation=measured))
    return replace(example(), cells=tuple(cells), pruned=())


@pytest.mark.parametrize(
    ("seeds", "documents", "gap", "seed_sd", "verdict"),
    [
        (1, 60, 0.3, 0.0, "pruned"),
        (1, 60, -0.3, 0.0, "scratch"),
        (1, 60, 0.0, 0.0, "undecided"),
        (1, 19, 0.3, 0.0, "undecided"),
        (2, 60, 0.35, 0.05, "undecided"),  # the case of [.30, .40] on which the two contradicted each other
        (3, 60, 0.35, 0.05, "pruned"),
        (3, 60, -0.35, 0.05, "scratch"),
        (3, 400, 0.0005, 0.0001, "equal within margin"),
        (2, 60, math.nan, 0.0, "not measured"),
    ],
)
def test_compare_and_the_report_give_one_verdict(
    seeds: int, documents: int, gap: float, seed_sd: float, verdict: str
) -> None:
    """On the same numbers, to the last digit."""
    generator = np.random.default_rng([seeds, documents])
    tokens = [int(n) for n in generator.integers(20, 400, documents)]
    spread = 0.001 if verdict == "equal within margin" else 0.1
    base = generator.normal(5.0, 0.5, (seeds, documents))
    shifts = gap + seed_sd * (np.arange(seeds)[:, None] * 2 - seeds + 1)
    noise = generator.normal(0.0, spread, documents)
    other = base + shifts + noise - np.average(noise, weights=tokens)
    if math.isnan(gap):
        other = base.copy()
        other[0, 3] = math.nan
    pruned, scratch = evaluations(base, tokens), evaluations(other, tokens)
    (reported,) = judge(study_of(pruned, scratch)).verdicts
    (compared,) = compare_results(list(map(results_of, pruned)), list(map(results_of, scratch)))
    assert reported.winner == verdict
    assert compared.verdict == {"pruned": "A", "scratch": "B"}.get(verdict, verdict)
    if verdict == "not measured":
        assert (reported.difference, compared.difference) == (None, None)
        return
    for attribute in ("value", "low", "high", "p", "effective_documents", "text_share"):
        by_report, by_compare = getattr(reported.decision, attribute), getattr(compared.decision, attribute)
        assert by_report == pytest.approx(by_compare, abs=1e-12), attribute
    rows = -base + other
    same(decide(rows, range(documents), weights=tokens), reference(rows.tolist(), range(documents), tokens))


def test_raw_and_adjusted_p_are_in_the_data() -> None:
    generator = np.random.default_rng(31)
    base = generator.normal(5.0, 0.5, (1, 60))
    study = study_of(evaluations(base, [100] * 60), evaluations(base + generator.normal(0.1, 0.1, 60), [100] * 60))
    (verdict,) = answer_json(judge(study))["verdicts"]
    assert 0 < verdict["p"] == verdict["adjusted_p"] < 0.05
    assert verdict["interval"][0] < verdict["difference"] < verdict["interval"][1]


def by_metric(gaps: dict[str, tuple[float, float]], items: int = 60) -> list[EvaluationResults]:
    """Two models, A and B, with losses and accuracies of these two means each."""
    sides = []
    for side in (0, 1):
        measurements = []
        for name, values in gaps.items():
            kind = "accuracy" if name.startswith("task") else "loss"
            if kind == "accuracy":
                each = [float(i < round(values[side] * items)) for i in range(items)]
            else:
                each = [values[side] + 0.01 * math.sin(i * (side + 1)) for i in range(items)]
            rows = [{"value": value, "tokens": 1, "document": f"{i}"} for i, value in enumerate(each)]
            protocol = {"metric": "acc", "fingerprint": name}
            measurements.append(Measurement(name, kind, sum(each) / items, protocol, "documents", rows))
        sides.append(EvaluationResults("AB"[side], measurements))
    return sides


def test_metrics_that_contradict_each_other_keep_their_verdicts() -> None:
    """Loss for A, the perplexity of a text for B, one task for each: none is overruled, and the average is level."""
    gaps = {"loss": (3.0, 3.2), "wikitext": (3.2, 3.0), "task-1": (0.8, 0.4), "task-2": (0.4, 0.8)}
    first, second = by_metric(gaps)
    rows = {row.name: row.verdict for row in compare_results([first], [second])}
    assert rows == {"loss": "A", "wikitext": "B", "task-1": "A", "task-2": "B", "average of tasks": "undecided"}


def test_a_contradiction_of_loss_and_of_accuracy_or_perplexity_is_reported() -> None:
    pair = by_metric({"wikitext": (3.2, 3.0), "task-1": (0.4, 0.8)})
    base = evaluations(np.random.default_rng(9).normal(5.0, 0.5, (1, 60)), [100] * 60)[0]
    worse = evaluations(np.asarray([base.windows]) + 0.3, [100] * 60)[0]
    sides = [replace(e, measured=tuple(p.measurements)) for e, p in zip((base, worse), pair, strict=True)]
    judgement = judge(study_of(sides[:1], sides[1:]))
    assert judgement.verdicts[0].winner == "pruned"
    text = " ".join(judgement.contradictions)
    assert "task-1" in text and "wikitext" in text
