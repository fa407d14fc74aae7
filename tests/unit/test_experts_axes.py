"""The axes that mixtures have besides their experts: layers, hidden channels, KV heads and FFN channels."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from expert_configs import MIXTURES
from expert_models import random_mixture, tiny_mixture, without_expert_channels, without_experts
from helpers import edit_config, hf
from reference import Pruned, Zoo, assert_same_logits, opened, reference, silenced
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.surgery import cut_config
from secateur.pruning.target import Target


@pytest.fixture(scope="module")
def mixture_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    root = tmp_path_factory.mktemp("mixture-zoo")
    yield Zoo(root, {name: tiny_mixture(root, name) for name in MIXTURES})
    shutil.rmtree(root)


def same(pruned: Pruned) -> None:
    assert_same_logits(opened(pruned.out), reference(pruned))


@pytest.mark.parametrize("keep", [[1, 3], [0, 3]], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_layers_of_both_kinds_go(name: str, keep: list[int], mixture_zoo: Zoo) -> None:
    shape = Checkpoint(mixture_zoo.directory(name)).shape
    after = dataclasses.replace(shape, layers=2)
    pruned = mixture_zoo.cut(name, mixture_zoo.keeping_all(name, keep_layers=torch.tensor(keep), after=after))
    same(pruned)
    assert Checkpoint(pruned.out).shape.kinds == tuple(shape.kinds[layer] for layer in keep if shape.kinds)


@pytest.mark.parametrize("method", ["shortgpt", "minitron-depth"])
@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "ernie4_5_moe-interval"])
def test_layer_methods(name: str, method: str, mixture_zoo: Zoo) -> None:
    same(mixture_zoo.prune(name, method, Target(sizes={"layers": 3})))


@pytest.mark.parametrize("name", MIXTURES)
def test_hidden_channels(name: str, mixture_zoo: Zoo) -> None:
    alike = {"heads": 4, "kv_heads": 2, "hidden": 32} if name.startswith("olmoe") else {"hidden": 36}
    pruned = mixture_zoo.prune(name, "minitron-width", Target(sizes=alike))
    assert Checkpoint(pruned.out).shape.hidden == alike["hidden"]
    same(pruned)


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "llm-pruner"])
@pytest.mark.parametrize("name", [name for name in MIXTURES if not name.startswith(("deepseek", "olmoe"))])
def test_heads(name: str, method: str, mixture_zoo: Zoo) -> None:
    options = {"bias": "none"} if method == "flap" else {}
    pruned = mixture_zoo.prune(name, method, Target(sizes={"heads": 4, "kv_heads": 2}), **options)
    assert Checkpoint(pruned.out).shape.heads == 4
    same(pruned)
    if name.startswith("gpt_oss"):
        keep = pruned.plan.keep_kv[0]
        heads = (keep[:, None] * 2 + torch.arange(2)).flatten()
        sinks = "model.layers.0.self_attn.sinks"
        whole, cut = hf(pruned.directory).get_parameter(sinks), opened(pruned.out).get_parameter(sinks)
        assert torch.equal(cut, whole[heads])


def test_a_switch_brings_all_of_its_biases(mixture_zoo: Zoo) -> None:
    """FLAP switches Ernie's biases on; shared experts have biases by that switch and another one."""
    pruned = mixture_zoo.prune("ernie4_5_moe", "flap", Target(sizes={"heads": 4, "kv_heads": 2}))
    bias = opened(pruned.out).get_parameter("model.layers.1.mlp.shared_experts.gate_proj.bias")
    assert torch.count_nonzero(bias) == 0
    config = json.loads((pruned.out / "config.json").read_text())
    assert (config["use_bias"], config["moe_num_shared_experts"]) == (True, 1)
    assert not [key for key in config if "&" in key]


