"""Heads, shapes, biases and global allocations, on families that differ; test_family_proofs.py has them all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from family_configs import cut_axes
from helpers import calibration, edit_config, hf, logits, tiny_family, windows
from reference import (
    Pruned,
    Zoo,
    assert_same_logits,
    calibration_means,
    compensated,
    norms_over_heads,
    opened,
    reference,
)
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import TENSOR_FILE
from secateur.model.shapes import removed
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target

#: biases or none, norms behind a block's halves or over all heads, fused projections, layers of several kinds
DISTINCT = ("llama", "qwen2", "gemma3", "olmo2", "phi3", "exaone4", "phi", "qwen3_5", "gemma4", "lfm2")
WITH_KV = tuple(name for name in DISTINCT if cut_axes(name, "kv"))

#: what a family's config can give a bias: the reason that FLAP names where it cannot
REASON = "has no option in its config that gives {} a bias"


def same(pruned: Pruned) -> None:
    got = opened(pruned.out)
    assert_same_logits(got, reference(pruned))
    assert Checkpoint(pruned.out).shape == pruned.plan.after
    assert sum(p.numel() for p in got.parameters()) == pruned.plan.after.total


@torch.no_grad()
def without_heads(pruned: Pruned) -> torch.Tensor:
    """Logits of the whole model whose output projection does not read those KV heads' groups of query heads."""
    model, before = hf(pruned.directory), pruned.plan.before
    width = before.heads // before.kv_heads * before.head_dim
    for layer in range(before.layers):
        kept = pruned.plan.keep_kv[layer].tolist()
        modules = dict(model.model.layers[layer].named_modules())
        for head in (h for h in range(before.kv_heads) if h not in kept):
            modules[before.family.reader("kv")].weight[:, head * width : (head + 1) * width] = 0
    return logits(model, windows(3, 20, seed=9))


