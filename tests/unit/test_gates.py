"""Gates on every family: what a gated model computes is what the model cut to its gates does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from family_configs import FAMILY_CONFIGS
from helpers import tiny_family
from secateur.losses.next_token import model_loss
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.shapes import Shape
from secateur.pruning.learned import cut_plan, gate_values, write_gated
from secateur.pruning.pipeline import write_pruned
from secateur.training.gates import Gates
from secateur.training.init import stored_weights
from secateur.training.parallel import Execution, TrainModule, place_model

IDS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))


def target_of(shape: Shape) -> Shape:
    """Smaller in everything."""
    ungated = {"hidden"} if shape.tied and not shape.family.final_norm_tensors else set()
    for axis, units in {"layers": 4, "hidden": 36, "ffn": 40, "kv": 2}.items():
        shape = shape.narrowed(axis, units) if axis in shape.family.axes and axis not in ungated else shape
    return shape.openable(where="test")


def gated(checkpoint: Checkpoint, after: Shape) -> tuple[TrainModule, Gates]:
    model = skeleton(checkpoint.config, checkpoint.directory)
    gates = Gates(model, get_method("sheared"), checkpoint.shape, after)
    return place_model(model, stored_weights(checkpoint), Execution(), gates), gates


def set_gates(gates: Gates, after: Shape, *, soft: bool) -> None:
    """As many open as the shape has, at random; the open ones between a half and one, or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for space, a in gates.a.items():
            pinned = gates.pinned if space == "layers" else []
            for row in a:
                order = torch.randperm(len(row), generator=generator).tolist()
                order = torch.tensor(pinned + [unit for unit in order if unit not in pinned])
                row.fill_(-4.6)
                kept = order[: after.units(space)]
                row[kept] = torch.rand(len(kept), generator=generator) * 2 if soft else 4.6


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_gated_model_computes_what_the_cut_one_does(tmp_path: Path, name: str, soft: bool) -> None:
    checkpoint = Checkpoint(tiny_family(tmp_path, name))
    try:
        after = target_of(checkpoint.shape)
    except Exception:  # Llama with biases and Gemma insist on heads that divide the hidden size
        after = dataclasses.replace(checkpoint.shape, layers=4, hidden=36, ffn=40)
    module, gates = gated(checkpoint, after)
    set_gates(gates, after, soft=soft)
    with torch.no_grad():
        _, expected, _ = module.eval()(IDS)
    assert (expected - model_loss(checkpoint.load(), IDS)[1]).abs().max() > 0.01
    (tmp_path / "gated").mkdir()
    (tmp_path / "cut").mkdir()
    scores = gates.scores()
    plan = cut_plan(
        checkpoint, "sheared", gates.method, scores, after, request={}, calibration={"source": None}, training={}
    )
    dense = write_gated(checkpoint, module, gate_values(gates.method, scores, after), tmp_path / "gated")
    write_pruned(dense, plan, tmp_path / "cut")
    found = model_loss(Checkpoint(tmp_path / "cut").load(), IDS)[1]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert Checkpoint(tmp_path / "cut").shape.as_dict() == after.as_dict()
