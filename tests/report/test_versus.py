"""Two studies compared: paired where they can be, agreement, and what was set differently."""

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
    """The example with the losses of some runs moved by as much on every window."""

    def move(one: Cell) -> Cell:
        assert one.evaluation
        step = by.get(f"{one.method} {one.name}", 0.0)
        moved = dataclasses.replace(
            one.evaluation,
            loss=one.evaluation.loss + step,
            windows=tuple(window + step for window in one.evaluation.windows),
        )
        return dataclasses.replace(one, evaluation=moved)

    results = example()
    return dataclasses.replace(results, cells=tuple(move(one) for one in results.cells), **changes)  # type: ignore[arg-type]


def both(a: StudyResults, b: StudyResults) -> StudyComparison:
    return compare_studies(judge(a), judge(b))


def test_a_study_and_itself_differ_in_nothing() -> None:
    found = both(example(), example())
    assert all(row.difference and row.difference.value == 0 for row in (*found.runs, *found.gaps))
    assert all(row.agree for row in found.gaps)
    assert found.settings == ()
    assert found.alone == (0, 0)
    assert "the same verdict in all 6 comparisons" in found.answer


def test_runs_are_paired_window_by_window() -> None:
    found = both(example(), shifted({"wanda P-R": 0.2}))
    rows = {(row.name, row.run): row for row in found.runs}
    moved = rows["Wanda at ratio 0.5", "P-R"].difference
    assert moved
    assert (moved.value, moved.low, moved.high) == pytest.approx((0.2, 0.2, 0.2))  # every window moved alike
    still = rows["Wanda at ratio 0.5", "S_R"].difference
    assert still
    assert still.value == 0
    gaps = {(row.name, row.setting): row for row in found.gaps}
    gap = gaps["Wanda at ratio 0.5", "training"].difference
    assert gap
    assert gap.value == pytest.approx(0.2)  # pruning saves so much more in A


def test_verdicts_that_differ_are_counted() -> None:
    found = both(example(), shifted({"wanda P-R": 1.0}))
    told = {(row.name, row.setting): row.agree for row in found.gaps}
    assert told["Wanda at ratio 0.5", "training"] is False
    assert sum(agree is False for agree in told.values()) == 1
    assert "in 5 of 6 comparisons" in found.answer


def test_losses_of_different_protocols_are_not_subtracted_and_savings_are() -> None:
    a = example()
    other = tuple(
        dataclasses.replace(one, evaluation=evaluation(one.evaluation.loss, 5 + number, windows=40, protocol="other"))
        for number, one in enumerate(a.cells)
        if one.evaluation
    )
    found = both(a, dataclasses.replace(a, cells=other))
    assert all(row.difference is None and "different protocols" in row.reason for row in found.runs)
    for row in found.gaps:
        assert row.difference
        assert row.difference.low < 0 < row.difference.high  # the same losses, on other windows
        assert row.a.low is not None
        assert row.a.high is not None
        assert row.difference.high - row.difference.low > row.a.high - row.a.low


def test_what_is_missing_in_one_is_not_measured() -> None:
    a = example()
    lost = ("wanda", "S_R")
    cells = (dataclasses.replace(c, evaluation=None) if (c.method, c.name) == lost else c for c in a.cells)
    found = both(a, dataclasses.replace(a, cells=tuple(cells)))
    (run,) = [row for row in found.runs if (row.name, row.run) == ("Wanda at ratio 0.5", "S_R")]
    assert (run.b, run.difference) == (None, None)
    assert "no held-out loss" in run.reason
    (row,) = [row for row in found.gaps if (row.name, row.setting) == ("Wanda at ratio 0.5", "training")]
    assert row.agree is None
    assert row.difference is None


def test_what_was_set_differently_is_listed() -> None:
    recipe = {**example().recipe, "peak_rate": 0.123}
    found = both(example(), shifted({}, recipe=recipe))
    assert ("recipe.peak_rate", example().recipe.get("peak_rate"), 0.123) in found.settings


def test_studies_with_nothing_in_common_are_refused() -> None:
    elsewhere = dataclasses.replace(example(), cells=(cell("wanda", "P-R", 5.0, tokens=7 * R),), pruned=())
    with pytest.raises(UserError, match="no comparison in common"):
        both(example(), elsewhere)


def test_page_text_and_data(tmp_path: Path) -> None:
    found = both(example(), shifted({"wanda P-R": 0.2}, name="other"))
    page = build_versus(found, tmp_path).read_text(encoding="utf-8")
    assert "What pruning saves" in page
    assert "http" not in page.replace("http-equiv", "")
    with (tmp_path / "versus-other.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.runs) + len(found.gaps)
    text = text_versus(found)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
