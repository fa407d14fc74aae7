"""Families and their variants with every method: outputs are the model cut in memory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from family_configs import FAMILIES, FAMILY_CONFIGS, cut_axes
from helpers import SCORED, edit_config, logits, windows
from reference import Pruned, Zoo, assert_same_logits, calibration_means, opened, reference
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import FAMILIES as TABLE

SOME = ("minitron-width", "flap")  #: tried on the families' variants: every axis is cut by one of them
VARIANTS = tuple(name for name in FAMILY_CONFIGS if name not in FAMILIES)
#: two methods for each family, in turn; test_family_proofs.py has every kind of pruning on each
CASES = [(family, SCORED[(2 * n + k) % len(SCORED)]) for n, family in enumerate(FAMILIES) for k in range(2)]
CASES += [(variant, method) for variant in VARIANTS for method in SOME]


def test_every_family_and_every_method_are_here() -> None:
    alone = [family for family in TABLE if not set(family.model_types).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    # The rest only exist within image-text models; mixtures have tests of their own.
    assert set(FAMILIES) == {family.name for family in alone if not family.experts}
    assert {method for _, method in CASES} == set(SCORED)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_output_is_the_model_cut_in_memory(name: str, method: str, zoo: Zoo) -> None:
    pruned = zoo.pruned(name, method)
    got, plan = opened(pruned.out), pruned.plan
    filled = calibration_means(pruned) if method == "flap" else None
    assert_same_logits(got, reference(pruned, filled=filled))
    assert float((logits(got, windows()) - zoo.untouched(name)).abs().max()) > 0.05
    assert Checkpoint(pruned.out).shape == plan.after
    assert sum(p.numel() for p in got.parameters()) == plan.after.total
    check = {"depth": depth_is_cut, "width": width_is_cut, "sparse": weights_are_zeroed}[plan.granularity]
    check(pruned)


def depth_is_cut(pruned: Pruned) -> None:
    before, after, kept = pruned.plan.before, pruned.plan.after, pruned.plan.keep_layers.tolist()
    assert len(kept) == after.layers == {5: 3, 6: 4}[before.layers]
    old, new = load_file(pruned.directory / "model.safetensors"), load_file(pruned.out / "model.safetensors")
    for position, layer in enumerate(kept):
        name = f"{pruned.plan.before.family.reader('ffn')}.weight"
        assert torch.equal(new[f"model.layers.{position}.{name}"], old[f"model.layers.{layer}.{name}"])


def width_is_cut(pruned: Pruned) -> None:
    plan = pruned.plan
    assert plan.after.layers == plan.before.layers
    assert plan.removed()["non_embedding"] == pytest.approx(0.4, abs=0.05)
    narrower = {s for s in ("hidden", "ffn", "kv") if plan.after.units(s) < plan.before.units(s)}
    axes = cut_axes(
        pruned.name, *(("hidden", "ffn") if plan.method in ("minitron-width", "random-width") else ("ffn", "kv"))
    )
    assert narrower <= set(axes) and narrower & (set(axes) - {"ffn"} or {"ffn"})


def weights_are_zeroed(pruned: Pruned) -> None:
    plan = pruned.plan
    old, new = load_file(pruned.directory / "model.safetensors"), load_file(pruned.out / "model.safetensors")
    linears = {name for name, tensor in new.items() if ".layers." in name and tensor.dim() == 2}
    assert set(plan.masks) == linears and len(linears) == sum(
        len(plan.before.linears(layer)) for layer in range(plan.before.layers)
    )
    for name in linears:
        assert float((new[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
    updated = any(bool((new[name] != old[name])[plan.masks[name]].any()) for name in linears)
    assert updated == (plan.method in ("sparsegpt", "alps"))


SLIDING, FULL = "sliding_attention", "full_attention"
#: (name, list by layer) -> its values for layers 1, 2 and 4
LISTS: dict[tuple[str, str], list[Any]] = {
    ("gemma3", "layer_types"): [SLIDING, FULL, SLIDING],
    ("gemma3-old", "layer_types"): [SLIDING, FULL, SLIDING],
    ("qwen2-mixed", "layer_types"): [FULL, SLIDING, SLIDING],
    ("ministral", "layer_types"): [SLIDING, FULL, FULL],
    ("gemma2", "layer_types"): [FULL, FULL, FULL],
    ("gemma2-uncapped", "layer_types"): [FULL, SLIDING, SLIDING],
    ("olmo3", "layer_types"): [SLIDING, FULL, FULL],
    ("exaone4", "layer_types"): [SLIDING, FULL, FULL],
    ("smollm3", "layer_types"): [FULL, FULL, SLIDING],
    ("smollm3", "no_rope_layers"): [0, 1, 0],
    ("smollm3-old", "no_rope_layers"): [0, 1, 1],
}


@pytest.mark.parametrize(("name", "key"), LISTS)
def test_lists_by_layer_follow_the_layers(name: str, key: str, zoo: Zoo) -> None:
    kept, values = torch.tensor([1, 2, 4]), LISTS[name, key]
    after = dataclasses.replace(Checkpoint(zoo.directory(name)).shape, layers=3)
    pruned = zoo.cut(name, zoo.keeping_all(name, after=after, keep_layers=kept))
    assert getattr(Checkpoint(pruned.out).config, key) == values
    assert json.loads((pruned.out / "config.json").read_text())[key] == values
    assert_same_logits(opened(pruned.out), reference(pruned))
    # The order matters: with the values of the first three layers the logits are others.
    edit_config(pruned.out, **{key: getattr(Checkpoint(pruned.directory).config, key)[:3]})
    difference = logits(opened(pruned.out), windows(2, 20)) - logits(reference(pruned), windows(2, 20))
    assert float(difference.abs().max()) > 1e-2
