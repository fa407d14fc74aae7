"""Shortened LLaMA: layers by the first-order effect of their weights on the loss (arXiv:2402.02834, Taylor)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, drop_layers, highest
from torch import Tensor


def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Backward passes of the whole model, window after window, then ``sum |g W|`` by layer."""
    for window in windows:
        loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
        (loss / len(windows)).backward()
    scores = []
    for block in model.model.layers:
        weights = [parameter for name, parameter in block.named_parameters() if name.endswith("weight")]
        scores.append(torch.stack([(w.data * w.grad).abs().sum() for w in weights]).sum())
    model.zero_grad()
    kept = highest(torch.stack(scores), ratio)
    drop_layers(model, kept)
    return {"keep.layers": kept}
