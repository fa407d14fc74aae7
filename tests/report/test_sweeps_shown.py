"""Sweeps of learning rates in the report: panels, sentences, figures, the terminal."""

from __future__ import annotations

import dataclasses
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from example import P, R, example, judged_text, large

from secateur.comparison.index import Index
from secateur.comparison.records import Cost, StudyResults, Sweep
from secateur.comparison.sweeps import sweep_panels, sweep_rows, unique_sweeps
from secateur.report.figures.collection import panels
from secateur.report.figures.palette import LIGHT, RC
from secateur.report.judgement import judge
from secateur.report.page import render
from secateur.report.sweep_prose import edge_sentences, sweep_sentences
from secateur.report.terminal import text_table

RATES = (1e-3, 3e-3, 1e-2)


def sweep(name: str, losses: tuple[float | None, ...], rate: float | None, edge: Any, **changes: Any) -> Sweep:
    fields: dict[str, Any] = {
        "parent": "parent",
        "method": "wanda",
        "target": "0.5",
        "objective": "",
        "retrain_tokens": R,
        "seed": 0,
        "tokens": R,
        "whole": True,
        "cost": Cost(2 * R, 1e12, 30.0),
        "stage": f"{name}-{losses}",
    }
    return Sweep(name=name, rates=RATES, losses=losses, rate=rate, at_edge=edge, **(fields | changes))


PARENT_SWEEP = sweep(
    "parent", (5.5, 5.44, 5.6), 3e-3, None, method="", target="", retrain_tokens=0, tokens=P, stage="parent"
)
PRUNED = sweep("P-R", (5.35, 5.38, 5.5), 1e-3, "low")
SCRATCH = sweep("S_R", (5.9, 5.73, None), 3e-3, None)
PENDING = sweep("S_{P+R}", (None, None, None), None, None)


def results(*sweeps: Sweep, of: StudyResults | None = None) -> StudyResults:
    return dataclasses.replace(of or example(), sweeps=sweeps)


def test_a_panel_for_the_parents_and_one_for_each_comparison() -> None:
    shared = dataclasses.replace(PRUNED, retrain_tokens=4 * R)  # trials shorter than both budgets serve both
    index = Index(results(PARENT_SWEEP, PRUNED, shared))
    assert [(panel.title, len(panel.sweeps)) for panel in sweep_panels(index)] == [
        ("Pretraining", 1),
        ("Wanda at ratio 0.5", 1),
    ]
    assert unique_sweeps(index) == [PARENT_SWEEP, PRUNED]
    rows = sweep_rows(index)
    assert len(rows) == 9 and [row["best"] for row in rows[:3]] == [False, True, False]
    assert not sweep_panels(Index(example())) and not sweep_sentences(Index(example()))


def test_sentences_count_edges_and_what_is_not_complete() -> None:
    index = Index(results(PARENT_SWEEP, PRUNED, SCRATCH, PENDING))
    first, pending, warning = sweep_sentences(index)
    assert first.startswith("Trials with seed 0 chose") and "other seeds" not in first
    assert pending == "Not complete: 1 of 4 sweeps."
    assert warning.startswith("Warning: in 1 of 4 sweeps")
    assert edge_sentences(index) == ["P-R of Wanda at ratio 0.5: 0.001 is the lowest of 3 rates; try lower ones."]
    assert "the other seeds have the same rates" in sweep_sentences(Index(results(PRUNED, of=large())))[0]
    assert len(sweep_sentences(Index(results(SCRATCH)))) == 1  # no warning


def test_figures_describe_every_trial_and_mark_the_best() -> None:
    near = dataclasses.replace(PRUNED, losses=(5.35, 5.38, 400.0))
    judgement = judge(results(near, SCRATCH, PENDING))
    (panel,) = [panel for panel in panels(judgement) if panel.kind == "sweep"]
    with mpl.rc_context(RC):
        figure, description = panel.draw(LIGHT)
    assert "pruned, then retrained on R: best 0.001, lowest; 0.001 5.350, 0.003 5.380, 0.01 400.000" in description
    assert "0.01 diverged" in description and "best not measured" in description
    axes = figure.axes[0]
    rings = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [np.asarray(ring.get_xydata()).tolist() for ring in rings] == [[[1e-3, 5.35]], [[3e-3, 5.73]]]
    assert axes.get_ylim()[1] < 10  # a trial that nearly diverged does not squash the others
    assert any("left out" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("sweeps", [(PARENT_SWEEP, PRUNED, SCRATCH, PENDING), (PENDING,), ()])
def test_the_page_and_the_terminal_show_sweeps_if_there_are_any(sweeps: tuple[Sweep, ...]) -> None:
    judgement = judge(results(*sweeps))
    page, text = render(judgement), text_table(judgement)
    assert ('id="rates"' in page) == ("Learning rates\n" in text) == bool(sweeps)
    assert ("0.001 is the lowest of 3 rates" in text) == (PRUNED in sweeps)
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert "Learning rates\n" not in judged_text(example)
