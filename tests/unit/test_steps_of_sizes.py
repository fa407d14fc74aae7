"""Steps of hidden and FFN sizes: multiples of 256 where a real model allows them, another multiple on request."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from secateur.errors import UserError
from secateur.methods.registry import get_method
from secateur.model.families import family_of
from secateur.model.shapes import Shape, removed
from secateur.model.solver import multiple_of, solve_width
from secateur.pruning.target import Target

#: published checkpoints: model_type, hidden, FFN, layers, heads, KV heads, head_dim, vocabulary
CHECKPOINTS: dict[str, tuple[str, int, int, int, int, int, int, int]] = {
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128_256),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128_256),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128_256),
    "Llama-2-7B": ("llama", 4096, 11008, 32, 32, 32, 128, 32_000),
    "Llama-2-13B": ("llama", 5120, 13824, 40, 40, 40, 128, 32_000),
    "Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32_768),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151_936),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151_936),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152_064),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151_936),
    "Gemma-3-4B": ("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262_208),
    "OLMo-2-1B": ("olmo2", 2048, 8192, 16, 16, 16, 128, 100_352),
    "Phi-3-mini": ("phi3", 3072, 8192, 32, 32, 32, 96, 32_064),
}
RATIOS = (0.3, 0.5, 0.7)
CASES = list(itertools.product(CHECKPOINTS, RATIOS))


def shape_of(name: str) -> Shape:
    model_type, *sizes = CHECKPOINTS[name]
    hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary = sizes
    family = family_of(model_type, where=name)
    return Shape(hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary, family=family)


def candidates(shape: Shape) -> list[tuple[int, int]]:
    """Hidden and FFN sizes in the steps of `multiple_of`."""
    step = multiple_of(shape.hidden, shape.heads if shape.family.heads_divide_hidden else 1)
    hidden, ffn = range(step, shape.hidden + 1, step), multiple_of(shape.ffn)
    return list(itertools.product(hidden, range(ffn, shape.ffn + 1, ffn)))


def drift(shape: Shape, sizes: tuple[int, int], ratio: float) -> float:
    """Distance of a shape from a ratio, counted with the weights of linears alone, which norms hardly change."""

    def weights(hidden: int, ffn: int) -> int:
        return hidden * (2 * (shape.heads + shape.kv_heads) * shape.head_dim + 3 * ffn)

    return abs(1 - weights(*sizes) / weights(shape.hidden, shape.ffn) - ratio)


def unlike(shape: Shape, sizes: tuple[int, int]) -> float:
    """The quotient of the shares that the two spaces keep, at least 1."""
    return math.exp(abs(math.log(sizes[0] / shape.hidden) - math.log(sizes[1] / shape.ffn)))


def in_blocks(sizes: tuple[int, int]) -> bool:
    return sizes[0] % 256 == 0 and sizes[1] % 256 == 0


def most_alike(name: str, ratio: float) -> tuple[int, int]:
    """The sizes near a ratio whose spaces keep the most similar shares, whatever they are multiples of."""
    shape = shape_of(name)
    near = [sizes for sizes in candidates(shape) if drift(shape, sizes, ratio) <= 0.0098]
    return min(near, key=lambda sizes: (round(unlike(shape, sizes), 9), drift(shape, sizes, ratio)))


def test_most_shapes_of_real_models_are_multiples_of_256() -> None:
    sizes = {case: solve_width(shape_of(case[0]), case[1]) for case in CASES}
    plain = sum(in_blocks(most_alike(*case)) for case in CASES)
    preferred = sum(in_blocks((after.hidden, after.ffn)) for after in sizes.values())
    assert len(CASES) == 45 and plain <= 15 and preferred >= 37


@pytest.mark.parametrize(("name", "ratio"), CASES)
def test_the_ratio_is_met_to_one_percent_by_spaces_that_shrink_alike(name: str, ratio: float) -> None:
    shape = shape_of(name)
    after = solve_width(shape, ratio)
    assert removed(shape, after)["non_embedding"] == pytest.approx(ratio, abs=0.01)
    sizes = (after.hidden, after.ffn)
    assert unlike(shape, sizes) <= max(1.25, unlike(shape, most_alike(name, ratio))) + 1e-9
    if not in_blocks(sizes):  # none was to be had
        near = [s for s in candidates(shape) if in_blocks(s) and drift(shape, s, ratio) <= 0.0098]
        assert shape.hidden < 1024 or all(unlike(shape, s) > 1.25 for s in near)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("axes", [("ffn",), ("ffn", "kv")])
def test_ffn_channels_alone_and_beside_heads(ratio: float, axes: tuple[str, ...]) -> None:
    shape = shape_of("Qwen2.5-7B")
    after = solve_width(shape, ratio, axes)
    assert after.ffn % 256 == 0 and removed(shape, after)["non_embedding"] == pytest.approx(ratio, abs=0.01)


def test_small_models_keep_their_steps() -> None:
    small = Shape(hidden=768, ffn=2048, layers=6, heads=12, kv_heads=4, head_dim=64, vocabulary=1000)
    near = [sizes for sizes in candidates(small) if drift(small, sizes, 0.4) <= 0.0098]
    after = solve_width(small, 0.4)
    assert (after.hidden, after.ffn) == min(near, key=lambda s: (round(unlike(small, s), 9), drift(small, s, 0.4)))
    assert not in_blocks((after.hidden, after.ffn))


@pytest.mark.parametrize(("name", "step"), [("Llama-3.2-1B", 512), ("Llama-3.2-3B", 256), ("Qwen3-0.6B", 96)])
def test_a_step_is_obeyed(name: str, step: int) -> None:
    shape = shape_of(name)
    after = Target.parse(ratio=0.5, step=step).shape(shape, get_method("minitron-width"), "minitron-width")
    assert after.hidden % step == 0 == after.ffn % step
    if shape.family.heads_divide_hidden:
        assert after.hidden % shape.heads == 0
    assert removed(shape, after)["non_embedding"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("wanda", {"ratio": 0.5, "step": 256}, "`step`: wanda prunes no channels"),
        ("shortgpt", {"ratio": 0.5, "step": 256}, "`step`: shortgpt prunes no channels"),
        ("flap", {"shape": "ffn=512", "step": 256}, "`step` rounds the sizes that a `ratio` comes to"),
        ("flap", {"ratio": 0.5, "step": 0}, "`step` must be a whole number above zero, got 0"),
        (
            "flap",
            {"ratio": 0.5, "axes": "ffn", "step": 2048},
            "cannot be narrowed at all in steps of 2048 FFN channels",
        ),
    ],
)
def test_steps_that_are_refused(method: str, fields: dict[str, Any], message: str) -> None:
    small = Shape(hidden=256, ffn=768, layers=6, heads=4, kv_heads=2, head_dim=64, vocabulary=1000)
    with pytest.raises(UserError) as caught:
        Target.parse(**fields).shape(small, get_method(method), method)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_targets_without_the_new_fields_have_the_identity_of_older_ones() -> None:
    assert set(Target(ratio=0.5).as_dict()) == {"ratio", "of", "sizes", "pattern", "axes", "allocation"}
    target = Target(ratio=0.5, step=256, keep_pattern=False)
    assert Target.from_dict(target.as_dict()) == target
    assert target.as_dict() != Target(ratio=0.5).as_dict()
