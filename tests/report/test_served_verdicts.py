"""Verdicts with weights as they would be served, beside those with the stored weights."""

from __future__ import annotations

import dataclasses

from example import evaluation, example, judged

from secateur.comparison.records import Cell, StudyResults
from secateur.report.judgement import answer_json, judge
from secateur.report.page import render
from secateur.report.terminal import text_table

LOSS = {"P-R": 5.6, "S_R": 5.5, "S_{P+R}": 5.4}  #: in int4: from scratch is better


def served() -> StudyResults:
    """The example with int4 of Wanda alone; its other models are not measured in that form."""

    def in_int4(cell: Cell) -> Cell:
        if cell.method != "wanda":
            return dataclasses.replace(cell, served={"int4": None})
        loss = evaluation(LOSS[cell.name], 3, protocol="int4 protocol")
        return dataclasses.replace(cell, served={"int4": dataclasses.replace(loss, bytes=1_500_000)})

    results = example()
    return dataclasses.replace(results, cells=tuple(map(in_int4, results.cells)))


def test_each_form_has_verdicts_of_its_own_losses_alone() -> None:
    judgement = judge(served())
    assert judgement.verdicts == judged(example).verdicts  # nothing is mixed into those with stored weights
    rows = {(r.verdict.group.method, r.verdict.setting, r.weights): r for r in judgement.served}
    assert len(rows) == len(judgement.served) == 2 * len(judgement.verdicts)
    row = rows["wanda", "training", "int4"]
    assert row.verdict.winner == "scratch" and row.bytes == 1_500_000
    assert row.verdict.difference is not None and abs(row.verdict.difference + 0.1) < 1e-9
    assert rows["wanda", "training", "stored"].verdict.winner == "pruned"
    assert rows["minitron-depth", "training", "int4"].verdict.winner == "not measured"


def test_the_page_and_the_terminal_say_which_verdicts_change() -> None:
    judgement = judge(served())
    sentence = "Wanda at ratio 0.5 at equal training tokens, pruned to scratch"
    for text in (render(judgement), " ".join(text_table(judgement).split())):
        assert "With int4 weights" in text and sentence in text
    assert {row["weights"] for row in answer_json(judgement)["served"]} == {"stored", "int4"}
    assert "served" not in text_table(judged(example)) and 'id="served"' not in render(judged(example))
