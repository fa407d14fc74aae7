"""The estimate of memory and disk for mixtures, against the tensors of transformers' own model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.methods.registry import get_method
from secateur.model.shapes import Shape
from secateur.pruning.memory_estimate import MemoryEstimate, estimate_memory
from secateur.pruning.target import Target

#: a block of Qwen3-30B-A3B
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def estimate(method: str, windows: int = 1, seqlen: int = 1, **config: Any) -> tuple[MemoryEstimate, Shape]:
    """The estimate for a bfloat16 checkpoint, pruned by a half."""
    shape = Shape.of_config(AutoConfig.for_model(**{**CONFIG, **config}), where="config")
    scorer = get_method(method)
    after = Target(ratio=0.5).shape(shape, scorer, method)
    stored = 2 * shape.total
    return estimate_memory(scorer, shape, windows, seqlen, windows, torch.float32, stored, [after]), after


@pytest.mark.parametrize("method", ["reap", "wanda"])
def test_the_estimate_is_near_the_tensors_in_memory(method: str) -> None:
    """A block without its experts in float32, one expert in bfloat16 and float32, and the masks of a block."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    sizes = {name: p.numel() for name, p in model.model.layers[0].named_parameters()}
    of_experts = sum(size for name, size in sizes.items() if name.startswith("mlp.experts."))
    resident, expert = sum(sizes.values()) - of_experts, of_experts // 128
    exact = 4 * resident + (2 + 4) * expert + (sum(sizes.values()) if method == "wanda" else 0)
    needs, _ = estimate(method)
    assert exact <= needs.host("cpu", "disk") <= 2.5 * exact
    assert of_experts * 2 > exact or method == "wanda"  # far from a whole block as it is stored


def test_memory_does_not_grow_with_the_experts_and_disk_is_linear_in_them() -> None:
    counts = (32, 64, 128)
    reap = [estimate("reap", num_experts=count)[0] for count in counts]
    assert [later.block - first.block for first, later in itertools.pairwise(reap)] == [
        4 * 2048 * 32,  # rows of the router
        4 * 2048 * 64,
    ]
    expert = 3 * 2048 * 768
    wanda, shapes = zip(*(estimate("wanda", num_experts=count) for count in counts), strict=True)
    grown = [later.disk("ram") - first.disk("ram") for first, later in itertools.pairwise(wanda)]
    masks_and_weights = 1 + 1 + 2  # a byte in the journal, one in the plan, and bfloat16
    router = 2 * 2048 * CONFIG["num_hidden_layers"]
    assert grown == [count * (masks_and_weights * CONFIG["num_hidden_layers"] * expert + router) for count in (32, 64)]
    for needs, shape in zip(wanda, shapes, strict=True):
        assert needs.output == 2 * shape.total + shape.block_weights


def test_states_and_activations_follow_the_text() -> None:
    few, many = (estimate("reap", windows=count, seqlen=512)[0] for count in (8, 16))
    assert many.states == 2 * few.states == 16 * 512 * 2048 * 4
    masks, _ = estimate("wanda", windows=8, seqlen=512)
    assert masks.states == 2 * few.states  # what enters the experts of a block is kept while they are visited
