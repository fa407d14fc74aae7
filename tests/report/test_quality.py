"""What is measured besides the held-out loss, and what models cost to run: verdicts, contradictions, the front."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from example import cell, evaluation, example, judged_page

from secateur.comparison.index import Index
from secateur.comparison.quality import by_domain, measurement_rows, quality_rows
from secateur.comparison.records import Cell, Running, StudyResults
from secateur.comparison.serving_cost import ServingCost, front, serving_costs
from secateur.comparison.twins import SCRATCH
from secateur.evaluation.results import LOSS, Measurement
from secateur.report.judgement import answer_json, judge
from secateur.report.page import build_report, render

DOCUMENTS = 100


def task(name: str, right: int) -> Measurement:
    """A task on which the first ``right`` documents of a hundred are answered rightly."""
    items = [{"value": float(number < right)} for number in range(DOCUMENTS)]
    return Measurement(name, "accuracy", right / DOCUMENTS, {"fingerprint": name}, "documents", items)


def by_document(prose: float, code: float) -> Measurement:
    items = [{"value": prose, "tokens": 10, "domain": "prose"}] * 24 + [
        {"value": code, "tokens": 30, "domain": "code"}
    ] * 28
    mean = (60 * prose + 210 * code) / 270
    details = {"by_position": [{"from": 1, "to": 1, "tokens": 10, "loss": mean + 1}]}
    return Measurement(LOSS, "loss", mean, {"fingerprint": "held"}, "documents", items, details)


def measured(run: Cell, *found: Measurement) -> Cell:
    assert run.evaluation
    return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, measured=found))


def study(
    ours: list[Measurement], theirs: list[Measurement], *, loss: tuple[float, float] = (5.0, 5.3)
) -> StudyResults:
    pruned = measured(cell("wanda", "P-R", loss[0]), *ours)
    scratch = measured(cell("wanda", "S_R", loss[1], salt=1), *theirs)
    return dataclasses.replace(example(), cells=(pruned, scratch))


def rows(results: StudyResults) -> dict[str, Any]:
    return {row.comparison.name: row for row in quality_rows(Index(results))}


def test_tasks_are_compared_item_by_item() -> None:
    found = rows(study([task("a", 80), task("b", 50)], [task("a", 40), task("b", 50)]))
    assert list(found) == ["a", "b", "average of tasks"]
    assert found["a"].winner == "pruned"
    assert found["a"].comparison.difference == pytest.approx(0.4)
    assert (found["a"].comparison.above, found["a"].comparison.below) == (40, 0)
    assert found["b"].winner == "undecided"
    assert found["average of tasks"].comparison.difference == pytest.approx(0.2)


def test_the_loss_is_taken_apart_by_domain() -> None:
    found = rows(study([by_document(2.0, 4.0)], [by_document(2.5, 3.5)]))
    assert {name: row.winner for name, row in found.items()} == {"loss on code": "scratch", "loss on prose": "pruned"}
    assert found["loss on code"].comparison.a == pytest.approx(4.0)
    assert by_domain(task("a", 3)) == []


def test_a_domain_counts_by_its_tokens() -> None:
    uneven = dataclasses.replace(
        by_document(1, 1),
        items=[{"value": 1.0, "tokens": 30, "domain": "x"}, {"value": 5.0, "tokens": 10, "domain": "x"}],
    )
    (only,) = by_domain(uneven)
    assert only.value == pytest.approx(2.0)


def test_what_one_side_lacks_is_not_measured() -> None:
    found = rows(study([task("a", 80), task("b", 50)], [task("a", 40)]))
    assert found["b"].winner == "not measured"
    assert found["b"].comparison.difference is None
    assert rows(study([task("a", 80)], [])) == {}


@pytest.mark.parametrize(
    ("ours", "theirs", "loss", "says"),
    [
        (30, 70, (5.0, 5.3), "by held-out loss pruning is better; by accuracy (a) training from scratch is better"),
        (70, 30, (5.3, 5.0), "by held-out loss training from scratch is better; by accuracy (a) pruning is better"),
        (70, 30, (5.0, 5.3), ""),  # both say the same
        (50, 51, (5.0, 5.3), ""),  # tasks are undecided
        (30, 70, (5.0, 5.0), ""),  # the loss is
    ],
)
def test_contradicting_metrics_are_told(ours: int, theirs: int, loss: tuple[float, float], says: str) -> None:
    judgement = judge(study([task("a", ours)], [task("a", theirs)], loss=loss))
    assert [says in text for text in judgement.contradictions] == [True] * bool(says)
    if says:
        assert "by +40.00 points (95% interval +3" in judgement.contradictions[0]
        assert says in render(judgement)


def test_of_several_tasks_the_average_decides() -> None:
    results = study([task("a", 30), task("b", 90)], [task("a", 70), task("b", 50)])
    assert judge(results).contradictions == ()


def test_every_figure_is_in_the_file(tmp_path: Path) -> None:
    results = study([by_document(2.0, 4.0), task("a", 80)], [])
    build_report(judge(results), tmp_path)
    with (tmp_path / "measurements.csv").open() as file:
        found = {(row["model"], row["figure"]): float(row["value"]) for row in csv.DictReader(file)}
    assert found["P-R", "a"] == 0.8
    assert found["P-R", "loss on prose"] == 2.0
    assert ("P-R", "loss behind 1 to 1 tokens") in found
    assert not any(model == "S_R" for model, _ in found)  # nothing was measured of it
    assert len(measurement_rows(Index(results))) == len(found)


def test_the_answer_as_json_holds_them() -> None:
    found = answer_json(judge(study([task("a", 80)], [task("a", 40)])))
    (row,) = found["quality"]
    assert (row["setting"], row["method"], row["name"], row["winner"]) == ("training", "wanda", "a", "pruned")


# --- what models cost to run --------------------------------------------------------------------------------------


def running(ms: float, megabytes: float, *, device: str = "cpu", fast: float | None = None) -> Running:
    def speeds(ms: float, execution: str) -> list[dict[str, Any]]:
        speed = {"value": 1e3 / ms, "low": 0.9e3 / ms, "high": 1.1e3 / ms}
        alone = {"name": "decode", "unit": "tokens/s", "execution": execution, "batch": 1, **speed}
        return [alone, {**alone, "batch": 8, "value": 8e3 / ms}]

    figures = speeds(ms, "dense") + (speeds(fast, "2:4 kernels") if fast else [])
    figures.append({"name": "weights in memory", "value": megabytes * 1e6, "unit": "bytes", "execution": "dense"})
    return Running(device, "float32", tuple(figures), "no masks: the model is dense")


def with_costs(costs: dict[str, Running], parent: Running | None = None) -> StudyResults:
    results = example()
    pruned = tuple(dataclasses.replace(p, running=costs.get(p.method)) for p in results.pruned)
    parents = tuple(dataclasses.replace(p, running=parent) for p in results.parents)
    return dataclasses.replace(results, pruned=pruned, parents=parents)


def test_twins_cost_what_the_pruned_model_does() -> None:
    points, told = serving_costs(Index(with_costs({"minitron-depth": running(5, 2)}, running(10, 4))), "time")
    assert told == "cpu, float32"
    assert {(point.run, round(point.cost, 6)) for point in points} == {
        ("parent", 10.0),
        ("P-R", 5.0),
        *((run, 5.0) for run in (SCRATCH["training"], SCRATCH["total"])),
    }
    assert all(point.low < point.cost < point.high for point in points)


def test_memory_and_kernels_have_points_of_their_own() -> None:
    index = Index(with_costs({"wanda": running(8, 4, fast=6)}))
    memory, _ = serving_costs(index, "memory")
    assert {point.cost for point in memory} == {4e6}
    times, _ = serving_costs(index, "time")
    costs = {(point.execution, round(point.cost, 6)) for point in times}
    assert costs == {("dense", 8.0), ("2:4 kernels", 6.0)}


def test_times_that_scatter_are_told() -> None:
    steady = running(5, 2)
    figures = tuple(
        {**f, "low": 0.95 * f["value"], "high": 1.05 * f["value"]} if "low" in f else f for f in steady.figures
    )
    assert "Beware" not in render(judge(with_costs({"wanda": dataclasses.replace(steady, figures=figures)})))
    loud = tuple({**f, "low": 0.7 * f["value"]} if "low" in f else f for f in steady.figures)
    page = render(judge(with_costs({"wanda": dataclasses.replace(steady, figures=loud)})))
    assert "speeds of Wanda at ratio 0.5 scatter" in page


def test_devices_do_not_share_an_axis() -> None:
    costs = {"minitron-depth": running(5, 2), "minitron-width": running(6, 2), "wanda": running(1, 4, device="H100")}
    points, told = serving_costs(Index(with_costs(costs)), "time")
    assert told == "cpu, float32"
    assert {point.model.method for point in points if point.model} == {"minitron-depth", "minitron-width"}


def test_the_front_holds_what_none_beats() -> None:
    def point(cost: float, loss: float) -> ServingCost:
        return ServingCost(None, "parent", "dense", loss, cost, cost, cost)

    points = [point(3, 2.0), point(1, 5.0), point(2, 3.0), point(2, 3.5), point(4, 2.5), point(1.5, 5.5)]
    assert [(p.cost, p.loss) for p in front(points)] == [(1, 5.0), (2, 3.0), (3, 2.0)]


def test_the_page_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    page = render(judge(with_costs({"wanda": running(8, 4)}, running(10, 4))))
    assert 'id="running"' in page
    assert "Held-out loss against time" in page
    assert "not measured" in page  # peak memory
    bare = judged_page(example)
    assert 'id="running"' not in bare
    assert 'id="quality"' not in bare
    build_report(judge(with_costs({"wanda": running(8, 4)}, running(10, 4))), tmp_path)
    assert (tmp_path / "figures" / "pareto-time.svg").is_file()
    assert (tmp_path / "figures" / "pareto-memory.pdf").is_file()


def test_losses_of_unlike_protocols_are_never_subtracted() -> None:
    other = dataclasses.replace(task("a", 40), protocol={"fingerprint": "other"})
    found = rows(study([task("a", 80)], [other]))
    assert found["a"].winner == "not measured"
    assert evaluation(5.0).measured == ()
