from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from example import NAMES, broken, cell, evaluation, example, judged_text, large, t_interval

from secateur.comparison.findings import Finding
from secateur.comparison.index import Index
from secateur.comparison.records import Cell, StudyResults
from secateur.report.judgement import judge
from secateur.report.prose import finding_sentence


def study(*cells: Cell) -> StudyResults:
    return dataclasses.replace(example(), cells=cells, pruned=())


def comparison(method: str, gap: float | None, total: float | None = None, *, salt: int = 0, **at: Any) -> list[Cell]:
    """P-R at 5 nats, its twins above it by ``gap`` (equal training tokens) and ``total`` (equal total tokens)."""
    losses = (5.0, None if gap is None else 5.0 + gap, None if total is None else 5.0 + total)
    return [
        cell(method, name, loss, salt=salt + i, **at) for i, (name, loss) in enumerate(zip(NAMES, losses, strict=True))
    ]


def found(results: StudyResults, key: str) -> Finding:
    return next(finding for finding in judge(results).findings if finding.key == key)


def answers(results: StudyResults, key: str) -> dict[str, str]:
    return {row.scope: row.answer for row in found(results, key).rows}


def test_pruned_beats_scratch_per_method_and_pooled():
    cells = [*comparison("wanda", 0.3), *comparison("minitron-depth", -0.1, salt=7)]
    assert answers(study(*cells), "equal-tokens") == {
        "Wanda": "holds",
        "Minitron-depth": "does not hold",
        "All methods": "holds in part",
    }
    pooled = found(study(*cells), "equal-tokens").rows[-1]
    assert pooled.mean and pooled.mean.value == pytest.approx(0.1)
    assert answers(study(*comparison("wanda", 0.015)), "equal-tokens") == {"Wanda": "undecided"}
    assert answers(study(*comparison("wanda", None)), "equal-tokens") == {"Wanda": "not measured"}


def test_the_pooled_interval_is_that_of_the_mean_over_comparisons():
    one, two = comparison("wanda", 0.3), comparison("minitron-depth", 0.1, salt=7)
    windows = [np.subtract(c[1].evaluation.windows, c[0].evaluation.windows) for c in (one, two)]  # type: ignore[union-attr]
    mean = found(study(*one, *two), "equal-tokens").rows[-1].mean
    assert mean and (mean.low, mean.high) == pytest.approx(t_interval(sum(windows) / 2), abs=1e-9)


@pytest.mark.parametrize(
    ("gaps", "answer"),
    [
        ((0.5, 0.2), "holds"),
        ((0.2, 0.5), "does not hold"),
        ((0.3, 0.29), "undecided"),
        ((0.5, None), "not measured"),
    ],
)
def test_the_gap_narrows_with_tokens(gaps: tuple[float, float | None], answer: str):
    ladder = zip((50_000, 200_000, 800_000), (gaps[0], 9.0, gaps[1]), strict=True)  # the middle rung has no say
    cells = [c for i, (tokens, gap) in enumerate(ladder) for c in comparison("wanda", gap, salt=5 * i, tokens=tokens)]
    assert answers(study(*cells), "tokens") == {"Wanda": answer}
    if answer == "holds":
        row = found(study(*cells), "tokens").rows[0]
        windows = {
            c.retrain_tokens: np.asarray(c.evaluation.windows) for c in cells if c.name == "S_R" and c.evaluation
        }
        pruned = {c.retrain_tokens: np.asarray(c.evaluation.windows) for c in cells if c.name == "P-R" and c.evaluation}
        change = (windows[50_000] - pruned[50_000]) - (windows[800_000] - pruned[800_000])
        assert row.mean and row.mean.value == pytest.approx(0.3)
        assert (row.mean.low, row.mean.high) == pytest.approx(t_interval(change), abs=1e-9)


@pytest.mark.parametrize(
    ("gaps", "answer"),
    [
        ((0.5, 0.1), "holds"),
        ((0.1, 0.5), "does not hold"),
        ((0.3, 0.29), "undecided"),
        ((None, 0.3), "not measured"),
    ],
)
def test_the_gap_narrows_with_the_ratio_at_the_largest_budget(gaps: tuple[float | None, float], answer: str):
    cells = [
        *comparison("wanda", gaps[0], target="0.5", tokens=800_000),
        *comparison("wanda", 3.0, target="0.65", tokens=800_000, salt=3),
        *comparison("wanda", gaps[1], target="0.75", tokens=800_000, salt=6),
        *comparison("wanda", 3.0, target="0.5", tokens=50_000, salt=9),
        *comparison("wanda", 3.0, target="0.75", tokens=50_000, salt=12),
    ]
    assert answers(study(*cells), "ratio") == {"Wanda": answer}


