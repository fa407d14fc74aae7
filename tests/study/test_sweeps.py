"""Sweeps of learning rates: what is planned, that the best trial is the run, what is counted and what is shown."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from test_cells import SMALL, common, record
from test_plan import named, planned, study

from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.study.plan import plan_study
from secateur.study.session import Study
from secateur.study.stage import Stage, unique
from secateur.study.stages.select import edge_of

RATES = [1e-3, 3e-3, 1e-2]
SWEEP = {"rates": RATES, "windows": 16}
MODEL = "minitron-depth-0.5"


def trials(choice: Stage) -> list[Stage]:
    return list(choice.facts["trials"].values())


def test_each_run_is_the_best_of_trials_on_all_its_tokens(tmp_path: Path) -> None:
    stages = planned(study(tmp_path, retrain={"tokens": [2048, 4096]}, sweep=SWEEP))
    spans = {"P-R": (16_000, 0), "S_R": (16_000, 0), "S_{P+R}": (0, 16_000)}
    for budget, tag in ((2048, "@2.048k"), (4096, "@4.096k")):
        for name, (first, more) in spans.items():
            run = named(stages, f"{MODEL}/{name}{tag}", "select")
            assert [t.identity["recipe"]["peak_rate"] for t in trials(run)] == RATES
            assert {tuple(t.identity["slice"]) for t in trials(run)} == {(first, first + more + budget)}
            assert run.identity["keep"] == "model" and run.facts["cost"][0] == more + budget
            # the trials' curves are those of any run, and other windows choose
            assert trials(run)[0].identity["evaluation"] == {"skip": 0, "windows": 256, "points": 8}
            assert run.identity["evaluation"] == {"skip": 256, "windows": 16, "seqlen": 32}
            assert named(stages, run.name, "evaluate").inputs["model"] is run
    assert not [s for s in stages if s.kind == "train" and s.facts["path"] in ("P-R", "scratch")]
    trained = sum(s.kind == "train" and s.facts["path"] == "trial" for s in stages)
    assert trained == 3 * 3 * 2 and named(stages, "parent").facts["path"] == "parent"


def test_shorter_trials_give_their_rate_to_larger_budgets(tmp_path: Path) -> None:
    stages = planned(study(tmp_path, retrain={"tokens": [2048, 4096, 8192]}, sweep={**SWEEP, "tokens": 2048}))
    small = named(stages, f"{MODEL}/P-R@2.048k", "select")
    larger = [named(stages, f"{MODEL}/P-R@{tag}") for tag in ("4.096k", "8.192k")]
    assert {run.identity["recipe"]["peak_rate"] for run in larger} == {None}
    assert len({run.inputs["rate"].fingerprint for run in larger}) == 1
    assert {t.fingerprint for t in trials(larger[0].inputs["rate"])} == {t.fingerprint for t in trials(small)}
    total = named(stages, f"{MODEL}/S_{{P+R}}@4.096k")
    assert trials(total.inputs["rate"])[0].identity["slice"] == [0, 2048]  # of its own slice, which begins earlier


def test_a_further_rate_adds_trials_and_changes_none(tmp_path: Path) -> None:
    before = planned(study(tmp_path, sweep=SWEEP))
    after = planned(study(tmp_path, sweep={**SWEEP, "rates": [*RATES, 3e-2]}))
    trials_of = [{s.fingerprint for s in stages if s.facts.get("path") == "trial"} for stages in (before, after)]
    assert trials_of[0] < trials_of[1] and len(trials_of[1]) == 12


def test_the_first_seed_alone_is_swept(tmp_path: Path) -> None:
    stages = planned(study(tmp_path, seeds=[3, 5, 7], sweep=SWEEP))
    first = named(stages, f"{MODEL}/S_R~s3", "select")
    others = [named(stages, f"{MODEL}/S_R~s{seed}") for seed in (5, 7)]
    assert all(run.inputs["rate"].fingerprint == first.fingerprint for run in others)
    assert {s.facts["sweep_seed"] for s in stages if s.kind == "select"} == {3}
    rule = [{"seed": 3, "setting": "equal_training_tokens"}]
    excluded = planned(study(tmp_path, seeds=[3, 5, 7], sweep=SWEEP, exclude=rule))
    first = named(excluded, f"{MODEL}/S_R~s5", "select")  # the first seed that has the run
    assert named(excluded, f"{MODEL}/S_R~s7").inputs["rate"].fingerprint == first.fingerprint


def test_a_parent_is_swept_if_the_study_says_so(tmp_path: Path) -> None:
    settings = ["equal_training_tokens", "equal_total_flops"]
    fixed = planned(study(tmp_path, settings=settings))
    stages = planned(study(tmp_path, settings=settings, sweep={**SWEEP, "parent": True}))
    parent = named(stages, "parent", "select")
    assert len(trials(parent)) == 3 and {t.tokens for t in trials(parent)} == {16_000}
    assert named(stages, MODEL, "prune").inputs["model"].fingerprint == parent.fingerprint
    twin = named(stages, f"{MODEL}/S_{{P+F}}", "select")  # a budget by FLOPs counts the parent once
    assert twin.facts["cost"][0] == named(fixed, f"{MODEL}/S_{{P+F}}").tokens
    own = planned(study(tmp_path, sweep={**SWEEP, "parent": [2e-3, 4e-3]}))
    assert [t.identity["recipe"]["peak_rate"] for t in trials(named(own, "parent", "select"))] == [2e-3, 4e-3]


def test_the_plan_counts_a_trial_that_is_the_run_as_the_run(tmp_path: Path) -> None:
    fixed = plan_study("micro", planned(study(tmp_path, seeds=[0, 1])))
    swept = plan_study("micro", planned(study(tmp_path, seeds=[0, 1], sweep=SWEEP)))
    sweeps = swept.flops_by["rate sweeps"]
    assert {**fixed.flops_by, "rate sweeps": sweeps} == pytest.approx(dict(swept.flops_by))
    once = sum(fixed.flops_by[purpose] for purpose in ("retraining", "from scratch")) / 2  # of two seeds
    assert sweeps == pytest.approx(2 * once) and sum(swept.flops_by.values()) == pytest.approx(swept.flops)
    assert "swept with seed 0 alone" in str(swept) and "9 trials for 3 choices" in str(swept)
    assert "swept with" not in str(fixed)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"rates": [1e-3, 1e-3]}, "sweep.rates: an entry appears twice"),
        ({"rates": RATES, "parent": [1e-3]}, "sweep.parent"),
        ({"rates": RATES, "parent": "yes"}, "sweep.parent"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(tmp_path: Path, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(tmp_path, sweep=sweep)


def test_a_rate_is_at_the_edge_unless_both_sides_were_tried() -> None:
    assert [edge_of(rate, (3e-3, 1e-3, 1e-2)) for rate in RATES] == ["low", None, "high"]


@pytest.fixture(scope="module")
def swept(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that was run: parent and runs swept, the highest rate so high that training diverges."""
    folder = tmp_path_factory.mktemp("swept")
    sweep = {"rates": [1e-5, 1e-2, 1e30], "windows": 4, "parent": [1e-3, 1e-2]}
    raw = common(text, methods=["minitron-depth"], retrain={"tokens": 512}, seeds=[0, 1], sweep=sweep)
    (folder / "swept.yaml").write_text(dump_yaml(raw), encoding="utf-8")
    loaded = Study.load(folder / "swept.yaml", folder / "out")
    assert not loaded.run(jobs=2, device="cpu").failed
    return loaded


