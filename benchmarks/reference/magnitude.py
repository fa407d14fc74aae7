"""Magnitude pruning within each linear (arXiv:1506.02626)."""

from __future__ import annotations

from typing import Any

from benchmarks.reference.common import Kept, linears
from torch import Tensor


def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Zero the smallest weights of each linear; the windows are not looked at."""
    kept: Kept = {}
    for i, block in enumerate(model.model.layers):
        for name, linear in linears(block).items():
            weight = linear.weight.data
            threshold = weight.abs().flatten().sort().values[int(ratio * weight.numel())]
            mask = weight.abs() >= threshold
            weight[~mask] = 0
            kept[f"mask.model.layers.{i}.{name}.weight"] = mask
    return kept
