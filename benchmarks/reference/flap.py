"""FLAP: channels and KV groups by how much they fluctuate; their mean becomes a bias (arXiv:2312.11983)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, entering, highest, narrow, through, watching
from torch import Tensor, nn


class _Moments:
    """Mean and variance of channels over tokens, merged window by window."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, tokens: Tensor) -> None:
        count, mean = len(tokens), tokens.mean(dim=0)
        shift, total = mean - self.mean, self.count + count
        between = shift.square() * self.count * count / total
        self.squares = self.squares + (tokens - mean).square().sum(dim=0) + between
        self.mean = self.mean + shift * count / total
        self.count = total


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float) -> Kept:
    """Score all blocks on the dense model's states, then cut."""
    groups = model.config.num_key_value_heads
    kept: Kept = {}
    biases: list[tuple[nn.Linear, Tensor]] = []
    states, arguments = entering(model, windows)
    for i, block in enumerate(model.model.layers):
        readers = {"kv": block.self_attn.o_proj, "ffn": block.mlp.down_proj}
        moments = {space: _Moments() for space in readers}

        def see(space: str, x: Tensor, moments: dict[str, _Moments] = moments) -> None:
            moments[space].add(x.flatten(0, 1))

        with watching(readers, see):
            states = through(block, states, arguments)
        for space, reader in readers.items():
            found, weight = moments[space], reader.weight
            fluctuation = found.squares / (found.count - 1) * weight.square().sum(dim=0)
            scores = (fluctuation - fluctuation.mean()) / fluctuation.std()
            units = scores.reshape(groups if space == "kv" else -1, scores.numel() // groups if space == "kv" else 1)
            stays = highest(units.mean(dim=1), ratio)
            kept[f"keep.{space}.{i}"] = stays
            gone = torch.ones_like(units, dtype=torch.bool)
            gone[stays] = False
            biases.append((reader, weight @ (found.mean * gone.flatten())))
    narrow(model, kept)
    for block in model.model.layers:  # Llama's config has biases for all linears or none
        for linear in (*block.self_attn.children(), *block.mlp.children()):
            if isinstance(linear, nn.Linear):
                linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    for reader, bias in biases:
        reader.bias.data += bias
    model.config.attention_bias = model.config.mlp_bias = True
    return kept