def test_the_best_trial_is_the_run_and_was_trained_once(swept: Study) -> None:
    choice = record(swept.out, f"select-{MODEL}-S_R-s0-*")["result"]
    assert choice["peak_rate"] == 1e-2 and choice["losses"]["0.01"] < choice["losses"]["1e-05"]
    assert choice["losses"]["1e+30"] is None and choice["at_edge"] is None
    (trial,) = swept.out.glob(f"stages/train-{MODEL}-S_R-s0-rate-0.01-*")
    (run,) = swept.out.glob(f"stages/select-{MODEL}-S_R-s0-*")
    assert (run / "model/model.safetensors").samefile(trial / "model/model.safetensors")
    assert choice["curve"] == json.loads((trial / "record.json").read_text())["result"]["curve"]
    trained = [stage for stage in unique(swept.stages) if stage.kind == "train" and "/S_R~s0" in stage.name]
    assert len(trained) == 3
    assert record(swept.out, f"train-{MODEL}-S_R-s1-*")["result"]["peak_rate"] == 1e-2
    cells = {(cell.name, cell.seed): cell for cell in swept.results().cells}
    assert cells["S_R", 0].evaluation and cells["S_R", 0].peak_rate == 1e-2
    assert [point.loss for point in cells["S_R", 0].curve] == [point["loss"] for point in choice["curve"]]


