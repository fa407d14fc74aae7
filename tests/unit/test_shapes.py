from __future__ import annotations

import dataclasses
import itertools
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from helpers import VARIANTS, hf, logits, tiny_llama, windows
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import LLAMA
from secateur.model.families.dense import MISTRAL
from secateur.model.shapes import Shape, removed, train_flops
from secateur.model.solver import explicit, multiple_of, solve_depth, solve_width

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
    assert shape.block_parameters() == sum(s for n, s in sizes.items() if n.startswith("model.layers.0."))
    assert shape.linear_parameters() == sum(s for n, s in sizes.items() if ".layers.0." in n and "_proj.weight" in n)
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
    with pytest.raises(UserError, match=r"`ratio` 0\.9: too large; .* removes 0\.0\d+ to 0\.69\d+, nearest 0\.69"):
        solve_width(coarse, 0.9)
    with pytest.raises(UserError, match=r"`ratio` 0\.001: too small; .* 16 hidden channels, 32 FFN channels removes"):
        solve_width(SMALL, 0.001)
    with pytest.raises(UserError, match="too large"):
        solve_width(PARENT, 0.999)  # 0.994 is within five hundredths of it, but keeps six times as much
    with pytest.raises(UserError, match="falls between two steps"):
        solve_width(dataclasses.replace(SMALL, heads=3, kv_heads=3, head_dim=512), 0.43, ("kv",))
    with pytest.raises(UserError, match=r"cannot be narrowed at all in steps of 1 KV head$"):
        solve_width(dataclasses.replace(SMALL, heads=2, kv_heads=1), 0.5, ("kv",))


@pytest.mark.parametrize("ratio", [0.005, 0.01, 0.02, 0.05, 0.95, 0.98])
def test_extreme_ratios_are_met_more_closely(ratio: float) -> None:
    step = 128 * 3 * 4096 * 32 / PARENT.non_embedding  # of FFN channels, the finer of the two
    off = abs(removed(PARENT, solve_width(PARENT, ratio))["non_embedding"] - ratio)
    assert off <= max(min(ratio, 1 - ratio) / 10, step / 2)


def test_heads_go_in_whole_groups() -> None:
    for ratio in (0.2, 0.5, 0.7):
        after = solve_width(PARENT, ratio, ("hidden", "ffn", "kv"))
        assert after.heads == 4 * after.kv_heads and after.kv_heads < 8
        assert after.hidden % after.heads == 0  # or a Llama's config refuses it
        assert removed(PARENT, after)["non_embedding"] == pytest.approx(ratio, abs=0.01)


def test_a_ratio_of_all_parameters() -> None:
    after = solve_width(PARENT, 0.5, of="total")
    assert removed(PARENT, after)["total"] == pytest.approx(0.5, abs=0.01)
    assert solve_depth(PARENT, 0.435, "total").layers == 16
    assert solve_depth(PARENT, 0.5, "total").layers == 14  # a layer is 2.7% of all
    with pytest.raises(UserError, match=r"possible: 0\.0272, 0\.0543, 0\.0815, \.\.\. .* 0\.842$"):
        solve_depth(PARENT, 0.9, "total")


