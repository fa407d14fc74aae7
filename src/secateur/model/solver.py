"""The way from a ratio, or from sizes, to a legal shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UserError, did_you_mean
from secateur.formatting import plural
from secateur.model.shapes import BLOCK, SIZES, Shape, Share, removed

__all__ = [
    "explicit",
    "largest",
    "multiple_of",
    "prefer_blocks",
    "solve_between",
    "solve_depth",
    "solve_experts",
    "solve_width",
    "steps_of",
]

MOST_UNLIKE = 1.25  #: largest quotient of the shares that two spaces keep, where ``BLOCK`` decides


def multiple_of(size: int, divisor: int = 1) -> int:
    """The step in which an axis is narrowed: hardware-friendly, and fine enough to come near a ratio.

    It is ``divisor`` times the largest power of two that keeps it at most 128 and leaves 16 steps or more.
    """
    step = divisor
    while step * 2 <= 128 and size // (step * 2) >= 16:
        step *= 2
    return step


def _counted(shape: Shape, of: Share) -> Any:
    return shape.total if of == "total" else shape.non_embedding


def solve_depth(shape: Shape, ratio: float, of: Share = "non_embedding") -> Shape:
    """Remove a share of the parameters, to the nearest layer.

    Raises:
        UserError: if no layer would be left, or none removed.
    """
    shares = {n: removed(shape, dataclasses.replace(shape, layers=n))[of] for n in range(shape.layers + 1)}
    layers = min(shares, key=lambda n: (round(abs(shares[n] - ratio), 4), n % 2))  # halves to even, as round() has it
    if not 1 <= layers < shape.layers:
        legal = [f"{shares[n]:.3g}" for n in range(shape.layers - 1, 0, -1)]
        legal = [*legal[:3], f"... (one for each layer) ... {legal[-1]}"] if len(legal) > 12 else legal
        options = ", ".join(legal) or "none"
        raise UserError(
            f"`ratio` {ratio:g}: of {plural(shape.layers, 'layer')} it would keep {layers}; possible: {options}"
        )
    return dataclasses.replace(shape, layers=layers)


def solve_experts(shape: Shape, ratio: float) -> Shape:
    """Remove a share of the routed experts, to the nearest number that the router's groups divide.

    Raises:
        UserError: if there are none, too few would be left, or none removed.
    """
    groups = shape.groups[0]
    step = shape.experts // groups
    per_group = round(step * (1 - ratio)) if shape.experts else 0
    experts = groups * per_group
    if not shape.least_experts <= experts < shape.experts:
        legal = [1 - n / shape.experts for n in range(shape.experts - groups, shape.least_experts - 1, -groups)]
        possible = f"possible: {legal[0]:.3g} to {legal[-1]:.3g}" if legal else "no smaller number is possible"
        raise UserError(
            f"`ratio` {ratio:g}: of {plural(shape.experts, 'routed expert')} it would keep {experts}; {possible}"
        )
    return dataclasses.replace(shape, experts=experts)


def solve_width(
    shape: Shape,
    ratio: float,
    spaces: Sequence[str] = ("hidden", "ffn"),
    of: Share = "non_embedding",
    step: int | None = None,
) -> Shape:
    """The smaller shape nearest to the ratio; what is not named stays.

    Channels go in steps of :func:`multiple_of`, heads in whole KV groups, and the named spaces shrink alike as far as
    the steps allow: of the shapes that come within a hundredth of all parameters, and within a tenth of those that are
    to go or to stay (or, failing that, of the nearest ones), the one whose spaces keep the most similar shares.
    Shapes whose hidden and FFN sizes are multiples of 256, which K-quants of llama.cpp need, go first
    (:func:`prefer_blocks`).

    Args:
        spaces: which of ``layers``, ``hidden``, ``ffn`` and ``kv`` may shrink.
        step: hidden and FFN sizes are multiples of it; None for the steps above.

    Raises:
        UserError: if no legal shape comes within five hundredths, or half of what is to go or to stay.
    """
    steps = steps_of(shape, spaces, step)
    grid = np.ix_(*(np.arange(steps[space], shape.units(space) + 1, steps[space]) for space in spaces))
    every: Any = shape  # all candidates at once: counts are sums of products, so that sizes may as well be arrays
    for space, sizes in zip(spaces, grid, strict=True):
        every = every.narrowed(space, sizes)
    removal = 1 - _counted(every, of) / _counted(shape, of)
    legal = (removal > 0) & ~np.asarray(every.refused_by_config)  # the shape itself is no candidate
    removal = np.where(legal, removal, np.nan)
    least, room = np.min(np.abs(removal - ratio), initial=np.inf, where=removal > 0), min(ratio, 1 - ratio)
    if least > min(0.05, room / 2):
        raise UserError(f"`ratio` {ratio:g}: {_reach(removal, ratio, steps)}")
    shares = [np.log(sizes / shape.units(space)) for space, sizes in zip(spaces, grid, strict=True)]
    unlike = np.broadcast_to(largest(shares) + largest([-part for part in shares]), removal.shape)
    drift = np.abs(removal - ratio)
    near = np.flatnonzero(drift <= max(least, min(0.01, room / 10)))
    if step is None:
        near = prefer_blocks(shape, spaces, grid, near, unlike)
    # Least unlike, then nearest; rounded, so that the last bits of a logarithm decide nothing.
    best = min(near, key=lambda i: (round(float(unlike.flat[i]), 9), float(drift.flat[i])))
    narrow = shape
    for space, sizes, at in zip(spaces, grid, np.unravel_index(best, removal.shape), strict=True):
        narrow = narrow.narrowed(space, int(sizes.flat[at]))
    return narrow


def solve_between(
    shape: Shape,
    most: Shape,
    least: Shape,
    ratio: float,
    spaces: Sequence[str],
    of: Share | Literal["experts"] = "non_embedding",
    step: int | None = None,
) -> Shape | None:
    """The legal shape nearest to a ratio that is smaller than ``most`` and larger than ``least``.

    Of the shapes that come within a hundredth (or of the nearest ones), it is the one whose spaces are equally far on
    their way from ``shape`` to ``least``.

    Args:
        shape: what the ratio is a share of.
        spaces: those in which ``shape`` and ``least`` differ; no space is wider than ``most`` has it.
        of: what the ratio counts; ``experts`` for routed experts.
        step: as for :func:`solve_width`.

    Returns:
        None where there is no such shape.
    """
    steps = steps_of(shape, spaces, step) | ({"experts": shape.groups[0]} if "experts" in spaces else {})
    ends = {space: (least.units(space), most.units(space)) for space in spaces}
    sizes = [
        np.unique(np.array([*range(low - low % -steps[space], high, steps[space]), low, high]))
        for space, (low, high) in ends.items()
    ]
    grid = np.ix_(*sizes)
    every: Any = shape
    for space, each in zip(spaces, grid, strict=True):
        every = every.narrowed(space, each)
    counted = (every.experts, shape.experts) if of == "experts" else (_counted(every, of), _counted(shape, of))
    drift = np.abs(1 - counted[0] / counted[1] - ratio)
    legal = np.broadcast_to(~np.asarray(every.refused_by_config), drift.shape).copy()
    legal.flat[[0, -1]] = False  # ``least`` and ``most`` themselves
    if not legal.any():
        return None
    ways = [
        np.log(shape.units(n) / each) / math.log(shape.units(n) / ends[n][0])
        for n, each in zip(spaces, grid, strict=True)
    ]
    unlike = np.broadcast_to(largest(ways) + largest([-way for way in ways]), drift.shape)
    near = np.flatnonzero(legal & (drift <= max(float(drift[legal].min()), min(0.01, min(ratio, 1 - ratio) / 10))))
    best = min(near, key=lambda i: (round(float(unlike.flat[i]), 9), float(drift.flat[i])))
    narrow = shape
    for space, each, at in zip(spaces, sizes, np.unravel_index(best, drift.shape), strict=True):
        narrow = narrow.narrowed(space, int(each[at]))
    return narrow


def prefer_blocks(
    shape: Shape,
    spaces: Sequence[str],
    grid: Sequence[NDArray[np.int64]],
    near: NDArray[np.int64],
    unlike: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Of the candidates ``near`` a ratio, those whose hidden and FFN sizes are multiples of ``BLOCK``.

    All of them where there is none, where a space is too small for such steps, or where they would shrink the spaces
    too differently.
    """
    sizes = {space: size for space, size in zip(spaces, grid, strict=True) if space in ("hidden", "ffn")}
    if not sizes or not near.size or any(shape.units(space) < 4 * BLOCK for space in sizes):
        return near
    whole = np.ones(unlike.shape, dtype=bool)
    for size in sizes.values():
        whole &= size % BLOCK == 0
    most = max(float(unlike.flat[near].min()), math.log(MOST_UNLIKE))
    blocks = near[whole.flat[near] & (unlike.flat[near] <= most)]
    return blocks if blocks.size else near