@pytest.mark.parametrize(
    "name", [*WITH_KV, "llama-biased", "llama-mha", "qwen3-biased", "olmo2-biased", "qwen3_5-biased"]
)
def test_whole_groups_of_heads_go(name: str, zoo: Zoo) -> None:
    before = Checkpoint(zoo.directory(name)).shape
    fewer = before.kv_heads - 1 if before.kv_heads == 3 else 4
    ratio = removed(before, before.narrowed("kv", fewer))["non_embedding"]
    pruned = zoo.prune(name, "wanda-sp", Target(ratio=ratio, axes=("kv",)))
    after = pruned.plan.after
    smaller = dataclasses.replace(before, kv_heads=fewer, heads=fewer * (before.heads // before.kv_heads))
    assert after == smaller.openable(where="test")
    config = json.loads((pruned.out / "config.json").read_text())
    assert config["num_attention_heads"] == after.heads and config["num_key_value_heads"] == after.kv_heads
    assert config["head_dim"] == before.head_dim
    same(pruned)
    if not norms_over_heads(hf(pruned.directory).model.layers[0], before):  # with them all other heads change as well
        got = logits(opened(pruned.out), windows(3, 20, seed=9))
        torch.testing.assert_close(got, without_heads(pruned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in WITH_KV if cut_axes(name, "hidden")])
def test_all_three_axes_at_once(name: str, zoo: Zoo) -> None:
    pruned = zoo.prune(name, "minitron-width", Target(ratio=0.6, axes=("hidden", "ffn", "kv")))
    before, after = pruned.plan.before, pruned.plan.after
    assert all(after.units(space) < before.units(space) for space in ("hidden", "ffn", "kv"))
    assert len({tuple(kept.tolist()) for kept in pruned.plan.keep_ffn.values()}) > 1
    same(pruned)


SIZES = {"hidden": 40, "ffn": 51, "heads": 4, "kv_heads": 2}


@pytest.mark.parametrize("name", DISTINCT)
def test_explicit_sizes(name: str, zoo: Zoo) -> None:
    sizes = {key: size for key, size in SIZES.items() if cut_axes(name, "kv" if "heads" in key else key)}
    pruned = zoo.prune(name, "random-width", Target(sizes=sizes), seed=3)
    after = pruned.plan.after
    assert {n: getattr(after, n) for n in sizes} == sizes
    same(pruned)
    config = json.loads((pruned.out / "config.json").read_text())
    assert config["hidden_size"] == sizes.get("hidden", 48) and config["intermediate_size"] == 51


@pytest.mark.parametrize("name", DISTINCT)
def test_bf16_weights_are_cut_as_they_are(name: str, tmp_path: Path) -> None:
    zoo = Zoo(tmp_path, {name: tiny_family(tmp_path, name, dtype=torch.bfloat16)})
    pruned = zoo.prune(name, "llm-pruner", Target(ratio=0.5, axes=cut_axes(name, "kv", "ffn")))
    assert {t.dtype for t in load_file(pruned.out / "model.safetensors").values()} == {torch.bfloat16}
    assert_same_logits(hf(pruned.out), reference(pruned))


@pytest.mark.parametrize("name", DISTINCT)
def test_global_allocations_are_padded_with_zeros(name: str, zoo: Zoo) -> None:
    axes = cut_axes(name, "kv", "ffn")
    pruned = zoo.prune(name, "wanda-sp", Target(ratio=0.3, axes=axes, allocation="global"))
    plan, parameters = pruned.plan, dict(opened(pruned.out).named_parameters())
    ffn = [len(kept) for kept in plan.keep_ffn.values()]
    kv = [len(kept) for layer, kept in plan.keep_kv.items() if plan.before.has_space("kv", layer)]
    assert min(ffn) < max(ffn) == plan.after.ffn and (not kv or max(kv) == plan.after.kv_heads)
    same(pruned)
    total = sum(p.numel() for p in hf(pruned.directory).parameters())
    left = sum(int((p != 0).sum()) for p in parameters.values())
    assert plan.removed()["total"] == pytest.approx(1 - left / total)
    for layer, kept in enumerate(ffn):  # each part of a fused tensor is padded by itself
        down = parameters[f"model.layers.{layer}.{plan.before.family.reader('ffn')}.weight"]
        assert not down[:, kept:].any() and bool((down[:, :kept] != 0).all())
        if name in ("phi3", "glm", "glm4"):
            rows = parameters[f"model.layers.{layer}.mlp.gate_up_proj.weight"].unflatten(0, (2, plan.after.ffn))
            assert not rows[:, kept:].any() and bool((rows[:, :kept] != 0).all())


@pytest.mark.parametrize("name", [*WITH_KV, "olmo2-biased", "qwen3-biased", "qwen3_5-biased"])
def test_layers_with_different_numbers_of_heads(name: str, zoo: Zoo) -> None:
    before = Checkpoint(zoo.directory(name)).shape
    keep = {layer: torch.tensor([[1], [0, 2], [2]][layer % 3]) for layer in range(before.layers)}
    same(zoo.cut(name, zoo.keeping_all(name, after=before.narrowed("kv", 2).openable(where="test"), keep_kv=keep)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "olmo2"])
def test_global_flap_with_biases(name: str, zoo: Zoo) -> None:
    pruned = zoo.prune(name, "flap", Target(ratio=0.4, axes=("kv", "ffn"), allocation="global"))
    assert len({len(kept) for kept in pruned.plan.keep_ffn.values()}) > 1
    assert_same_logits(opened(pruned.out), reference(pruned, filled=calibration_means(pruned)))


@pytest.mark.parametrize("name", [*DISTINCT, "llama-biased", "qwen3-biased"])
def test_flap_s_biases(name: str, zoo: Zoo) -> None:
    pruned = zoo.pruned(name, "flap")  # its logits are compared in test_family_proofs.py
    family, block = pruned.plan.after.family, dict(opened(pruned.out).model.layers[-1].named_modules())
    has, readers = compensated(family), [family.reader(space) for space in cut_axes(name, "ffn", "kv")]
    assert set(has) == {reader for reader in readers if block[reader].bias is not None}
    old, new = load_file(pruned.directory / "model.safetensors"), load_file(pruned.out / "model.safetensors")
    means = calibration_means(pruned)
    for tensor in (n for n in new if n.endswith(".bias") and n.removesuffix(".bias") not in means):
        if tensor in old:  # a bias that was there is cut, not changed
            assert set(new[tensor].tolist()) <= set(old[tensor].tolist()) and new[tensor].any()
        else:
            assert not new[tensor].any()
    for module in means:
        bias = new[f"{module}.bias"] - old.get(f"{module}.bias", 0)
        assert bias.any() and bias.shape == (48,)
    saved = {n: t for n, t in load_file(pruned.out / TENSOR_FILE).items() if n.startswith("bias.")}
    assert set(saved) == {f"bias.{module}.bias" for module in means}
    assert all(torch.equal(saved[f"bias.{n}"], bias) for n, bias in pruned.plan.biases.items())
    told = pruned.plan.summary["bias"]
    assert told["compensated"] == sorted(f"{module}.bias" for module in has)
    lacking = {reader for reader in readers if reader not in has}
    assert told["not"] == {module: f"{family.name} {REASON.format(module)}" for module in lacking}


@pytest.mark.parametrize("name", DISTINCT)
def test_flap_with_a_bias_required(name: str, zoo: Zoo) -> None:
    axes = cut_axes(name, "kv", "ffn")
    target, row = Target(ratio=0.4, axes=axes), zoo.pruned(name, "flap").plan.after.family
    lacking = {row.reader(space) for space in axes} - set(compensated(row))
    if not lacking:
        assert zoo.prune(name, "flap", target, bias="require").plan.biases
        return
    with pytest.raises(UserError) as caught:
        zoo.prune(name, "flap", target, bias="require")
    text = str(caught.value)
    assert "bias=require" in text and "\n" not in text
    assert all(f"{name} {REASON.format(module)}" in text for module in lacking)


def test_flap_switches_on_one_kind_of_bias_beside_the_other(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path, {"llama": tiny_family(tmp_path, "llama", attention_bias=True)})
    pruned = zoo.prune("llama", "flap", Target(ratio=0.4))
    assert pruned.plan.before.switches == ("attention_bias",)
    assert pruned.plan.after.switches == ("attention_bias", "mlp_bias")
    assert_same_logits(opened(pruned.out), reference(pruned, filled=calibration_means(pruned)))


def test_flap_without_biases(zoo: Zoo) -> None:
    pruned = zoo.prune("llama", "flap", Target(ratio=0.4), bias="none")
    assert not pruned.plan.biases and "bias" not in pruned.plan.summary
    same(pruned)


RELAXED = {"heads": Target(sizes={"kv_heads": 5}), "hidden": Target(sizes={"hidden": 44, "ffn": 40})}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("what", RELAXED)
def test_heads_that_do_not_divide_the_hidden_size_make_a_mistral(what: str, old: bool, tmp_path: Path) -> None:
    zoo = Zoo(tmp_path)
    directory = zoo.directory("llama-mha")
    if old:  # what is not said means what it means for a Llama, not what it means for a Mistral
        rope = {"rope_type": "dynamic", "factor": 2.0}
        drop = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_dim")
        edit_config(directory, drop=drop, rope_theta=50_000.0, rope_scaling=rope)
    pruned = zoo.prune("llama-mha", "minitron-width", RELAXED[what])
    config = json.loads((pruned.out / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    assert type(opened(pruned.out)).__name__ == "MistralForCausalLM"
    same(pruned)
    before, after = Checkpoint(pruned.directory).config, Checkpoint(pruned.out).config
    for key in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "hidden_act", "head_dim"):
        assert getattr(after, key) == getattr(before, key), key


def test_a_relaxed_llama_can_be_pruned_again(tmp_path: Path) -> None:
    first = Zoo(tmp_path).prune("llama-mha", "random-width", RELAXED["heads"])
    same(Zoo(tmp_path, {"again": first.out}).prune("again", "minitron-depth", Target(ratio=0.4)))


@pytest.mark.parametrize("config", [{"attention_bias": True}, {"mlp_bias": True}])
@pytest.mark.parametrize("what", RELAXED)
def test_with_biases_it_is_refused(what: str, config: dict[str, bool], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_family(tmp_path, "llama-mha", **config))
    with pytest.raises(UserError, match=r"refuses a llama of hidden size \d+ with \d heads"):
        make_plan(checkpoint, "minitron-width", RELAXED[what], calibration(windows()))


def test_a_gemma_whose_heads_do_not_divide_is_refused(zoo: Zoo) -> None:
    with pytest.raises(UserError, match="refuses a gemma3 of hidden size 44 with 6 heads"):
        zoo.prune("gemma3", "minitron-width", RELAXED["hidden"])


def test_flap_names_the_family_that_it_had_to_take(zoo: Zoo) -> None:
    pruned = zoo.prune("llama-mha", "flap", Target(sizes={"kv_heads": 5}))
    assert not pruned.plan.biases
    assert "mistral" in pruned.plan.summary["bias"]["not"]["self_attn.o_proj"]
    same(pruned)


@pytest.mark.parametrize("name", ["gemma3", "gemma3-untied"])
def test_gemma_keeps_the_scale_of_its_embedding(name: str, zoo: Zoo) -> None:
    """Its embedding is multiplied by the root of the hidden size, which a cut makes smaller."""
    pruned = zoo.prune(name, "minitron-width", Target(sizes={"hidden": 12}))
    same(pruned)
    whole, cut, kept = hf(pruned.directory), opened(pruned.out), pruned.plan.keep_hidden
    assert float(cut.model.embed_tokens.embed_scale) == pytest.approx(12**0.5)
    ids = windows(1, 20)
    torch.testing.assert_close(cut.model.embed_tokens(ids), whole.model.embed_tokens(ids)[..., kept])
    states = torch.randn(1, 4, 48)[..., kept]
    narrow = whole.lm_head.weight[:, kept] @ ((1 + whole.model.norm.weight[kept]) * norm(states)).mT
    torch.testing.assert_close(cut.lm_head(cut.model.norm(states)).mT, narrow)


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_shapes_that_a_config_refuses_are_refused_before_scoring(tmp_path: Path) -> None:
    """A Phi-3 with long contexts has a factor for each pair of a head's channels, and takes hidden / heads for them."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    config = {"rope_parameters": rope, "max_position_embeddings": 64, "original_max_position_embeddings": 16}
    directory = tiny_family(tmp_path, "phi3", **config)
    zoo = Zoo(tmp_path, {"phi3": directory})
    for axes, method in ((("ffn",), "wanda-sp"), ((), "minitron-depth"), ((), "sparsegpt")):
        same(zoo.prune("phi3", method, Target(ratio=0.3, axes=axes)))
    same(zoo.prune("phi3", "minitron-width", Target(sizes={"hidden": 32, "heads": 4})))  # eight channels a head again
    for sizes in ({"hidden": 36}, {"kv_heads": 2}):
        with pytest.raises(UserError, match=r"transformers refuses the shape .*short_factor") as caught:
            make_plan(Checkpoint(directory), "minitron-width", Target(sizes=sizes), None)
        assert "\n" not in str(caught.value)
