from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from helpers import VARIANTS, hf, logits, tiny_llama, windows
from secateur.checkpoint import Checkpoint
from secateur.errors import UserError
from secateur.shapes import Shape, multiple_of, removed, solve_depth, solve_width, train_flops

PARENT = Shape(hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128_256)
SMALL = Shape(hidden=256, ffn=768, layers=6, heads=4, kv_heads=2, head_dim=64, vocabulary=1000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_totals_equal_the_library_s(variant: str, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    shape, model = Checkpoint(directory).shape, hf(directory)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    outside = {n: s for n, s in sizes.items() if "embed_tokens" in n or "lm_head" in n}
    assert shape.total == sum(sizes.values())
    assert shape.embedding == sum(outside.values())
    assert shape.non_embedding == sum(sizes.values()) - sum(outside.values())
    assert shape.block_parameters == sum(s for n, s in sizes.items() if n.startswith("model.layers.0."))
    assert shape.linear_parameters == sum(s for n, s in sizes.items() if ".layers.0." in n and "_proj.weight" in n)
    assert shape.head_dim == (16 if variant == "wide_heads" else 8)


# PAPER.md's table: changes to the parent, billions, removed of all and of the non-embedding parameters.
@pytest.mark.parametrize(
    ("changes", "billions", "total", "non_embedding"),
    [
        ({}, 8.03, 0, 0),
        ({"layers": 16}, 4.54, 0.435, 0.500),
        ({"layers": 8}, 2.80, 0.652, 0.750),
        ({"layers": 4}, 1.92, 0.761, 0.875),
        ({"layers": 2}, 1.49, 0.815, 0.938),
        ({"hidden": 3072, "ffn": 9216}, 4.51, 0.438, 0.466),
        ({"hidden": 2432, "ffn": 6272}, 2.89, 0.641, 0.676),
        ({"hidden": 1792, "ffn": 6016}, 2.08, 0.741, 0.768),
        ({"hidden": 3456, "ffn": 7808}, 4.61, 0.426, 0.467),
        ({"ffn": 6528, "heads": 20, "kv_heads": 5}, 4.46, 0.445, 0.512),
    ],
)
def test_the_published_shapes(changes: dict[str, int], billions: float, total: float, non_embedding: float) -> None:
    shape = dataclasses.replace(PARENT, **changes)
    assert shape.total / 1e9 == pytest.approx(billions, abs=0.0051)
    gone = removed(PARENT, shape)
    assert gone["total"] == pytest.approx(total, abs=0.00051)
    assert gone["non_embedding"] == pytest.approx(non_embedding, abs=0.00051)


def test_forward_flops_against_a_count_written_out() -> None:
    context, wanted = 7, 0
    for position in range(context):
        for _ in range(SMALL.layers):
            for rows, columns in [(256, 256), (128, 256), (128, 256), (256, 256), (768, 256), (768, 256), (256, 768)]:
                wanted += 2 * rows * columns
            for _ in range(SMALL.heads):
                wanted += 2 * 2 * SMALL.head_dim * (position + 1)  # scores, then values
        wanted += 2 * SMALL.vocabulary * SMALL.hidden
    assert SMALL.forward_flops(context) == wanted / context
    assert train_flops(SMALL, 1000, context) == 3000 * wanted / context
    assert dataclasses.replace(SMALL, tied=True).forward_flops(context) == wanted / context


def test_forward_flops_against_torch_s_counter(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, attn_implementation="eager", attention_bias=True)
    shape, model = Checkpoint(directory).shape, hf(directory)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        logits(model, windows(1, 1))
    assert shape.forward_flops(1) == counter.get_total_flops()


def test_kv_cache_bytes_are_those_of_a_cache(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    cache = hf(directory).to(torch.float16)(input_ids=windows(1, 9), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert Checkpoint(directory).shape.kv_cache_bytes * 9 == held


def test_config_changes_make_a_config_of_that_shape() -> None:
    config = LlamaConfig(vocab_size=1000, tie_word_embeddings=False, **SMALL.config_changes())
    assert Shape.of_config(config, where="x") == SMALL


def test_old_configs_without_kv_heads() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=None, head_dim=None)
    shape = Shape.of_config(config, where="x")
    assert (shape.kv_heads, shape.head_dim) == (4, 16)


@pytest.mark.parametrize("shape", [SMALL, PARENT], ids=["small", "parent"])
def test_solve_width(shape: Shape) -> None:
    reached = []
    for ratio in [r / 20 for r in range(2, 18, 2 if shape is PARENT else 1)]:
        after = solve_width(shape, ratio)
        reached.append(removed(shape, after)["non_embedding"])
        assert reached[-1] == pytest.approx(ratio, abs=0.03)
        assert after.hidden % shape.heads == 0 and after.hidden % multiple_of(shape.hidden, shape.heads) == 0
        assert after.ffn % multiple_of(shape.ffn) == 0
        # Both axes shrink alike: neither keeps more than twice the share of the other.
        assert 0.5 < (after.hidden / shape.hidden) / (after.ffn / shape.ffn) < 2
        assert dataclasses.replace(after, hidden=shape.hidden, ffn=shape.ffn) == shape
        LlamaConfig(**after.config_changes())  # transformers takes it
    assert all(a < b for a, b in pairwise(reached))


@pytest.mark.parametrize(
    ("size", "divisor", "step"),
    [(4096, 32, 128), (14336, 1, 128), (256, 4, 16), (768, 1, 32), (32, 4, 4), (48, 1, 2), (36, 12, 12), (7, 1, 1)],
)
def test_multiple_of(size: int, divisor: int, step: int) -> None:
    assert multiple_of(size, divisor) == step


def test_ratios_that_no_width_has() -> None:
    coarse = dataclasses.replace(
        SMALL, hidden=32, ffn=32, heads=16, kv_heads=16, head_dim=2
    )  # half the hidden at least
    with pytest.raises(UserError, match=r"ratio 0\.9: no width"):
        solve_width(coarse, 0.9)
    with pytest.raises(UserError, match="too small"):
        solve_width(SMALL, 0.001)


@pytest.mark.parametrize(
    ("ratio", "layers"), [(0.5, 16), (0.75, 8), (0.875, 4), (0.9375, 2), (0.03125, 31), (0.51, 16)]
)
def test_solve_depth(ratio: float, layers: int) -> None:
    assert solve_depth(PARENT, ratio) == dataclasses.replace(PARENT, layers=layers)


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_ratios_that_no_depth_has(ratio: float) -> None:
    with pytest.raises(UserError, match=r"possible: 0\.167, 0\.333, 0\.5, 0\.667, 0\.833$"):
        solve_depth(SMALL, ratio)


def test_a_model_of_one_layer_has_no_depth_ratio() -> None:
    with pytest.raises(UserError, match="possible: none"):
        solve_depth(dataclasses.replace(SMALL, layers=1), 0.5)


def test_unknown_family() -> None:
    config: Any = LlamaConfig()
    config.model_type = "llamma"
    with pytest.raises(UserError, match="llamma"):
        Shape.of_config(config, where="x")