def test_a_choice_resumes_and_is_found_intact(swept: Study) -> None:
    assert swept.run(jobs=2, device="cpu").ran == 0
    (run,) = swept.out.glob(f"stages/select-{MODEL}-P-R-s0-*")
    before = (run / "record.json").read_bytes()
    partial = run.with_name(f"{run.name}.partial-1")
    run.rename(partial)  # as if the process had been killed after linking
    (partial / "record.json").unlink()
    assert swept.run(jobs=2, device="cpu").ran == 1
    assert (run / "record.json").read_bytes() == before
    with (run / "model/model.safetensors").open("r+b") as file:  # which is the trial's file, too
        file.seek(5000)
        file.write(b"spoilt")
    assert swept.run(jobs=2, device="cpu").ran == 2
    assert (run / "record.json").read_bytes() == before
    assert all(swept.store.damage(stage) is None for stage in unique(swept.stages))


def test_each_trial_is_counted_once(swept: Study) -> None:
    results = swept.results()
    assert {(sweep.name, len(sweep.rates), sweep.whole) for sweep in results.sweeps} == {
        ("parent", 2, True),
        ("P-R", 3, True),
        ("S_R", 3, True),
    }
    counted = [parent.cost for parent in results.parents] + [cell.training for cell in results.cells]
    counted += [sweep.cost for sweep in results.sweeps]
    trained = sum(stage.tokens for stage in unique(swept.stages) if stage.kind == "train")
    assert sum(cost.tokens for cost in counted if cost) == trained
    assert all(cost and cost.seconds for cost in counted)
    for cell in results.cells:  # what a run and its rate cost does not depend on the seed that was swept
        assert cell.sweep and cell.sweep.tokens == 2 * 512
    assert results.parents[0].sweep and results.parents[0].sweep.tokens == SMALL["tokens"]


def test_the_report_shows_the_trials_and_warns_of_rates_at_the_edge(swept: Study) -> None:
    page = swept.report().read_text(encoding="utf-8")
    assert page.count('id="rates"') == 1 and "diverged" in page
    rows = list(csv.DictReader((swept.out / "sweeps.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 + 3 + 3 and sum(row["is_run"] == "True" for row in rows) == 3
    (row,) = [row for row in swept.status().stages if row.kind == "select" and row.name == "parent~s0"]
    assert row.note == "rate 0.01, the highest of the sweep"
    assert "The parent: 0.01 is the highest of 2 rates; try higher ones." in page


def test_a_sweep_that_diverges_everywhere_says_so(text: Path, tmp_path: Path) -> None:
    raw = common(text, methods=["minitron-depth"], settings=[], sweep={"rates": [1e29, 1e30], "tokens": 256})
    (tmp_path / "c.yaml").write_text(dump_yaml(raw), encoding="utf-8")
    failed = Study.load(tmp_path / "c.yaml", tmp_path / "out").run(jobs=2, device="cpu").failed
    assert list(failed) == [f"{MODEL}/P-R/rate"] and "add lower ones to sweep.rates" in failed[f"{MODEL}/P-R/rate"]
