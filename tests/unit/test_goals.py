"""Goals: parameters, memory and latency become legal shapes, and what they count is what tensors have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from family_configs import FAMILY_CONFIGS, FAMILY_SIZES
from helpers import hf, random_model
from secateur.api import prune
from secateur.cli import main
from secateur.errors import UserError
from secateur.model.attention_windows import attention_windows, states_windows
from secateur.model.families import FAMILIES
from secateur.model.frontier import frontier
from secateur.model.goal import Goal
from secateur.model.serving import GROUP, Serving, memory
from secateur.model.shapes import Shape

LLAMA_8B = Shape(hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128_256)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    path = tmp_path_factory.mktemp("goals") / "parent"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"].from_dict(config)).save_pretrained(path)
    return path


def cache_bytes(model: Any, tokens: int, sequences: int) -> int:
    """Bytes of a cache that a model filled."""
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(sequences, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("axes", ["hidden,ffn", "hidden,ffn,kv"])
def test_a_pruned_model_has_the_parameters_within_two_percent(parent: Path, tmp_path: Path, axes: str) -> None:
    whole = sum(p.numel() for p in hf(parent).parameters())
    goal = int(0.6 * whole)
    result = prune(parent, tmp_path / "out", method="random-width", params=goal, axes=axes)
    pruned = sum(p.numel() for p in hf(tmp_path / "out").parameters())
    assert pruned == pytest.approx(goal, rel=0.02)
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())["goal"]
    assert record == {"kind": "params", "amount": goal, "reached": pruned} == result.goal
    assert "- reached: " in (tmp_path / "out" / "README.md").read_text()


def test_memory_is_that_of_the_tensors_and_of_the_cache(parent: Path, tmp_path: Path) -> None:
    """A limit: weights and cache as allocated, never above it, with the activations within three percent of it."""
    limit = 700_000
    served = {"context": 48, "sequences": 2, "weights": "float32"}
    result = prune(parent, tmp_path / "out", method="random-width", memory=limit, step=4, **served)
    model = hf(tmp_path / "out")
    parts = result.goal["memory"]
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["cache"] == cache_bytes(model, 48, 2)
    assert 0.97 * limit <= parts["total"] == result.goal["reached"] <= limit


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3"])
def test_the_cache_of_a_family_holds_what_its_windows_leave(family: str) -> None:
    model = random_model(FAMILY_SIZES | FAMILY_CONFIGS[family])
    shape = Shape.of_config(model.config, where=family)
    for tokens in (3, 20):
        assert memory(shape, Serving(tokens, 2, "float32")).cache == cache_bytes(model, tokens, 2)


@pytest.mark.parametrize(("weights", "scale"), [("int8", 2), ("int4", 4)])
def test_quantised_weights_by_a_loop_over_the_tensors(weights: Any, scale: int) -> None:
    shape = Shape(hidden=192, ffn=320, layers=3, heads=4, kv_heads=2, head_dim=32, vocabulary=50)
    total = 0
    for layer in range(shape.layers):
        for name, axes in shape.block_tensors(layer).items():
            size = shape.tensor_size(axes)
            if name not in shape.linears(layer):
                total += 2 * math.prod(size)
                continue
            for _ in range(size[0]):
                groups = 1 if weights == "int8" else math.ceil(size[1] / GROUP)
                total += (size[1] if weights == "int8" else math.ceil(size[1] / 2)) + scale * groups
    total += 2 * sum(math.prod(shape.tensor_size(axes)) for axes in shape.outer_tensors().values())
    assert memory(shape, Serving(16, 1, weights)).weights == total


def test_the_first_candidate_narrows_alike_and_all_reach_the_goal() -> None:
    goal = Goal.parse(params="4B")
    assert goal
    candidates = frontier(LLAMA_8B, goal, ("layers", "hidden", "ffn", "kv"))
    assert len({candidate.axes for candidate in candidates}) == len(candidates) == 6
    for candidate in candidates:
        assert candidate.amount == candidate.shape.total == pytest.approx(4e9, rel=0.02)
    first = candidates[0].shape
    shares = [first.units(s) / LLAMA_8B.units(s) for s in ("layers", "hidden", "ffn", "kv")]
    assert max(shares) / min(shares) < 1.1
    limit = Goal.parse(memory="3GiB", context=8192, weights="int4")
    assert limit and all(c.amount <= 3 * 2**30 for c in frontier(LLAMA_8B, limit, ("hidden", "ffn")))


def test_the_default_windows_are_those_of_the_configs() -> None:
    """A config.json without the key is read alone only where the class has no window either."""
    for family in FAMILIES:
        for model_type in family.model_types:
            if states_windows({"model_type": model_type}) and not family.kinds:
                config = CONFIG_MAPPING[model_type]()
                assert attention_windows(config, config.num_hidden_layers) == (), model_type


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"params": "4Q"}, "`params`: '4Q' is not a number of parameters"),
        ({"memory": "8Q"}, "`memory`: '8Q' is not a number of bytes"),
        ({"memory": "-1GB"}, "`memory`: '-1GB' is not a number of bytes"),
        ({"latency": "1.5x"}, "`latency`: '1.5x' is not a share"),
        ({"latency": "fast"}, "`latency`: 'fast' is not a share"),
        ({"params": "1M", "memory": "1MB"}, "`memory` and `params` both say"),
        ({"params": "1M", "weights": "int4"}, "`weights`: goes with `memory` or `latency`"),
        ({"latency": "0.7x", "weights": "int4"}, "`weights` int4: a latency is measured in bf16 or float32"),
        ({"memory": "1MB", "weights": "int3"}, "`weights`: 'int3' is not one of bf16, float32, int8, int4"),
        ({"latency": "0.7x", "latency_of": "both"}, "`latency_of`: 'both' is not one of decode, prefill"),
    ],
)
def test_goals_that_cannot_be_read(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as raised:
        Goal.parse(**fields)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--params 9B", "--params: 9 B parameters: the model has"),
        ("--params 70", "less than an embedding with one hidden channel"),
        ("--params 100k --ratio 0.5", "--params and --ratio both say how much to remove"),
        ("--params 100k --shape layers=2", "--params and --shape both say how much to remove"),
        ("--params 100k --method wanda", "wanda zeroes single weights"),
        ("--active-params 100k", "this model has no routed experts"),
        ("--params 300k --method shortgpt", "falls between two steps; the nearest are"),
        ("--memory 10kB --axes ffn", "at least; cut more axes with --axes"),
    ],
)
def test_goals_out_of_reach(parent: Path, capsys: pytest.CaptureFixture[str], arguments: str, part: str) -> None:
    assert main(["shapes", str(parent), *arguments.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("secateur: error: ") and part in lines[-1].replace("\xa0", " ")
