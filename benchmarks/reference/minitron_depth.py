"""Minitron-depth: the contiguous run of layers that the loss misses least (arXiv:2408.11796)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, drop_layers, mean_loss
from torch import Tensor, nn


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Try each run: the whole forward pass of the model without it, for each."""
    layers = list(model.model.layers)
    length = round(ratio * len(layers))
    losses = []
    for first in range(len(layers) - length + 1):
        model.model.layers = nn.ModuleList(layers[:first] + layers[first + length :])
        losses.append(mean_loss(model, windows))
    best = losses.index(min(losses))
    model.model.layers = nn.ModuleList(layers)
    kept = torch.tensor([i for i in range(len(layers)) if not best <= i < best + length])
    drop_layers(model, kept)
    return {"keep.layers": kept}
