from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import VARIANTS, hf, logits, naive_loss, seen_at, tiny_llama, windows, without_layers
from secateur.calibrate.engine import Block, BlockWalk, removal_losses
from secateur.calibrate.stats import AbsMeanByPosition, MeanSquare
from secateur.checkpoint import Checkpoint
from secateur.families import LLAMA
from secateur.prune import scoring_flops


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
        stats, states = block.observe(states, dict.fromkeys(LLAMA.sites, (MeanSquare, AbsMeanByPosition)))
        assert set(stats) == set(LLAMA.sites)
        for name, site in LLAMA.sites.items():
            (x,) = seen_at(model, f"model.layers.{block.index}.{site.module}", ids, output=site.output)
            for reader in site.readers:  # a linear's input is exactly what was observed
                (read,) = seen_at(model, f"model.layers.{block.index}.{reader}", ids, output=False)
                torch.testing.assert_close(read, x, rtol=0, atol=0)
            torch.testing.assert_close(stats[name][MeanSquare], x.square().mean((0, 1)), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(stats[name][AbsMeanByPosition], x.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in walk.model.modules())


def test_statistics_against_loops() -> None:
    x = torch.randn(3, 4, 2)
    square, position = MeanSquare(), AbsMeanByPosition()
    for batch in x.split(2):
        square.update(batch.to(torch.bfloat16))
        position.update(batch)
    for c in range(2):
        rounded = x.to(torch.bfloat16).double()
        wanted = sum(float(rounded[b, t, c]) ** 2 for b in range(3) for t in range(4)) / 12
        assert float(square.value()[c]) == pytest.approx(wanted, rel=1e-6)
        for t in range(4):
            wanted = sum(abs(float(x[b, t, c])) for b in range(3)) / 3
            assert float(position.value()[t, c]) == pytest.approx(wanted, rel=1e-6)
    assert square.value().dtype == position.value().dtype == torch.float32


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


@pytest.mark.parametrize("length", [1, 2, 4])
def test_scoring_flops_count_the_blocks_that_run(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    original: Callable[..., list[Tensor]] = Block.run
    monkeypatch.setattr(Block, "run", lambda self, states: (runs.append(self.index), original(self, states))[1])
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    before, after = checkpoint.shape, Checkpoint(tiny_llama(tmp_path, seed=1, num_hidden_layers=5 - length)).shape
    removal_losses(BlockWalk(checkpoint, windows()), length)
    flops = scoring_flops(before, after, "depth", 60, 12)
    assert flops == pytest.approx(len(runs) / before.layers * 60 * before.forward_flops(12))
    assert scoring_flops(before, after, "sparse", 60, 12) == 2 * scoring_flops(before, after, "width", 60, 12)


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
