"""What a study's richer cells come to when they are run: objectives, controls, trunks, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.cli import main
from secateur.config import dump_yaml
from secateur.model.plan import JSON_FILE, TENSOR_FILE, load_masks
from secateur.pruning.pattern import Pattern
from secateur.study.resolve import resolve
from secateur.study.spec import load_study
from secateur.study.stages.controls import permuted_mask

SMALL = {"tokens": 8192, "hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2}
RECIPE = {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1}


def ran(file: Path, out: Path, capsys: Any, **raw: Any) -> dict[str, Any]:
    file.write_text(dump_yaml(raw), encoding="utf-8")
    assert main(["study", "run", str(file), "--out", str(out), "--jobs", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def common(text: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "cells",
        "corpus": {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280},
        "parent": SMALL,
        "ratios": 0.5,
        "retrain": {"tokens": 1024, "peak_rate": 2e-3},
        "settings": ["equal_training_tokens"],
        "calibration": {"windows": 8},
        "recipe": RECIPE,
        "evaluation": {"windows": 8, "points": 1},
    } | changes


def record(out: Path, pattern: str) -> dict[str, Any]:
    (found,) = out.glob(f"stages/{pattern}/record.json")
    return json.loads(found.read_text())


def weights(out: Path, pattern: str) -> dict[str, torch.Tensor]:
    (folder,) = out.glob(f"stages/{pattern}")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    return model.state_dict()


def test_objectives_and_controls(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    learned: dict[str, Any] = {"method": "sheared", "shapes": {"small": "layers=3,ffn=32"}, "controls": []}
    learned |= {"objective": "language-model", "options": {"steps": 120, "windows": 4}}
    answer = ran(
        tmp_path / "cells.yaml",
        out,
        capsys,
        **common(
            text,
            methods=[{"method": "sparsegpt", "pattern": "2:4"}, learned],
            controls=["permuted", "random-mask", "shuffled-weights", "dense-twin", "scratch"],
            retrain={
                "tokens": 1024,
                "peak_rate": 2e-3,
                "objective": ["language-model", {"kind": "distill", "temperature": 2.0, "settings": []}],
            },
        ),
    )
    assert not answer["failed"] and answer["objectives"] and answer["inherited"]
    (folder,) = out.glob("stages/prune-sparsegpt-2of4-*")
    masks = load_masks(folder / "model")
    name = next(iter(masks))
    pattern = Pattern(2, 4)
    runs = {"permuted": "permuted-*", "random-mask": "random-mask-*", "S_R": "S_R-*", "P-R": "P-R-[0-9a-f]*"}
    found = {run: weights(out, f"train-sparsegpt-2of4-{stage}") for run, stage in runs.items()}
    assert torch.equal(found["S_R"][name] != 0, masks[name])
    assert torch.equal(found["permuted"][name] != 0, permuted_mask(masks[name], name, 0, pattern))
    for init in ("random-mask", "permuted"):
        groups = (found[init][name] != 0).reshape(-1, 4).sum(1)
        assert set(groups.tolist()) == {2} and not torch.equal(found[init][name] != 0, masks[name])
    assert (weights(out, "train-sparsegpt-2of4-dense-twin-*")[name] != 0).all()
    assert (weights(out, "train-sparsegpt-2of4-scratch-*")[name] != 0).all()
    kept = masks[name]
    drawn, inherited = found["S_R"][name][kept], found["P-R"][name][kept]
    assert not torch.allclose(drawn.sort().values, inherited.sort().values, atol=1e-2)
    # Trained weights at other places begin nowhere near as low as in their own.
    shuffled, pruned = (
        record(out, f"train-sparsegpt-2of4-{stage}")["result"]["curve"][0]["loss"]
        for stage in ("shuffled-weights-*", "P-R-[0-9a-f]*")
    )
    assert pruned + 0.5 < shuffled
    taught = record(out, "train-sparsegpt-2of4-P-R+distill-*")["stage"]
    assert taught["identity"]["objective"]["temperature"] == 2.0 and "teacher" in taught["inputs"]
    sheared = record(out, "prune-sheared-small-*")
    assert (sheared["result"]["after"]["layers"], sheared["result"]["after"]["ffn"]) == (3, 32)
    read, (first, stop) = sheared["result"]["calibration"], sheared["stage"]["identity"]["slice"]
    assert read["tokens"] == read["windows"] * read["seqlen"] == stop - first  # each window of its slice once
    twin = record(out, "train-sheared-small-S_R-*")["stage"]["identity"]
    assert twin["slice"] == [first, stop + 1024]


def test_trunks_and_a_checkpoint_as_the_parent(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first"
    ran(tmp_path / "a.yaml", first, capsys, **common(text, methods=["magnitude"], settings=[]))
    (parent,) = first.glob("stages/train-parent-*/model")
    out = tmp_path / "out"
    answer = ran(
        tmp_path / "b.yaml",
        out,
        capsys,
        **common(
            text,
            parent={"checkpoint": str(parent)},
            methods=["minitron-depth", "wanda"],
            retrain={"tokens": [1024, 2048], "trunk": "shared", "peak_rate": 2e-3},
            recipe=RECIPE | {"schedule": "wsd"},
        ),
    )
    assert not answer["failed"]
    (fetched,) = out.glob("stages/fetch-parent-*")
    assert (fetched / "model").resolve() == parent.resolve()
    branch = record(out, "train-wanda-0.5-P-R-2.048k-*")
    assert branch["stage"]["identity"]["init"] == "continued"
    assert branch["result"]["curve"][0]["loss"] < record(out, "prune-wanda-0.5-*")["result"].get("loss", 9.0)
    (plan,) = out.glob("stages/prune-wanda-0.5-*/model")
    masks = load_masks(plan)
    for path in ("P-R", "S_R"):  # masks hold along trunk and branch
        found = weights(out, f"train-wanda-0.5-{path}-2.048k-*")
        assert all(not found[name][~mask].any() for name, mask in masks.items())
    rows = (out / "curves.csv").read_text().splitlines()
    ends = [int(row.split(",")[4]) for row in rows if row.startswith("P-R,minitron-depth") and ",0," in row]
    assert max(ends) == 2048


def test_a_sparse_checkpoint_as_the_parent(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its masks go through every cut and through retraining; a parent with other masks is another parent."""
    first = tmp_path / "first"
    ran(tmp_path / "a.yaml", first, capsys, **common(text, methods=["magnitude"], settings=[]))
    (pruned,) = first.glob("stages/prune-magnitude-*/model")
    out, study = tmp_path / "out", {"parent": {"checkpoint": str(pruned)}, "methods": ["minitron-depth", "wanda"]}
    answer = ran(tmp_path / "b.yaml", out, capsys, **common(text, ratios=[0.6], **study))
    assert not answer["failed"]
    before = load_masks(pruned)
    for method in ("minitron-depth", "wanda"):
        (plan,) = out.glob(f"stages/prune-{method}-0.6-*/model")
        masks, trained = load_masks(plan), weights(out, f"train-{method}-0.6-P-R-*")
        assert masks and all(not trained[name][~mask].any() for name, mask in masks.items())
        if method == "wanda":
            assert all(not (masks[name] & ~mask).any() for name, mask in before.items())
    spec = load_study(tmp_path / "b.yaml")
    sparse = resolve(spec).parents["parent"].identity
    for name in (JSON_FILE, TENSOR_FILE):
        (pruned / name).unlink()
    assert resolve(spec).parents["parent"].identity != sparse
