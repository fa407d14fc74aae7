"""The comparison of two studies: paired differences, agreement and differing settings."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
from example import R, cell, evaluation, example

from secateur.comparison.records import Cell, StudyResults
from secateur.errors import UserError
from secateur.report.judgement import judge
from secateur.report.page import build_versus
from secateur.report.studies import StudyComparison, compare_studies
from secateur.report.terminal import text_versus


def shifted(by: dict[str, float], **changes: object) -> StudyResults:
    """The example with the losses of some runs shifted, by the same amount on every window."""

    def shift(cell: Cell) -> Cell:
        assert cell.evaluation
        step = by.get(f"{cell.method} {cell.name}", 0.0)
        shifted_evaluation = dataclasses.replace(
            cell.evaluation,
            loss=cell.evaluation.loss + step,
            windows=tuple(window + step for window in cell.evaluation.windows),
        )
        return dataclasses.replace(cell, evaluation=shifted_evaluation)

    results = example()
    return dataclasses.replace(results, cells=tuple(map(shift, results.cells)), **changes)  # type: ignore[arg-type]


def compare(a: StudyResults, b: StudyResults) -> StudyComparison:
    return compare_studies(judge(a), judge(b))


def test_a_study_and_itself_differ_in_nothing() -> None:
    comparison = compare(example(), example())
    assert all(row.difference.value == 0 for row in (*comparison.runs, *comparison.gaps))
    assert all(row.agree for row in comparison.gaps)
    assert comparison.settings == ()
    assert comparison.alone == (0, 0)
    assert "the same verdict in all 6 comparisons" in comparison.answer


def test_runs_are_paired_window_by_window() -> None:
    comparison = compare(example(), shifted({"wanda P-R": 0.2}))
    rows = {(row.name, row.run): row for row in comparison.runs}
    pruned = rows["Wanda at ratio 0.5", "P-R"].difference
    assert pruned.value is not None
    assert (pruned.value, pruned.low, pruned.high) == pytest.approx((0.2, 0.2, 0.2))  # every window has the same shift
    scratch = rows["Wanda at ratio 0.5", "S_R"].difference
    assert scratch
    assert scratch.value == 0
    gaps = {(row.name, row.setting): row for row in comparison.gaps}
    gap = gaps["Wanda at ratio 0.5", "training"].difference
    assert gap
    assert gap.value == pytest.approx(0.2)  # pruning saves 0.2 more in A


def test_verdicts_that_differ_are_counted() -> None:
    comparison = compare(example(), shifted({"wanda P-R": 1.0}))
    agreements = {(row.name, row.setting): row.agree for row in comparison.gaps}
    assert agreements["Wanda at ratio 0.5", "training"] is False
    assert sum(agree is False for agree in agreements.values()) == 1
    assert "in 5 of 6 comparisons" in comparison.answer
    assert "differs by more than noise in 2 and is equal within the margin in 4" in comparison.answer


def test_losses_of_different_protocols_are_not_subtracted_and_savings_are() -> None:
    a = example()
    cells = tuple(
        dataclasses.replace(c, evaluation=evaluation(c.evaluation.loss, 5 + number, windows=40, protocol="other"))
        for number, c in enumerate(a.cells)
        if c.evaluation
    )
    comparison = compare(a, dataclasses.replace(a, cells=cells))
    assert all(
        row.difference.value is None and "different protocols" in row.difference.reason for row in comparison.runs
    )
    for row in comparison.gaps:
        assert row.difference.low is not None and row.difference.high is not None
        assert row.difference.low < 0 < row.difference.high  # the same losses, on other windows
        assert row.a.low is not None
        assert row.a.high is not None
        assert row.difference.high - row.difference.low > row.a.high - row.a.low


def test_a_run_missing_in_one_study_is_not_measured() -> None:
    a = example()
    missing = ("wanda", "S_R")
    cells = (dataclasses.replace(c, evaluation=None) if (c.method, c.name) == missing else c for c in a.cells)
    comparison = compare(a, dataclasses.replace(a, cells=tuple(cells)))
    (run,) = [row for row in comparison.runs if (row.name, row.run) == ("Wanda at ratio 0.5", "S_R")]
    assert (run.b, run.difference.value) == (None, None)
    assert "no held-out loss" in run.difference.reason
    (row,) = [row for row in comparison.gaps if (row.name, row.setting) == ("Wanda at ratio 0.5", "training")]
    assert row.agree is None
    assert row.difference.verdict == "not measured"


def test_differing_settings_are_listed() -> None:
    recipe = {**example().recipe, "peak_rate": 0.123}
    comparison = compare(example(), shifted({}, recipe=recipe))
    assert ("recipe.peak_rate", example().recipe.get("peak_rate"), 0.123) in comparison.settings


def test_studies_with_nothing_in_common_are_refused() -> None:
    unrelated = dataclasses.replace(example(), cells=(cell("wanda", "P-R", 5.0, tokens=7 * R),), pruned=())
    with pytest.raises(UserError, match="no comparison in common"):
        compare(example(), unrelated)


def test_page_text_and_data(tmp_path: Path) -> None:
    comparison = compare(example(), shifted({"wanda P-R": 0.2}, name="other"))
    page = build_versus(comparison, tmp_path).read_text(encoding="utf-8")
    assert "Loss saved by pruning" in page
    assert "http" not in page.replace("http-equiv", "")
    with (tmp_path / "versus-other.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(comparison.runs) + len(comparison.gaps)
    text = text_versus(comparison)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
