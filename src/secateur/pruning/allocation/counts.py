"""Zeros of each linear: shares are fitted to a total and rounded to whole weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from secateur.methods.base import WeightMethod
from secateur.methods.selection import count_pruned
from secateur.model.shapes import Shape

__all__ = ["MOST_ZEROS", "linears_of", "ratios_for_total", "round_to_total", "uniform_zeros"]

MOST_ZEROS = 0.99  #: largest ratio of a linear, so that none is removed whole


def linears_of(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """Tensor name -> block, rows and columns of every weight matrix that sparse methods prune."""
    return {
        shape.family.block_tensor(layer, linear): (layer, *shape.tensor_size(shape.block_tensors(layer)[linear]))
        for layer in range(shape.layers)
        for linear in shape.matrices(layer)
    }  # type: ignore[return-value]


def uniform_zeros(method: WeightMethod, out: int, width: int, ratio: float) -> int:
    """The zeros of a linear [out, width] in a uniform allocation: the share of each group of competing weights."""
    groups, rest = divmod(out * width, method.group_size(out, width))
    return groups * count_pruned(method.group_size(out, width), ratio) + count_pruned(rest, ratio)


def ratios_for_total(
    ratios: Sequence[float], sizes: Sequence[int], total: int, by: Literal["shift", "factor"]
) -> tuple[list[float], int]:
    """Move all ratios together, by one addend or one factor, until they make ``total`` zeros within [0, MOST_ZEROS].

    Returns:
        The ratios, and how many of them were clipped.
    """

    def moved(amount: float) -> list[float]:
        return [min(MOST_ZEROS, max(0.0, r + amount if by == "shift" else r * amount)) for r in ratios]

    low, high = (-2.0, 2.0) if by == "shift" else (0.0, 1e6)
    for _ in range(200):
        middle = (low + high) / 2
        zeros = math.fsum(r * size for r, size in zip(moved(middle), sizes, strict=True))
        low, high = (middle, high) if zeros < total else (low, middle)
    result = moved(high)
    free = [r + high if by == "shift" else r * high for r in ratios]
    return result, sum(abs(a - b) > 1e-9 for a, b in zip(result, free, strict=True))


def round_to_total(zeros: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round to whole weights with this sum: the largest fractions are rounded up; ties go by the order of names."""
    counts = {name: min(sizes[name], math.floor(value + 1e-9)) for name, value in zeros.items()}
    order = sorted(zeros, key=lambda name: counts[name] - zeros[name])
    missing = total - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in order if step > 0 else reversed(order):
            if missing and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts
