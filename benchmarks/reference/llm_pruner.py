"""LLM-Pruner: KV groups and FFN channels by the first-order Taylor term of what runs through them."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, highest, narrow
from torch import Tensor


def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """One backward pass of the whole model, all windows at once, then ``sum |g W|`` by unit (arXiv:2305.11627)."""
    groups = model.config.num_key_value_heads
    model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
    kept: Kept = {}
    for i, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        rows = {"kv": (attention.q_proj, attention.k_proj, attention.v_proj), "ffn": (mlp.gate_proj, mlp.up_proj)}
        columns = {"kv": attention.o_proj, "ffn": mlp.down_proj}
        for space, units in (("kv", groups), ("ffn", model.config.intermediate_size)):
            score = _salience(columns[space]).T.reshape(units, -1).sum(dim=1)
            for linear in rows[space]:
                score = score + _salience(linear).reshape(units, -1).sum(dim=1)
            kept[f"keep.{space}.{i}"] = highest(score, ratio)
    model.zero_grad()
    with torch.no_grad():
        narrow(model, kept)
    return kept


def _salience(linear: Any) -> Tensor:
    return (linear.weight.data * linear.weight.grad).abs()