@pytest.mark.parametrize("name", MIXTURES)
def test_all_axes_at_once(name: str, mixture_zoo: Zoo) -> None:
    shape = Checkpoint(mixture_zoo.directory(name)).shape
    generator = torch.Generator().manual_seed(5)

    def some(total: int, count: int) -> torch.Tensor:
        return torch.randperm(total, generator=generator)[:count].sort().values

    routed = shape.layers_with("experts")
    heads = {"kv_heads": 2, "heads": 4} if "kv" in shape.family.axes else {}
    ffn = {"ffn": 40} if shape.layers_with("ffn") else {}
    channels = {"expert_ffn": 12} if "expert_ffn" in shape.family.axes else {}
    hidden = 32 if name.startswith("olmoe") else 36  # its heads span the hidden size
    after = dataclasses.replace(shape, hidden=hidden, layers=3, experts=6, **heads, **ffn, **channels)
    groups = shape.groups[0]
    plan = mixture_zoo.keeping_all(
        name,
        after=after,
        keep_layers=torch.tensor([0, 1, 2]),
        keep_hidden=some(48, hidden),
        keep_kv={layer: some(shape.kv_heads, after.kv_heads) for layer in range(4)},
        keep_ffn={layer: some(shape.ffn, after.ffn) for layer in range(4)},
        keep_experts={
            layer: torch.cat([some(8 // groups, 6 // groups) + group * 8 // groups for group in range(groups)])
            for layer in routed
        },
        keep_expert_ffn={
            layer: torch.stack([some(shape.expert_ffn, after.expert_ffn) for _ in range(8)]) for layer in routed
        },
    )
    pruned = mixture_zoo.cut(name, plan)
    whole = without_expert_channels(without_experts(hf(pruned.directory), plan), plan)
    assert_same_logits(opened(pruned.out), silenced(whole, plan))
    assert Checkpoint(pruned.out).shape == dataclasses.replace(plan.after, switches=shape.switches)


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "ernie4_5_moe"])
def test_correction_biases_are_cut_in_float32(name: str, tmp_path: Any, mixture_zoo: Zoo) -> None:
    directory = tmp_path / "bfloat16"
    model = random_mixture(name)
    biases = {n: t for n, t in model.state_dict().items() if n.endswith("e_score_correction_bias")}
    model.bfloat16()
    for key, tensor in {**dict(model.named_buffers()), **dict(model.named_parameters())}.items():
        if key in biases:
            tensor.data = biases[key].float()
    model.save_pretrained(directory)
    zoo = Zoo(tmp_path, {name: directory})
    pruned = zoo.prune(name, "reap", Target(ratio=0.5))
    checkpoint = Checkpoint(pruned.out)
    for layer, keep in pruned.plan.keep_experts.items():
        (rest,) = [n for n in checkpoint.shape.block_tensors(layer) if n.endswith("e_score_correction_bias")]
        stored = checkpoint.tensor(f"model.layers.{layer}.{rest}")
        assert stored.dtype == torch.float32
        assert torch.equal(stored, biases[f"model.layers.{layer}.{rest}"].float()[..., keep])


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_layers_that_predict_further_tokens_are_left_out(
    name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_mixture(tmp_path, name, num_hidden_layers=5)
    edit_config(directory, num_hidden_layers=4, num_nextn_predict_layers=1)
    pruned = Zoo(tmp_path, {name: directory}).prune(name, "reap", Target(ratio=0.5))
    assert "left out: 1 layer behind the last one, which predict further tokens" in capsys.readouterr().err
    config = json.loads((pruned.out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (4, 0)
    assert not any(".layers.4." in stored for stored in Checkpoint(pruned.out)._places)
    whole = hf(directory)  # transformers passes over the fifth layer by its index
    assert_same_logits(opened(pruned.out), without_experts(whole, pruned.plan))


def test_heads_of_olmoe_span_its_hidden_size(mixture_zoo: Zoo) -> None:
    with pytest.raises(UserError, match="cut hidden channels and KV heads alike"):
        mixture_zoo.prune("olmoe", "minitron-width", Target(sizes={"hidden": 36}))


def test_an_interval_that_no_longer_fits_is_refused(mixture_zoo: Zoo) -> None:
    name = "ernie4_5_moe-interval"
    checkpoint = Checkpoint(mixture_zoo.directory(name))
    after = dataclasses.replace(checkpoint.shape, layers=3)
    plan = mixture_zoo.keeping_all(name, keep_layers=torch.tensor([1, 2, 3]), after=after)
    with pytest.raises(UserError, match="layers 0, 2 of 3 would have experts, and no moe_layer_interval"):
        cut_config(checkpoint, plan)
