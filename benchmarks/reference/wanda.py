"""Wanda: weights by magnitude times the norm of their input, compared within a row (arXiv:2306.11695)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, entering, linears, squared_norms, through
from torch import Tensor


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Prune block after block; each sees what the pruned ones before it put out."""
    kept: Kept = {}
    states, arguments = entering(model, windows)
    for i, block in enumerate(model.model.layers):
        found = linears(block)
        squares = squared_norms(found, block, states, arguments)
        for name, linear in found.items():
            weight = linear.weight.data
            scores = weight.abs() * squares[name].sqrt()
            lowest = scores.sort(dim=1, stable=True).indices[:, : int(ratio * weight.shape[1])]
            mask = torch.ones_like(weight, dtype=torch.bool).scatter_(1, lowest, False)
            weight[~mask] = 0
            kept[f"mask.model.layers.{i}.{name}.weight"] = mask
        states = through(block, states, arguments)
    return kept
