"""The parent trained on the tokens of its pruned models: planned once, run, reported, offered where it is absent."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from test_cells import common, ran, record
from test_plan import named, planned, study
from test_records import SHEARED, SIZES

from secateur.cli import main
from secateur.study.plan import plan_study

CONTROL = "parent-continued"
CHECKPOINT = {"checkpoint": "hf:a/b", **SIZES}


def test_the_control_is_one_run_for_each_parent_budget_and_seed(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "methods": ["minitron-depth", "wanda"],
        "retrain": {"tokens": [2048, 4096], "peak_rate": 2e-3},
    }
    changes |= {"seeds": [0, 1], "parent": CHECKPOINT, "settings": "equal_training_tokens"}
    without = planned(study(tmp_path, **changes))
    stages = planned(study(tmp_path, **changes, controls=CONTROL))
    fingerprints = {stage.fingerprint for stage in without}
    additions = [stage for stage in stages if stage.fingerprint not in fingerprints]
    assert fingerprints < {stage.fingerprint for stage in stages}  # no other stage has changed
    runs = [stage for stage in additions if stage.kind == "train"]
    assert sorted(run.name for run in runs) == [
        f"parent/{CONTROL}@{budget}~s{seed}" for budget in ("2.048k", "4.096k") for seed in (0, 1)
    ]
    assert len(additions) == 2 * len(runs)  # each with its evaluation
    run, pruned = named(stages, f"parent/{CONTROL}@2.048k~s1"), named(stages, "wanda-0.5/P-R@2.048k~s1")
    assert run.identity["slice"] == pruned.identity["slice"] and run.identity["recipe"] == pruned.identity["recipe"]
    assert run.inputs["model"].kind == "fetch" and run.facts["shape"] == run.inputs["model"].facts["shape"]


def test_a_pretrained_parent_of_each_seed_has_the_control_and_learned_pruning_its_own(tmp_path: Path) -> None:
    stages = planned(study(tmp_path, methods=["minitron-depth", SHEARED], seeds=[0, 1], controls=CONTROL))
    run = named(stages, f"parent/{CONTROL}~s1")
    assert run.inputs["model"] is named(stages, "minitron-depth-0.5~s1", "prune").inputs["model"]
    learned = named(stages, f"sheared-0.5/{CONTROL}~s1")
    assert learned.identity["slice"] == named(stages, "sheared-0.5/P-R~s1").identity["slice"] != run.identity["slice"]


def test_plan_offers_the_control_for_checkpoints_alone(tmp_path: Path) -> None:
    for changes, offers in (
        ({"parent": CHECKPOINT, "settings": "equal_training_tokens"}, True),
        ({"parent": CHECKPOINT, "settings": "equal_training_tokens", "controls": CONTROL}, False),
        ({}, False),
    ):
        assert (CONTROL in " ".join(plan_study("micro", planned(study(tmp_path, **changes))).notes)) == offers, changes


def test_a_checkpoint_is_trained_on_and_reported(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    ran(tmp_path / "a.yaml", first, capsys, **common(text, methods=["magnitude"], settings=[]))
    (parent,) = first.glob("stages/train-parent-*/model")
    raw = common(text, parent={"checkpoint": str(parent)}, methods=["minitron-depth", "wanda"], controls=CONTROL)
    answer = ran(tmp_path / "b.yaml", out, capsys, **raw)
    assert not answer["failed"]
    run = record(out, f"train-parent-{CONTROL}-*")["result"]  # one for both methods
    before = record(out, "evaluate-parent-[0-9a-f]*")["result"]["loss"]
    after = record(out, f"evaluate-parent-{CONTROL}-*")["result"]["loss"]
    assert run["curve"][0]["loss"] == pytest.approx(before, abs=1e-3) and after < before
    rows = [row for row in csv.DictReader((out / "cells.csv").read_text().splitlines()) if row["name"] == CONTROL]
    assert [row["method"] for row in rows] == ["minitron-depth", "wanda"]
    assert {float(row["loss"]) for row in rows} == {after} and {row["ratio_total"] for row in rows} == {"0.0"}
    regime = answer["regime"][0]
    assert [check["method"] for check in regime["continued"]] == ["minitron-depth", "wanda"] and not regime["unmatched"]
    assert main(["study", "report", str(tmp_path / "b.yaml"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("\nparent-continued ") == 1  # a row beside the pruned models'
    page = (out / "report.html").read_text()
    assert page.count("<td>parent-continued</td><td>the parent</td>") == 1  # in the ledger, once
    assert "The part of the parent that pruning removed" in page