def _count(shape: Shape, of: str) -> int:
    """Parameters, tensor by tensor, without the class's own sums."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = 2 * shape.hidden + shape.hidden * (2 * query + 2 * kv + 3 * shape.ffn)
    outer = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) if of == "total" else 0
    return shape.layers * block + shape.hidden + outer


@st.composite
def _shapes(draw: st.DrawFn) -> Shape:
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = group * kv_heads
    family = draw(st.sampled_from([LLAMA, MISTRAL]))
    step = heads if family is LLAMA else 1
    return Shape(
        hidden=step * draw(st.integers(1, 48 // step + 1)),
        ffn=draw(st.integers(1, 100)),
        layers=draw(st.integers(1, 4)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        vocabulary=draw(st.integers(2, 300)),
        tied=draw(st.booleans()),
        family=family,
    )


@settings(deadline=None, max_examples=300)
@given(
    _shapes(),
    st.floats(0.003, 0.997),
    st.sampled_from([("hidden",), ("ffn",), ("kv",), ("hidden", "ffn"), ("ffn", "kv"), ("hidden", "ffn", "kv")]),
    st.sampled_from(["total", "non_embedding"]),
)
def test_solve_width_against_every_candidate(shape: Shape, ratio: float, spaces: tuple[str, ...], of: Any) -> None:
    strict = shape.family is LLAMA
    steps = {
        "hidden": multiple_of(shape.hidden, shape.heads if strict and "kv" not in spaces else 1),
        "ffn": multiple_of(shape.ffn),
        "kv": 1,
    }
    full = {"hidden": shape.hidden, "ffn": shape.ffn, "kv": shape.kv_heads}
    found: dict[tuple[int, int, int], tuple[float, float]] = {}  # sizes -> how far off, how unlike
    for sizes in itertools.product(*(range(steps[s], full[s] + 1, steps[s]) for s in spaces)):
        kept = full | dict(zip(spaces, sizes, strict=True))
        heads = kept["kv"] * shape.heads // shape.kv_heads
        candidate = dataclasses.replace(shape, hidden=kept["hidden"], ffn=kept["ffn"], kv_heads=kept["kv"], heads=heads)
        if kept == full or (strict and kept["hidden"] % heads):
            continue
        gone = 1 - _count(candidate, of) / _count(shape, of)
        shares = [math.log(kept[s] / full[s]) for s in spaces]
        found[candidate.hidden, candidate.ffn, candidate.kv_heads] = (abs(gone - ratio), max(shares) - min(shares))
    least, room = min((drift for drift, _ in found.values()), default=1.0), min(ratio, 1 - ratio)
    if least > min(0.05, room / 2):
        with pytest.raises(UserError, match=f"^`ratio` {ratio:g}: "):
            solve_width(shape, ratio, spaces, of)
        return
    after = solve_width(shape, ratio, spaces, of)
    allowed = max(least, min(0.01, room / 10))
    drift, unlike = found[after.hidden, after.ffn, after.kv_heads]
    assert drift <= allowed + 1e-12
    # The most alike of those allowed; on the very edge rounding decides which are.
    assert unlike <= min((u for d, u in found.values() if d < allowed - 1e-9), default=math.inf) + 1e-8
    assert unlike >= min(u for d, u in found.values() if d < allowed + 1e-9) - 1e-8
    assert abs(removed(shape, after)[of] - ratio) == pytest.approx(drift, abs=1e-9)
    assert after.heads * shape.kv_heads == shape.heads * after.kv_heads


def test_solving_is_quick() -> None:
    start = time.perf_counter()
    for ratio in (0.3, 0.5, 0.7):
        solve_width(dataclasses.replace(PARENT, kv_heads=32), ratio, ("hidden", "ffn", "kv"))
    assert time.perf_counter() - start < 2  # takes some hundredths of a second


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({"layers": 16}, {"layers": 16}),
        ({"heads": 20}, {"heads": 20, "kv_heads": 5}),
        ({"kv_heads": 5}, {"heads": 20, "kv_heads": 5}),
        ({"heads": 20, "kv_heads": 5, "ffn": 6528}, {"heads": 20, "kv_heads": 5, "ffn": 6528}),
        ({"hidden": 3072, "ffn": 9216, "layers": 30}, {"hidden": 3072, "ffn": 9216, "layers": 30}),
    ],
)
def test_explicit(sizes: dict[str, int], want: dict[str, int]) -> None:
    assert explicit(PARENT, sizes) == dataclasses.replace(PARENT, **want)


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"hiden": 3}, "did you mean 'hidden'"),
        ({"hidden": 4097}, "hidden=4097 is not between 1 and the model's 4096"),
        ({"layers": 0}, "layers=0 is not between 1"),
        ({"heads": 21}, "heads=21 splits a KV group: 4 query heads"),
        ({"heads": 2}, "heads=2 splits a KV group"),
        ({"heads": 20, "kv_heads": 4}, "so 4 KV heads go with 16 query heads"),
    ],
)
def test_sizes_that_a_model_does_not_have(sizes: dict[str, int], part: str) -> None:
    with pytest.raises(UserError, match=part):
        explicit(PARENT, sizes)


def test_shapes_that_a_stricter_config_refuses() -> None:
    odd = explicit(PARENT, {"heads": 20})
    assert odd.refused_by_config and not PARENT.refused_by_config
    assert odd.openable(where="x").family is MISTRAL and odd.openable(where="x").total == odd.total
    assert PARENT.openable(where="x") is PARENT
    with pytest.raises(UserError, match="transformers refuses a llama of hidden size 4096 with 20 heads"):
        odd.switched_on(["attention_bias"]).openable(where="x")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 0), ("num_key_value_heads", 0), ("vocab_size", -1), ("head_dim", -8), ("hidden_size", 10**30)],
)
def test_sizes_that_are_no_sizes(key: str, value: int) -> None:
    config: Any = LlamaConfig(head_dim=8)
    setattr(config, key, value)
    with pytest.raises(UserError, match=f"^x: {key} should be a whole number above zero"):
        Shape.of_config(config, where="x")


def test_query_heads_that_share_kv_heads_unevenly() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(UserError, match="4 query heads cannot share 3 KV heads evenly"):
        Shape.of_config(config, where="x")


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
