"""Block reconstruction in studies: as what the budget is spent on, and as a part of pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import Study
from secateur.comparison.index import Index
from secateur.comparison.objectives import objective_rows
from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import load_masks
from secateur.pruning.cost import reconstruction_flops
from secateur.report.prose import objective_sentence

RECIPE = {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1}


def content(text: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "blocks",
        "corpus": {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280},
        "parent": {"tokens": 8192, "hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2},
        "ratios": 0.5,
        "methods": ["wanda", "minitron-depth", {"method": "flap", "name": "tuned", "reconstruct": 3}],
        "retrain": {
            "tokens": 1024,
            "objective": [
                "language-model",
                {"kind": "reconstruct", "settings": []},
                {"kind": "reconstruct", "name": "flops", "equal": "flops", "rate": 0.05, "settings": []},
            ],
        },
        "settings": ["equal_training_tokens"],
        "calibration": {"windows": 8},
        "recipe": RECIPE,
        "evaluation": {"windows": 8, "points": 1},
    } | changes


def study_of(file: Path, raw: dict[str, Any]) -> Study:
    file.write_text(dump_yaml(raw), encoding="utf-8")
    return Study.load(file, file.parent / "out")


def test_the_plan_charges_its_tokens_and_flops(text: Path, tmp_path: Path) -> None:
    study = study_of(tmp_path / "blocks.yaml", content(text))
    stages = {stage.name: stage for stage in study.stages if stage.kind in ("train", "reconstruct", "prune")}
    assert stages["wanda-0.5/P-R+reconstruct"].kind == "reconstruct"
    assert not [name for name in stages if "depth" in name and "+" in name]
    assert any("minitron-depth: no run with objective reconstruct" in note for note in study.plan().notes)
    plain, run, equal = (stages[f"wanda-0.5/P-R{name}"] for name in ("", "+reconstruct", "+flops"))
    shape = plain.facts["shape"]
    assert run.identity["slice"] == plain.identity["slice"] and run.tokens == 1024
    assert run.flops == reconstruction_flops(shape, shape, 1024, 1024, 32)
    window = reconstruction_flops(shape, shape, 32, 32, 32)
    assert equal.tokens % 32 == 0 and abs(equal.flops - plain.flops) <= window / 2 and equal.tokens < 1024
    tuned, twin = stages["tuned-0.5"], stages["tuned-0.5/S_R"]
    assert tuned.identity["reconstruct"]["slice"] == [8192, 8192 + 3 * 64] and tuned.facts["training_tokens"] == 192
    assert twin.identity["slice"] == [8192, 8192 + 192 + 1024]
    assert stages["tuned-0.5/P-R"].identity["slice"] == [8192 + 192, 8192 + 192 + 1024]
    without = study_of(tmp_path / "plain.yaml", content(text, methods=["wanda"], retrain={"tokens": 1024}))
    assert {stage.fingerprint for stage in without.stages} <= {stage.fingerprint for stage in study.stages}


@pytest.mark.slow
def test_runs_are_compared_as_any_other(text: Path, tmp_path: Path) -> None:
    raw = content(text, settings=[], retrain={"tokens": 1024, "objective": ["language-model", {"kind": "reconstruct"}]})
    raw["parent"] |= {"tokens": 4096}
    raw["methods"] = ["wanda", {"method": "minitron-width", "name": "tuned", "reconstruct": 3}]
    study = study_of(tmp_path / "blocks.yaml", raw)
    study.run(jobs=2)
    results = study.results()
    cells = {(cell.method, cell.objective): cell for cell in results.cells}
    run = cells["wanda", "reconstruct"]
    assert run.curve == () and run.evaluation is not None and run.path == "pruned" and run.training.tokens == 1024
    pruned = next(model for model in results.pruned if model.method == "wanda")
    assert pruned.evaluation and run.evaluation.loss != pruned.evaluation.loss
    rows = {(row.name, row.second.objective): row for row in objective_rows(Index(results))}
    assert len(rows) == 2 and all(row.equal == "tokens" and row.mean for row in rows.values())
    assert ": reconstruct on 1.02\xa0k tokens against" in objective_sentence(next(iter(rows.values())))
    (folder,) = (tmp_path / "out").glob("stages/reconstruct-wanda-0.5-P-R+reconstruct-*")
    record = json.loads((folder / "record.json").read_text())["result"]
    assert record["reconstruction"]["tokens"] == 1024 and record["reconstruction"]["steps"] == 16
    assert all(block["after"] < block["before"] for block in record["reconstruction"]["blocks"] if block["tuned"])
    (plan,) = (tmp_path / "out").glob("stages/prune-wanda-0.5-*")
    before, after = Checkpoint(plan / "model"), Checkpoint(folder / "model")
    masks = load_masks(plan / "model")
    assert all(not after.tensor(name)[~mask].any() for name, mask in masks.items())
    changed = {name for name in after.tensors() if not torch.equal(after.tensor(name), before.tensor(name))}
    assert changed and all(name.startswith("model.layers.") for name in changed)
    (tuned,) = (tmp_path / "out").glob("stages/prune-tuned-0.5-*")
    summary = json.loads((tuned / "model" / "plan.json").read_text())["summary"]["reconstruction"]
    assert summary["tokens"] == 192 and summary["steps"] == 3 and summary["held_out_windows"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [{"method": "shortgpt", "reconstruct": 3}]}, r"methods\[0\].reconstruct: shortgpt: it tunes"),
        ({"retrain": {"tokens": 1000, "objective": "reconstruct"}}, "retrain.tokens: reconstruction reads whole"),
        ({"retrain": {"tokens": 1024, "objective": {"kind": "distill", "rate": 0.1}}}, "goes with kind: reconstruct"),
        ({"retrain": {"tokens": 1024, "objective": {"kind": "reconstruct", "alpha": 0.5}}}, "go with kind: distill"),
    ],
)
def test_bad_files(changes: dict[str, Any], message: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        study_of(tmp_path / "blocks.yaml", content(text, **changes))
