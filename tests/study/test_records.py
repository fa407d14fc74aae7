"""From planned stages to records, before anything but the corpus has run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plan import study

from secateur.comparison.records import StudyResults
from secateur.files import write_json
from secateur.report.judgement import judge
from secateur.report.page import build_report
from secateur.study.collect import collect
from secateur.study.planner import stages_of
from secateur.study.resolve import ResolvedParent, ResolvedStudy
from secateur.study.store import Store

SHEARED = {"method": "sheared", "axes": "layers", "options": {"steps": 10, "windows": 4}}
SIZES = {"hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 280}


def collected(folder: Path, **changes: Any) -> StudyResults:
    """The records of a study of which the corpus alone is finished."""
    of = study(folder, **changes)
    parents = {n: ResolvedParent(p.shape(280), p.checkpoint or "") for n, p in of.all_parents.items()}  # type: ignore[arg-type]
    stages, store = stages_of(of, ResolvedStudy("text", parents)), Store(folder / "out")
    corpus = store.folder(stages[0])
    corpus.mkdir(parents=True)
    write_json(corpus / "record.json", {"result": {"tokens": 100_000}})
    return collect(of, stages, store, "")


def test_parents_and_pruned_models_have_the_seed_that_they_vary_with(tmp_path: Path) -> None:
    results = collected(tmp_path, ratios=[0.5, 0.25], seeds=[0, 1], exclude=[{"seed": 1, "target": 0.25}])
    assert [(p.name, p.seed, p.children) for p in results.parents] == [("parent", 0, 2), ("parent", 1, 1)]
    assert [(p.target, p.seed) for p in results.pruned] == [("0.5", 0), ("0.5", 1), ("0.25", 0)]
    assert results.seeds_vary == "all"


@pytest.mark.parametrize("seeds", [0, {"values": [0, 1], "vary": "training"}])
def test_what_all_seeds_share_has_no_seed(tmp_path: Path, seeds: Any) -> None:
    results = collected(tmp_path, ratios=[0.5, 0.25], seeds=seeds)
    assert [(p.seed, p.children) for p in results.parents] == [(None, 2)]
    assert {p.seed for p in results.pruned} == {None}


def test_prunings_of_a_checkpoint_that_differ_in_their_seed_are_one_child(tmp_path: Path) -> None:
    parent = {"checkpoint": "hf:a/b", "tokens": 1000, **SIZES}
    methods = ["wanda", "magnitude"]
    results = collected(tmp_path, parent=parent, methods=methods, settings="equal_training_tokens", seeds=[0, 1])
    assert [(p.seed, p.children) for p in results.parents] == [(None, 2)]
    assert [(p.method, p.seed) for p in results.pruned] == [("wanda", 0), ("wanda", 1), ("magnitude", None)]


def test_learning_is_recorded_and_what_has_not_run_is_not_measured(tmp_path: Path) -> None:
    results = collected(tmp_path, methods=["minitron-depth", SHEARED], controls="without-pruning-tokens")
    assert {p.method: p.training_tokens for p in results.pruned} == {"minitron-depth": 0, "sheared": 1280}
    tokens = {c.name: c.training.tokens for c in results.cells if c.method == "sheared"}
    assert tokens == {
        "P-R": 4096,
        "S_R": 4096 + 1280,
        "S_{P+R}": 16_000 + 4096 + 1280,
        "without-pruning-tokens": 4096,
    }
    judgement = judge(results)
    assert {v.winner for v in judgement.verdicts} == {"not measured"} and all(v.reason for v in judgement.verdicts)
    assert build_report(judgement, tmp_path / "report").is_file()