@pytest.mark.parametrize(
    ("sparse", "depth", "both"),
    [
        (0.2, -0.2, "holds"),
        (-0.2, -0.2, "holds in part"),
        (-0.2, 0.2, "does not hold"),
        (0.2, 0.015, "holds in part"),
        (0.2, None, "holds"),
        (-0.2, None, "does not hold"),
    ],
)
def test_granularity_needs_both_parts(sparse: float, depth: float | None, both: str):
    cells = [*comparison("wanda", 0.3, sparse), *comparison("minitron-depth", 0.3, depth, salt=7)]
    cells += comparison("minitron-width", 0.3, -9.0, salt=14)  # neither fine nor coarse
    finding = found(study(*cells), "granularity")
    assert finding.answer == both
    assert [row.scope for row in finding.rows] == ["Wanda", "Minitron-depth", "Both parts"]


def test_depth_that_is_matched_within_the_margin_is_matched_or_overtaken():
    level = [dataclasses.replace(c, evaluation=evaluation(5.0)) for c in comparison("minitron-depth", 0.3, 0.0)]
    finding = found(study(*comparison("wanda", 0.3, 0.2), *level), "granularity")
    assert finding.answer == "holds"
    depth = finding.rows[1]
    assert depth.mean and depth.mean.verdict == "equal within margin"


def test_seeds_are_pooled_within_a_comparison():
    cells = [c for seed, gap in enumerate((0.1, 0.3)) for c in comparison("wanda", gap, salt=9 * seed, seed=seed)]
    row = found(study(*cells), "equal-tokens").rows[0]
    assert row.mean and (row.mean.value, row.mean.seeds) == (pytest.approx(0.2), 2)
    assert row.mean.low is not None and row.mean.high is not None
    assert row.mean.high - row.mean.low > 2.5  # Student's t with one degree of freedom: 12.7 x 0.1
    assert row.answer == "undecided"


def test_a_missing_seed_takes_no_seed_from_the_other_comparisons():
    cells = [c for seed in (0, 1) for c in comparison("wanda", 0.3 + 0.01 * seed, salt=9 * seed, seed=seed)]
    cells += comparison("minitron-depth", 0.1, salt=30, seed=1)
    cells += comparison("minitron-width", 0.2, salt=40, seed=2)
    rows = {row.scope: row for row in found(study(*cells), "equal-tokens").rows}
    assert rows["Minitron-width"].answer == "holds"
    everyone = rows["All methods"]
    assert everyone.mean and everyone.mean.value == pytest.approx((0.305 + 0.1 + 0.2) / 3)
    assert (everyone.mean.seeds, len(everyone.cases)) == (2, 3)


def test_the_sentence_counts_the_cases_and_names_the_exceptions():
    cells = [
        *comparison("wanda", 0.3),
        *comparison("minitron-depth", -0.1, salt=7),
        *comparison("minitron-width", None),
    ]
    index = Index(study(*cells))
    sentence = finding_sentence(judge(study(*cells)).findings[0].rows[-1], index.comparisons)
    assert sentence.startswith("All methods: holds in 1 of 2 measured (of 3 planned); mean 0.10 nats, 95% interval")
    assert "Not in Minitron-depth at ratio 0.5 (the opposite: -0.10 nats" in sentence.replace("\u2212", "-")
    cells = [*comparison("wanda", 0.3), *comparison("minitron-width", None)]
    sentence = finding_sentence(judge(study(*cells)).findings[0].rows[-1], index.comparisons)
    assert sentence.startswith("All methods: holds in the one case measured (of 2 planned); 0.30 nats, 95% interval")


def test_findings_that_the_grid_cannot_speak_to_are_not_told():
    assert [finding.key for finding in judge(study(*comparison("wanda", 0.3, 0.1))).findings] == ["equal-tokens"]
    assert judge(study()).findings == ()
    p_r, _, s_pr = comparison("wanda", 0.3, 0.1)
    assert judge(study(p_r, s_pr)).findings == ()


def test_an_objective_is_no_rung_of_another_ones_ladder():
    cells = comparison("wanda", 0.5, tokens=50_000)
    cells += [
        dataclasses.replace(c, objective="distillation") for c in comparison("wanda", 0.2, tokens=800_000, salt=5)
    ]
    assert [finding.key for finding in judge(study(*cells)).findings] == ["equal-tokens"]


def test_several_protocols_give_no_mean():
    other = [
        dataclasses.replace(c, evaluation=evaluation(5.0 + i, windows=16))
        for i, c in enumerate(comparison("minitron-depth", 1.0))
    ]
    rows = found(study(*comparison("wanda", 0.3), *other), "equal-tokens").rows
    assert [row.answer for row in rows[:1]] == ["holds"]
    assert rows[-1].mean is None


def test_the_large_example_holds_and_the_text_tells_it():
    assert [(f.key, f.answer) for f in judge(large()).findings] == [
        ("equal-tokens", "holds"),
        ("tokens", "holds"),
        ("ratio", "holds"),
        ("granularity", "holds"),
    ]
    text = " ".join(judged_text(large).split())
    assert "Do the findings of arXiv:2606.14150 hold here? Pruned beats scratch" in text
    assert "not measured" in {row.answer for finding in judge(broken()).findings for row in finding.rows}
