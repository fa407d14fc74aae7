"""Minitron-width: hidden and FFN channels by the magnitude of their activations (arXiv:2407.14679)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, highest, narrow, watching
from torch import Tensor


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Average ``|x|`` over positions; take the L2 norm over windows; sum hidden channels over norms."""
    norms, readers = {}, {}
    for i, block in enumerate(model.model.layers):
        norms |= {f"input.{i}": block.input_layernorm, f"behind.{i}": block.post_attention_layernorm}
        readers[f"ffn.{i}"] = block.mlp.down_proj
    squares: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        squares[name] = squares.get(name, 0) + x[0].abs().mean(dim=0).square()

    with watching(norms, see, output=True), watching(readers, see):
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    scores = {name: total.sqrt() for name, total in squares.items()}
    kept = {f"keep.{name}": highest(scores[name], ratio) for name in readers}
    kept["keep.hidden"] = highest(torch.stack([scores[name] for name in norms]).sum(dim=0), ratio)
    narrow(model, kept)
    return kept
