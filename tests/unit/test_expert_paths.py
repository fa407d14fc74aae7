"""Mixtures on every path of execution: several processes, after a kill, in bfloat16, with states on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expert_models import random_mixture, tiny_mixture
from helpers import files, hf, killed_behind, logits, windows
from processes import together
from reference import opened
from secateur.calibration.journal import Journal
from secateur.cli import main
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import load_masks
from secateur.training.masks import Masks

IDS = windows(32, 16)  # 512 tokens, of which about a quarter go to each expert
CHANNELS = ["--axes", "expert_ffn"]

#: method and options; the family that it runs on, so that each way of storing experts has its turn
JOBS: dict[str, tuple[str, list[str]]] = {
    "reap": ("gpt_oss", ["--method", "reap"]),
    "reap-pruned": ("deepseek_v3", ["--method", "reap", "--propagate", "pruned"]),
    "wanda": ("qwen3_moe", ["--method", "wanda"]),
    "sparsegpt": ("granitemoe", ["--method", "sparsegpt"]),
    "minitron-width": ("mixtral", ["--method", "minitron-width", *CHANNELS]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    for family, _ in JOBS.values():
        tiny_mixture(folder, family).rename(folder / family)
    np.save(folder / "ids.npy", IDS.numpy())
    np.save(folder / "ids-2.npy", windows(2, 64).numpy())  # of three processes, the last has no window
    return folder


def line(models: Path, out: Path, name: str, *more: str, ids: str = "ids") -> list[str]:
    family, options = JOBS[name]
    calibration = ["--calibration", f"tokens:{models / f'{ids}.npy'}", "--batch", "5"]
    return ["prune", str(models / family), str(out), *options, "--ratio", "0.5", *calibration, *more]


@pytest.mark.parametrize("states", ["ram", "disk"])
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_run_resumes_to_the_same_bytes(
    name: str, states: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(line(models, tmp_path / "whole", name)) == 0
    with killed_behind(monkeypatch, 1):
        assert main(line(models, tmp_path / "out", name, "--states", states)) == 130
    finish = Journal.finish
    visits: list[int] = []
    monkeypatch.setattr(Journal, "finish", lambda self, step: (visits.append(step), finish(self, step))[1])
    assert main(line(models, tmp_path / "out", name, "--states", states, "--resume")) == 0
    assert visits == [2, 3]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def assert_alike(folder: Path, expected: Path) -> None:
    """The same selection, the same counts of tokens, and scores to 1e-4."""
    plan, reference = load_file(folder / "plan.safetensors"), load_file(expected / "plan.safetensors")
    assert plan.keys() == reference.keys()
    for name, tensor in reference.items():
        close = torch.allclose(plan[name].float(), tensor.float(), rtol=1e-4, atol=1e-6)
        assert close if name.startswith("score.") else torch.equal(plan[name], tensor), f"{folder}: {name}"
    weights, reference = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        assert (weights[name] - tensor).norm() <= 1e-3 * tensor.norm(), f"{folder}: {name}"
    routing, reference = (
        json.loads((each / "plan.json").read_text())["summary"]["routing"] for each in (folder, expected)
    )
    assert routing.pop("rank_agreement", {}) == pytest.approx(reference.pop("rank_agreement", {}))
    assert routing == reference


@pytest.mark.slow
def test_three_processes_prune_as_one_does(models: Path, tmp_path: Path) -> None:
    cases = {name: (name, "ids") for name in JOBS} | {f"{name}-2": (name, "ids-2") for name in ("reap", "wanda")}
    jobs = []
    for case, (name, ids) in cases.items():
        assert main(line(models, tmp_path / f"one-{case}", name, ids=ids)) == 0
        disk = ["--states", "disk"] if case == "wanda" else []
        jobs.append(line(models, tmp_path / f"three-{case}", name, *disk, ids=ids))
    together(3, jobs, tmp_path)
    for case in cases:
        assert_alike(tmp_path / f"three-{case}", tmp_path / f"one-{case}")


@pytest.mark.parametrize("name", JOBS)
def test_checkpoints_in_bfloat16_in_both_spellings(name: str, models: Path, tmp_path: Path) -> None:
    """The decisions are those for a float32 file of the same values, and the outputs of both spellings are equal."""
    family, options = JOBS[name]
    model: Any = random_mixture(family)
    model.to(torch.bfloat16)
    outs = {}
    for label, dtype, fused in (
        ("full", torch.float32, False),
        ("half", torch.bfloat16, False),
        ("fused", torch.bfloat16, True),
    ):
        outs[label] = out = tmp_path / f"{label}-out"
        model.to(dtype).save_pretrained(tmp_path / label, save_original_format=not fused)
        calibration = ["--calibration", f"tokens:{models / 'ids.npy'}", "--batch", "16"]
        assert main(["prune", str(tmp_path / label), str(out), *options, "--ratio", "0.5", *calibration]) == 0
    full, half, fused_plan = (load_file(out / "plan.safetensors") for out in outs.values())
    assert full.keys() == half.keys() == fused_plan.keys()
    for tensor in full:
        assert torch.equal(half[tensor], fused_plan[tensor]), tensor
        if name != "sparsegpt":
            assert torch.equal(full[tensor], half[tensor]), tensor
        elif tensor.startswith("mask."):  # new weights are rounded before the next block reads them
            assert (full[tensor] == half[tensor]).float().mean() > 0.95, tensor
    stored = [Checkpoint(outs[label]) for label in ("half", "fused")]
    for checkpoint in stored:
        weights = [tensor for tensor in checkpoint.tensors() if not tensor.endswith("correction_bias")]
        assert {checkpoint.dtype_of(tensor) for tensor in weights} == {torch.bfloat16}
    assert all(torch.equal(*(checkpoint.tensor(t) for checkpoint in stored)) for t in stored[0].tensors())
    Masks(opened(outs["half"]), load_masks(outs["half"])).check()
    if name != "sparsegpt":
        torch.testing.assert_close(logits(hf(outs["half"]), IDS[:2]), logits(hf(outs["full"]), IDS[:2]))
