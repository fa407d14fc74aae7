from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import SCORED, VARIANTS, calibration, hf, logits, naive_loss, seen_at, tiny_llama, windows, without_layers
from secateur.calibration import prefetch as weights
from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.layer_removal import removal_losses
from secateur.calibration.statistics import MeanCosine, MeanSquare, WindowMagnitude
from secateur.errors import UserError
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import LLAMA
from secateur.pruning.cost import scoring_flops
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_states_and_loss_are_the_model_s(variant: str, batch: int, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    model, ids = hf(directory), windows(5)
    walk = BlockWalk(Checkpoint(directory), ids, batch=batch)
    states = walk.start()
    assert [s.shape[0] for s in states] == {1: [1] * 5, 2: [2, 2, 1], 5: [5], 8: [5]}[batch]
    torch.testing.assert_close(torch.cat(states), model.get_input_embeddings()(ids), rtol=0, atol=0)
    for block in walk.blocks():
        states = block.run(states)
        (wanted,) = seen_at(model, f"model.layers.{block.index}", ids, output=True)
        torch.testing.assert_close(torch.cat(states), wanted, rtol=1e-5, atol=1e-5)
    assert block.index == 4
    assert walk.loss(states) == pytest.approx(naive_loss(model, ids), rel=1e-5)


def test_two_walks_of_one_object_agree(tmp_path: Path) -> None:
    walk = BlockWalk(Checkpoint(tiny_llama(tmp_path)), windows(), batch=2)
    losses = []
    for _ in range(2):
        states = walk.start()
        for block in walk.blocks():
            states = block.run(states)
        losses.append(walk.loss(states))
    assert losses[0] == losses[1]


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    walk = BlockWalk(Checkpoint(tiny_llama(tmp_path)), windows())
    walk.start()
    for block in walk.blocks():
        loaded = [i for i, layer in enumerate(walk.layers) if not next(layer.parameters()).is_meta]
        assert loaded == [block.index]
    assert all(p.is_meta for p in walk.layers.parameters())


@pytest.mark.parametrize("variant", ["plain", "biased", "bf16", "wide_heads"])
@pytest.mark.parametrize("batch", [2, 5])
def test_statistics_are_those_of_naive_hooks(variant: str, batch: int, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    model, ids = hf(directory), windows(5)
    walk = BlockWalk(Checkpoint(directory), ids, batch=batch)
    states = walk.start()
    for block in walk.blocks():
        stats, states = block.observe(states, dict.fromkeys(LLAMA.sites, (MeanSquare, WindowMagnitude)))
        assert set(stats) == set(LLAMA.sites)
        for name, site in LLAMA.sites.items():
            (x,) = seen_at(model, f"model.layers.{block.index}.{site.module}", ids, output=site.output)
            for reader in site.readers:  # a linear's input is exactly what was observed
                (read,) = seen_at(model, f"model.layers.{block.index}.{reader}", ids, output=False)
                torch.testing.assert_close(read, x, rtol=0, atol=0)
            torch.testing.assert_close(stats[name][MeanSquare], x.square().mean((0, 1)), rtol=1e-4, atol=1e-6)
            heads = x.unflatten(-1, (-1, walk.checkpoint.shape.head_dim if site.space == "query" else 1))
            lengths = heads.square().sum(-1).sqrt()
            magnitudes = torch.stack([lengths.mean((0, 1)), lengths.square().sum(1).sqrt().mean(0)])
            torch.testing.assert_close(stats[name][WindowMagnitude][0], magnitudes, rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in walk.model.modules())


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["plain", "tied", "biased"])
def test_removal_losses_are_those_of_shorter_models(variant: str, length: int, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    ids = windows(3)
    full, losses = removal_losses(BlockWalk(Checkpoint(directory), ids, batch=2), length)
    assert full == pytest.approx(naive_loss(hf(directory), ids), rel=1e-5)
    assert len(losses) == 5 - length + 1
    for first, loss in enumerate(losses):
        shorter = without_layers(hf(directory), range(first, first + length))
        assert loss == pytest.approx(naive_loss(shorter, ids), rel=1e-5)


@pytest.mark.parametrize("method", SCORED)  # what learning costs: test_sheared.py
@pytest.mark.parametrize("length", [1, 3])
def test_scoring_flops_count_the_blocks_that_run(
    method: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward pass is two more; the embedding, the norms and the head are left to whole passes."""
    runs: list[float] = []
    forward: Callable[..., Tensor] = Block.forward

    def counted(block: Block, batch: Tensor, number: int = 0) -> Tensor:
        runs.append((3 if torch.is_grad_enabled() else 1) * len(batch))
        return forward(block, batch, number)

    monkeypatch.setattr(Block, "forward", counted)
    checkpoint, found = Checkpoint(tiny_llama(tmp_path)), get_method(method)
    sizes = {"layers": 5 - length} if found.granularity == "depth" else {"ffn": 48 - 8 * length}
    target = Target(ratio=0.5) if found.granularity == "sparse" else Target(sizes=sizes)
    plan = make_plan(checkpoint, method, target, calibration(windows()))
    flops = scoring_flops(checkpoint.shape, plan.after, found, 60, 12)
    whole = 60 * checkpoint.shape.forward_flops(12)
    assert flops == pytest.approx(sum(runs) / len(windows()) / checkpoint.shape.layers * whole)
    assert (flops == 0) == (not found.calibrated)


def test_set_weight_lasts_for_the_block_and_leaves_the_file(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    before = Checkpoint(directory).digest
    name, ids = "mlp.down_proj.weight", windows()
    walk = BlockWalk(Checkpoint(directory), ids)
    states = walk.start()
    for block in walk.blocks():
        block.weight(name).mul_(0.5)  # in place: the mapped file must not change
        block.set_weight(name, block.weight(name) * 0)
        states = block.run(states)
    model = hf(directory)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    assert walk.loss(states) == pytest.approx(naive_loss(model, ids), rel=1e-5)
    assert Checkpoint(directory).digest == before


def test_loss_of_a_certain_model_is_nearly_zero_and_of_a_blank_one_log_v(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    model = hf(directory)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(directory)
    walk = BlockWalk(Checkpoint(directory), windows())
    states = walk.start()
    assert walk.loss(states) == pytest.approx(math.log(61), rel=1e-6)
    assert logits(model, windows()).abs().max() == 0


def test_a_block_that_is_changed_runs_again_for_the_next(tmp_path: Path) -> None:
    directory, ids = tiny_llama(tmp_path), windows()
    model, cosines = hf(directory), []
    walk = BlockWalk(Checkpoint(directory), ids, batch=2)
    for block, stats in walk.observe({"ffn_hidden": (MeanSquare,)}, (MeanCosine,), replay=lambda _: None):
        layer = f"model.layers.{block.index}"
        (seen,) = seen_at(model, f"{layer}.mlp.down_proj", ids, output=False)
        torch.testing.assert_close(stats["ffn_hidden"][MeanSquare], seen.square().mean((0, 1)), rtol=1e-4, atol=1e-6)
        before, after = (seen_at(model, layer, ids, output=output)[0].double() for output in (False, True))
        cosines.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))
        assert float(stats["states"][MeanCosine]) == pytest.approx(cosines[-1], rel=1e-6)  # as it was when it was shown
        if block.index in (1, 2):
            block.set_weight("mlp.up_proj.weight", block.weight("mlp.up_proj.weight") * -2)
            with torch.no_grad():
                model.model.layers[block.index].mlp.up_proj.weight.mul_(-2)
    assert len(cosines) == 5


def test_prefetched_weights_are_those_read_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    stats = []
    for loader in (weights.on_demand, weights.prefetch):
        monkeypatch.setattr("secateur.calibration.block_walk.on_demand", loader)
        walk = BlockWalk(checkpoint, windows(3), batch=1)
        stats.append([values for _, values in walk.observe({site: [MeanSquare] for site in walk.family.sites})])
    for a, b in zip(*stats, strict=True):
        assert all(torch.equal(a[site][MeanSquare], b[site][MeanSquare]) for site in a)


def test_reading_ahead_holds_two_blocks_and_tells_of_a_bad_one_in_its_turn() -> None:
    read, shown = [], []

    def block(index: int) -> dict[str, torch.Tensor]:
        read.append(index)
        if index == 3:
            raise UserError("block 3 is bad")
        return {"weight": torch.full((2,), float(index))}

    with pytest.raises(UserError, match="block 3"):
        for tensors in weights.prefetch([1, 2, 3, 4], block, "cpu", torch.bfloat16):
            shown.append((float(tensors["weight"][0]), tensors["weight"].dtype))
            assert len(read) <= len(shown) + 1
    assert shown == [(1.0, torch.bfloat16), (2.0, torch.bfloat16)] and read == [1, 2, 3]
    assert list(weights.prefetch([], block, "cpu", torch.float32)) == []
