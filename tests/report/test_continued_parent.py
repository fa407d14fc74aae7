"""A parent that was trained on the tokens of its pruned models, and a checkpoint that was not."""

from __future__ import annotations

import dataclasses

import pytest
from example import P, R, cell, evaluation, example, judged_text

from secateur.comparison.records import Cell, StudyResults
from secateur.report.judgement import judge
from secateur.report.page import render
from secateur.report.tables import cell_rows
from secateur.report.terminal import text_table


def continued(loss: float, salt: int = 70) -> Cell:
    """The parent of the example, trained on R tokens, as a control of Wanda."""
    return cell("wanda", "parent-continued", loss, salt=salt, init="parent-continued")


def checkpoint_study(*controls: Cell) -> StudyResults:
    """The example with a checkpoint as its parent, at a loss of 5.6: above that of every P-R."""
    base = example()
    public = dataclasses.replace(base.parents[0], curve=(), evaluation=evaluation(5.6, 99))
    return dataclasses.replace(base, parents=(public,), cells=(*base.cells, *controls))


def test_a_pruned_model_below_a_checkpoint_names_the_control_that_is_absent() -> None:
    text = text_table(judge(checkpoint_study()))
    assert "P-R ends below its parent for Minitron-depth" in text and "parent-continued, which the study" in text
    assert "parent-continued" not in judged_text(example)  # whose parent was pretrained on the corpus
    above = dataclasses.replace(checkpoint_study().parents[0], evaluation=evaluation(5.0, 99))
    assert "parent-continued" not in text_table(judge(dataclasses.replace(checkpoint_study(), parents=(above,))))


def test_the_parent_trained_on_the_same_tokens_stands_beside_its_pruned_models() -> None:
    results = checkpoint_study(continued(5.2))
    judgement = judge(results)
    (check,) = judgement.regimes[0].continued
    assert check.decision.verdict == "first" and check.decision.value == pytest.approx(0.15)
    assert {check.group.method for check in judgement.regimes[0].unmatched} == {"minitron-depth", "minitron-width"}
    text = text_table(judgement)
    assert "(parent-continued), beside that of P-R: lower for Wanda" in " ".join(text.split())
    (row,) = [line.split() for line in text.splitlines() if line.startswith("parent-continued ")]
    assert row[1:4] == ["-", "5.600", "5.200"]  # no ratio; before and after
    page = render(judgement)
    assert "held-out loss 5.200 (R = 200" in page and "The part of the parent that pruning removed saves 0.15" in page


def test_the_parents_tokens_count_for_the_control_and_its_size_wins_no_target() -> None:
    row = next(row for row in cell_rows(judge(checkpoint_study(continued(5.0)))) if row["name"] == "parent-continued")
    assert row["total_tokens"] == P + R and row["charged_flops"] == row["train_flops"] + 7.2e12
    assert row["ratio_total"] == 0.0 and row["best_for"] == ""
