"""Wanda-sp: Wanda's score gathered over whole channels and KV groups (arXiv:2312.11983, 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, entering, highest, narrow, squared_norms, through
from torch import Tensor


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Score block after block; each sees what the pruned ones before it put out."""
    groups = model.config.num_key_value_heads
    kept: Kept = {}
    states, arguments = entering(model, windows)
    for i, block in enumerate(model.model.layers):
        readers = {"kv": block.self_attn.o_proj, "ffn": block.mlp.down_proj}
        squares = squared_norms(readers, block, states, arguments)
        for space, reader in readers.items():
            weight = reader.weight.data
            scores = weight.abs().sum(dim=0) * squares[space].sqrt()
            units = scores.reshape(groups if space == "kv" else -1, scores.numel() // groups if space == "kv" else 1)
            stays = highest(units.sum(dim=1), ratio)
            kept[f"keep.{space}.{i}"] = stays
            gone = torch.ones_like(units, dtype=torch.bool)
            gone[stays] = False
            weight[:, gone.flatten()] = 0
        states = through(block, states, arguments)
    narrow(model, kept)
    return kept
