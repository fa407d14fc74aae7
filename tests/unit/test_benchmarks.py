"""The plain algorithms that secateur is timed against decide as secateur does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for benchmarks/

from benchmarks.reference.sparsegpt import prune as sparsegpt

from helpers import calibration, hf, tiny_llama, windows
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.pattern import Pattern
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target

RATIO = Target(ratio=0.5)
GROUPS = Target(sizes={"kv_heads": 1, "ffn": 24})
METHODS = {
    "magnitude": RATIO,
    "wanda": RATIO,
    "sparsegpt": RATIO,
    "shortgpt": RATIO,
    "minitron-depth": RATIO,
    "shortened-llama": RATIO,
    "minitron-width": Target(sizes={"hidden": 16, "ffn": 24}),
    "flap": GROUPS,
    "wanda-sp": GROUPS,
    "llm-pruner": GROUPS,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("benchmarks"), num_hidden_layers=4)


def planned(directory: Path, method: str, target: Target) -> Plan:
    return make_plan(Checkpoint(directory), method, target, calibration(windows(16)))


def kept_by(plan: Plan) -> dict[str, torch.Tensor]:
    if plan.masks:
        return {f"mask.{name}": mask for name, mask in plan.masks.items()}
    if plan.granularity == "depth":
        return {"keep.layers": plan.keep_layers}
    kept = {f"keep.ffn.{i}": indices for i, indices in plan.keep_ffn.items()}
    if len(plan.keep_hidden) < plan.before.hidden:
        return kept | {"keep.hidden": plan.keep_hidden}
    return kept | {f"keep.kv.{i}": indices for i, indices in plan.keep_kv.items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        differing = (found[name] != value).float().mean() if name.startswith("mask.") else 0.0
        assert found[name].shape == value.shape
        assert float(differing) < 0.005 if name.startswith("mask.") else torch.equal(found[name], value), name


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_keeps_what_secateur_keeps(directory: Path, tmp_path: Path, method: str) -> None:
    reference = importlib.import_module(f"benchmarks.reference.{method.replace('-', '_')}").prune
    model = hf(directory)
    found = reference(model, windows(16), 0.5)
    plan = planned(directory, method, METHODS[method])
    same(found, kept_by(plan))
    model.save_pretrained(tmp_path / "out")
    opened = hf(tmp_path / "out")  # what a reference leaves behind is a model of the size asked for
    assert sum(p.numel() for p in opened.parameters()) == plan.after.total


def test_the_reference_of_sparsegpt_keeps_two_of_four(directory: Path) -> None:
    found = sparsegpt(hf(directory), windows(16), 0.5, group=4)
    same(found, kept_by(planned(directory, "sparsegpt", Target(pattern=Pattern.parse("2:4")))))
