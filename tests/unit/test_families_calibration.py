"""The block walk and its gradients, for every family, against the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from family_configs import FAMILIES, FAMILY_CONFIGS
from helpers import hf, naive_loss, seen_at, tiny_family, windows
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.gradients import gradients_of
from secateur.calibration.layer_removal import removal_losses
from secateur.calibration.statistics import MeanGradient, MeanSquare, MeanSquareGradient
from secateur.model.checkpoint import Checkpoint

IDS = windows(5, 16, seed=2)  # in batches of two: one is not full


def near(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.shape == wanted.shape, what
    # A bias of keys without RoPE has no gradient but rounding.
    assert float((got - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-7, what


STATES = [(n, torch.float32) for n in FAMILY_CONFIGS] + [(n, torch.bfloat16) for n in FAMILIES]


@pytest.mark.parametrize(("name", "dtype"), STATES, ids=lambda value: str(value).removeprefix("torch."))
def test_states_are_the_model_s(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, name, dtype=dtype)
    model = hf(directory)
    with torch.no_grad():
        wanted = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    walk = BlockWalk(Checkpoint(directory), IDS, batch=2)
    states = walk.start()
    for block in walk.blocks():
        hidden = torch.cat(states)[..., : model.config.hidden_size]  # shared keys and values may lie behind
        torch.testing.assert_close(hidden, wanted[block.index], rtol=1e-5, atol=1e-5)
        states = block.run(states)
    with torch.no_grad():
        last = torch.cat(states)[..., : model.config.hidden_size]
        torch.testing.assert_close(walk.norm(last), wanted[-1], rtol=1e-5, atol=1e-5)
    assert walk.loss(states) == pytest.approx(naive_loss(model, IDS), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_see_what_goes_through_the_model(name: str, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, name)
    model, checkpoint = hf(directory), Checkpoint(directory)
    walk, family = BlockWalk(checkpoint, IDS, batch=2), checkpoint.family
    for block, stats in walk.observe(dict.fromkeys(family.sites, (MeanSquare,))):
        modules = {name for name, _ in block.module.named_modules()}
        assert set(stats) == {name for name, site in family.sites.items() if site.module in modules}
        for site, found in ((name, family.sites[name]) for name in stats):
            (seen,) = seen_at(model, f"model.layers.{block.index}.{found.module}", IDS, output=found.output)
            near(stats[site][MeanSquare], seen.square().mean(dim=(0, 1)), site)
            for reader in modules.intersection(found.readers):  # the linears said to read it do
                (read,) = seen_at(model, f"model.layers.{block.index}.{reader}", IDS, output=False)
                torch.testing.assert_close(read, seen)
    for site in family.hidden_sites:
        assert family.sites[site].output and family.sites[site].module.endswith("norm")
    readers = [reader for site in family.sites.values() for reader in site.readers]
    assert sorted(f"{reader}.weight" for reader in readers) == sorted(checkpoint.shape.linear_sizes())


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_gradients_are_the_model_s(name: str, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, name)
    model, checkpoint = hf(directory), Checkpoint(directory)
    parameters = {n: p.requires_grad_() for n, p in model.named_parameters()}
    mean = {n: torch.zeros_like(p) for n, p in parameters.items()}
    square = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for window in IDS:
        rows = model(input_ids=window[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(rows[:-1], window[1:])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for n, gradient in zip(parameters, gradients, strict=True):
            mean[n] += gradient / len(IDS)
            square[n] += gradient.square() / len(IDS)
    order, seen = [], set()
    walk = BlockWalk(checkpoint, IDS, batch=1)
    for block, found in gradients_of(walk, (MeanGradient, MeanSquareGradient), outer=True):
        order.append(block.index if block else None)
        for rest, gradient in found[MeanGradient].items():
            full = checkpoint.family.block_tensor(block.index, rest) if block else rest
            near(gradient, mean[full], full)
            near(found[MeanSquareGradient][rest], square[full], full)
            seen.add(full)
    assert seen == set(parameters)  # a tied head is the embedding
    assert order == [*reversed(range(checkpoint.shape.layers)), None]


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_the_size_of_the_kv_cache_is_the_library_s(name: str, tmp_path: Path) -> None:
    directory, positions = tiny_family(tmp_path, name), 4  # fewer than any window
    with torch.no_grad():
        cache = hf(directory)(input_ids=windows(1, positions), use_cache=True).past_key_values
    tensors = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    values = sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
    assert Checkpoint(directory).shape.kv_cache_bytes == 2 * values // positions  # 16 bits each


BYPASSED = ["qwen2-mixed", "gemma3-old", "gemma3-untied", "olmo2", "phi3-partial"]
BYPASSED += ["qwen3_5", "phi", "cohere2", "gemma4", "gemma4-shared", "lfm2"]


@pytest.mark.parametrize("name", BYPASSED)
def test_removal_losses_are_those_of_the_bypassed_model(name: str, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, name)
    checkpoint = Checkpoint(directory)
    full, losses = removal_losses(BlockWalk(checkpoint, IDS, batch=2), 2)
    assert full == pytest.approx(naive_loss(hf(directory), IDS), rel=1e-5)
    for first, loss in enumerate(losses):
        if checkpoint.pinned_layers.intersection((first, first + 1)):
            continue
        model = hf(directory)
        for i in (first, first + 1):  # hands on what it is given
            model.model.layers[i].forward = lambda hidden_states, **_: hidden_states
        assert loss == pytest.approx(naive_loss(model, IDS), rel=1e-5)
