"""Sweeps of learning rates: what is planned, that the best trial is the run, what is counted and what is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plan import named, planned, study

from secateur.errors import UserError
from secateur.study.plan import plan_study
from secateur.study.stage import Stage
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