def steps_of(shape: Shape, spaces: Sequence[str], step: int | None) -> dict[str, int]:
    """The step in which each space is narrowed."""
    divisor = shape.heads if shape.family.heads_divide_hidden and "kv" not in spaces else 1
    # Transformers multiplies experts by grouped kernels, which need rows of whole 16 bytes: 8 weights of 16 bits.
    least = 8 if shape.experts else 1
    hidden = math.lcm(step, divisor) if step else math.lcm(multiple_of(shape.hidden, divisor), least)
    steps = {"layers": 1, "hidden": hidden, "ffn": step or multiple_of(shape.ffn), "kv": 1, "experts": 1}
    steps["expert_ffn"] = step or math.lcm(multiple_of(shape.expert_ffn), least)
    return {space: steps[space] for space in spaces}


def largest(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The largest of several arrays, value by value; they broadcast."""
    result = arrays[0]
    for array in arrays[1:]:
        result = np.maximum(result, array)
    return result


def _reach(shares: NDArray[np.float64], ratio: float, steps: Mapping[str, int]) -> str:
    """What narrowing can remove, for an error; ``shares`` has each candidate's share, NaN where one is not legal."""
    units = {"layers": "layer{s}", "hidden": "hidden channel{s}", "ffn": "FFN channel{s}", "kv": "KV head{s}"}
    units |= {"experts": "expert{s}", "expert_ffn": "FFN channel{s} of each expert"}
    named = ", ".join(f"{step} {units[space].format(s='s' if step > 1 else '')}" for space, step in steps.items())
    legal = shares[shares > 0]
    if not legal.size:
        return f"this model cannot be narrowed at all in steps of {named}"
    nearest = legal[np.abs(legal - ratio).argmin()]
    how = "too small" if ratio < legal.min() else "too large" if ratio > legal.max() else "falls between two steps"
    return (
        f"{how}; narrowing this model in steps of {named} removes {legal.min():.4g} to {legal.max():.4g}, "
        f"nearest {nearest:.4g}"
    )


def explicit(shape: Shape, sizes: Mapping[str, int]) -> Shape:
    """The shape with these sizes in place of its own.

    Args:
        sizes: ``hidden``, ``ffn``, ``layers``, ``heads`` or ``kv_heads`` -> size; query heads and KV heads follow each
            other.

    Raises:
        UserError: on a size that is unknown, is not between one and the present one, or splits a KV group.
    """
    for name, size in sizes.items():
        if name not in SIZES:
            raise UserError(f"`shape`: {name!r} is not a size{did_you_mean(name, SIZES)}")
        if not 1 <= size <= getattr(shape, name):
            raise UserError(f"`shape`: {name}={size} is not between 1 and the model's {getattr(shape, name)}")
    experts, groups = sizes.get("experts", shape.experts), shape.groups[0]
    if experts < shape.least_experts or experts % groups:
        rule = f" and a multiple of its {groups} groups" if groups > 1 else ""
        raise UserError(
            f"`shape`: experts={experts}: the router needs at least {shape.least_experts}{rule} "
            f"({plural(shape.active, 'expert')} for a token)"
        )
    group = shape.heads // shape.kv_heads
    heads = sizes.get("heads", sizes.get("kv_heads", shape.kv_heads) * group)
    kv_heads = sizes.get("kv_heads", heads // group)
    if heads % group:
        raise UserError(f"`shape`: heads={heads} splits a KV group: {group} query heads share each KV head")
    if heads != kv_heads * group:
        raise UserError(
            f"`shape`: heads={heads},kv_heads={kv_heads}: {group} query heads share each KV head, so {kv_heads} KV "
            f"heads go with {kv_heads * group} query heads"
        )
    return dataclasses.replace(shape, **{**sizes, "heads": heads, "kv_heads": kv_heads})
