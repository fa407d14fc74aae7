"""ShortGPT: layers by their block influence, one minus the cosine of the states around them (arXiv:2403.03853)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, drop_layers, highest
from torch import Tensor, nn


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Drop the layers that turn the hidden state least."""
    layers = len(model.model.layers)
    influence = torch.zeros(layers, dtype=torch.float64)
    states: list[Tensor] = []
    # hidden_states of transformers has the last layer's states behind the final norm; influence is of the layer alone.
    handles = [block.register_forward_hook(lambda _module, args, out: states.extend((args[0], _first(out))))
               for block in model.model.layers]  # fmt: skip
    for window in windows:
        states.clear()
        model(input_ids=window[None], use_cache=False)
        for i in range(layers):
            cosines = nn.functional.cosine_similarity(states[2 * i].double(), states[2 * i + 1].double(), dim=-1)
            influence[i] += 1 - float(cosines.mean())
    for handle in handles:
        handle.remove()
    kept = highest(influence, ratio)
    drop_layers(model, kept)
    return {"keep.layers": kept}


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
