"""Studies whose seeds have their own parents and prunings, and methods that train while they prune."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
from example import P, R, cell, evaluation, example, judged, judged_page, judged_text, large, pruned

from secateur.comparison.ablation import controls, parts
from secateur.comparison.index import Index, Model, group_of
from secateur.comparison.ledger import account_flops, pieces, setting_total
from secateur.comparison.quality import measurement_rows
from secateur.comparison.records import Cost, Running, StudyResults
from secateur.comparison.serving_cost import running_rows, serving_costs
from secateur.evaluation.results import LOSS, Measurement
from secateur.forecast.ladder import forecast
from secateur.forecast.ratios import across_ratios
from secateur.report.page import build_report
from secateur.report.tables import curves_csv

LEARNED = 30_000
MODEL = Model("parent", "wanda", "0.5")
PARENT_LOSSES = {0: 5.44, 1: 5.24}


@cache
def seeded() -> StudyResults:
    """The large example with a parent and pruned models for each of its two seeds."""
    base = large()
    parents = tuple(
        dataclasses.replace(base.parents[0], seed=seed, evaluation=evaluation(loss, 90 + seed))
        for seed, loss in PARENT_LOSSES.items()
    )
    models = tuple(
        dataclasses.replace(p, seed=seed, evaluation=evaluation(p.evaluation.loss + 0.2 * seed, 50 + seed))
        for p in base.pruned
        for seed in PARENT_LOSSES
        if p.evaluation
    )
    return dataclasses.replace(base, parents=parents, pruned=models, seeds_vary="all")


def test_a_comparison_rests_on_the_parent_and_the_pruning_of_its_seed() -> None:
    index = Index(seeded())
    for seed, loss in PARENT_LOSSES.items():
        parent, model = index.parent("parent", seed), index.pruned_model(MODEL, seed)
        assert parent and parent.evaluation and parent.evaluation.loss == pytest.approx(loss)
        assert model and model.evaluation and model.evaluation.loss == pytest.approx(5.66 + 0.2 * seed)
    assert index.parent("parent", 2) is None and index.pruned_model(MODEL, 2) is None
    assert list(index.parents) == ["parent"] and len(index.pruned) == 4  # names, not records
    shared = Index(large())
    assert shared.parent("parent", 1) is shared.parents["parent"]
    assert shared.pruned_model(MODEL, 1) is shared.pruned[MODEL]


def test_costs_of_a_run_are_those_of_one_parent() -> None:
    index, shared = Index(seeded()), Index(large())
    for run in seeded().cells:
        assert setting_total(index, run) == setting_total(shared, run)
        assert account_flops(index, run, "shared") == account_flops(shared, run, "shared")
    rows = [(row["what"], row.get("of")) for row in pieces(index) if "name" not in row]
    assert len(set(rows)) == len(rows) == 2 + 8
    assert rows[0] == ("pretraining the parent (seed 0)", None)


def test_the_terminal_shows_means_over_seeds() -> None:
    text = judged_text(seeded)
    (parent,) = [line for line in text.splitlines() if line.startswith("Parent")]
    assert "held-out loss 5.340 nats/token, the mean of 2 seeds" in parent
    fewer = dataclasses.replace(seeded(), cells=tuple(c for c in seeded().cells if c.name == "P-R"))
    row = next(line for line in judged_text(lambda: fewer).splitlines() if line.startswith("wanda"))
    assert " 5.760 " in row  # before retraining: the mean of 5.66 and 5.86


def test_the_page_compares_each_pruned_model_with_its_own_parent() -> None:
    page = judged_page(seeded)
    section = page[page.index('id="before"') : page.index('id="each"')]
    assert section.count("<p>The parent has") == 1 and "5.340" in section and "the mean over seeds" in section
    gaps = {f"{5.66 + 0.2 * seed - loss:+.3f}" for seed, loss in PARENT_LOSSES.items()}
    assert all(gap in section for gap in gaps)
    assert "of parent" not in section and page.count("<h3>Parent</h3>") == 1


def test_no_two_figures_have_one_name() -> None:
    figure = Measurement(LOSS, "loss", 5.0, {"fingerprint": "x"}, "windows", items=[])
    results = seeded()

    def measured(record):  # type: ignore[no-untyped-def]
        return dataclasses.replace(record, evaluation=dataclasses.replace(record.evaluation, measured=(figure,)))

    results = dataclasses.replace(
        results, parents=tuple(map(measured, results.parents)), pruned=tuple(map(measured, results.pruned))
    )
    rows = [tuple(row[key] for key in row if key != "value") for row in measurement_rows(Index(results))]
    assert len(set(rows)) == len(rows) == 2 + 8
    points = [line.split(",") for line in curves_csv(judged(seeded)).splitlines() if line.startswith("parent,")]
    assert {point[3] for point in points} == {"0", "1"}


def test_one_parent_of_a_name_has_a_serving_cost() -> None:
    figures = ({"name": "decode", "value": 100.0, "unit": "tokens/s", "execution": "dense", "batch": 1},)
    results = seeded()
    first, second = results.parents
    running = Running("cpu", "float32", figures, "")
    parents = (dataclasses.replace(first, running=running), second)
    index = Index(dataclasses.replace(results, parents=parents))
    assert [row["name"] for row in running_rows(index)] == ["the parent"]
    ((point,), _) = serving_costs(index, "time")
    assert point.loss == pytest.approx(5.34)


def test_the_law_across_ratios_starts_from_the_parent_of_each_run() -> None:
    laws = [law.law for law in across_ratios(Index(seeded())) if law.law]
    assert laws
    for law in laws:
        assert sorted({run.parent_loss for run in law.runs}) == pytest.approx(sorted(PARENT_LOSSES.values()))


def learned_study() -> StudyResults:
    """Minitron-depth as if it trained on tokens of its own while it prunes."""
    method = "minitron-depth"
    model = dataclasses.replace(pruned(method), training_tokens=LEARNED)
    twin = dataclasses.replace(cell(method, "S_R", 5.5), training=Cost(R + LEARNED, 2e12))
    control = dataclasses.replace(
        cell(method, "S_R", 5.7, salt=1), name="without-pruning-tokens", init="without-pruning-tokens", path="control"
    )
    return dataclasses.replace(
        example(), pruned=(model,), cells=(cell(method, "P-R", 5.4), twin, control, cell(method, "S_{P+R}", 5.2))
    )


def test_totals_hold_the_tokens_that_pruning_trained_on() -> None:
    results = learned_study()
    index = Index(results)
    assert setting_total(index, results.cells[0])[0] == P + LEARNED + R
    assert setting_total(index, results.cells[1])[0] == LEARNED + R


def test_the_comparison_without_these_tokens_is_a_control_of_that_name() -> None:
    results = learned_study()
    index, group = Index(results), group_of(results.cells[0])
    labels = [gap.label for gap in controls(index, group)]
    assert labels == [
        "new weights, without the tokens that pruning trained on",
        "new weights, no mask",
        "the weights in their places",
    ]
    pairs = {(part.against, part.of) for part in parts(index, group)}
    assert pairs >= {("without-pruning-tokens", "scratch"), ("without-pruning-tokens", "pruned")}
    short = dataclasses.replace(results.cells[1], training=Cost(R, 1e12))  # S_R on R tokens alone is not the twin
    unequal = Index(dataclasses.replace(results, cells=(results.cells[0], short, *results.cells[2:])))
    assert all("scratch" not in (part.against, part.of) for part in parts(unequal, group))


def test_forecasts_give_the_twin_the_tokens_that_pruning_trained_on() -> None:
    base = large()
    models = tuple(dataclasses.replace(p, training_tokens=LEARNED) for p in base.pruned)
    before, after = (
        forecast(judged(lambda r=r: r).index, ()) for r in (base, dataclasses.replace(base, pruned=models))
    )
    for old, new in zip(before.fitted, after.fitted, strict=True):
        extra = {o.allowance.account: o.allowance.extra for o in new.outlooks}
        plain = {o.allowance.account: o.allowance.extra for o in old.outlooks}
        assert extra["training"] == LEARNED and extra["total"] == plain["total"] + LEARNED
        assert extra["training-flops"] == plain["training-flops"]  # FLOPs hold them already


def test_the_report_of_such_studies_is_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for number, results in enumerate((seeded, learned_study)):
        assert build_report(judged(results), tmp_path / str(number)).is_file()
    note = "Twins of Minitron-depth train on L = 30 k tokens more, as many as its pruning trains on."
    assert note in " ".join(judged_text(learned_study).split())
    assert note.replace("30 k", "30\u00a0k") in judged_page(
        learned_study
    ) and "its pruning trains on" not in judged_page(seeded)
