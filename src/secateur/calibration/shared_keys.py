"""Keys and values that later blocks read, carried behind the hidden channels of the states.

The last layers of some models (Gemma 4) compute no keys and values; they read those of the last layer of their kind
that does. A block walk has one block in memory at a time, so these keys and values go along with the states, and are
stored, differentiated and recomputed as the states are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KeySource", "key_sources", "run_with_keys"]

_ARGUMENT = "shared_kv_states"  #: of a block: a mapping from the kind of a layer to its keys and values


@dataclass(frozen=True)
class KeySource:
    """A layer whose keys and values later layers of its kind read."""

    layer: int
    kind: str
    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        """Channels that its keys and values take in the states."""
        return 2 * self.heads * self.head_dim


def key_sources(config: Any) -> list[KeySource]:
    """The layers whose keys and values later layers read, in order; none in most models."""
    modes = getattr(config, "kv_sharing_modes", ())
    if "reuse" not in modes:
        return []
    sources = []
    for layer in (layer for layer, mode in enumerate(modes) if mode == "store"):
        sizes = config.per_layer_config[layer]
        sources.append(KeySource(layer, config.layer_types[layer], sizes.num_key_value_heads, sizes.head_dim))
    return sources


def run_with_keys(
    module: nn.Module, index: int, states: Tensor, sources: list[KeySource], arguments: dict[str, Any]
) -> Tensor:
    """Run a block on states that carry the keys and values of the sources before it.

    Args:
        index: of the block.
        states: [windows, positions, hidden channels + those of each source before the block].

    Returns:
        The new states, with the keys and values of the block behind the others if it is a source.
    """
    before = [source for source in sources if source.layer < index]
    carried = sum(source.channels for source in before)
    hidden, behind = states.split([states.shape[-1] - carried, carried], dim=-1)
    shared = type(arguments[_ARGUMENT])()
    for source, values in zip(before, behind.split([source.channels for source in before], dim=-1), strict=True):
        # [windows, positions, 2 * heads * head_dim] -> [windows, heads, positions, head_dim] each
        shared[source.kind] = tuple(values.unflatten(-1, (2, source.heads, -1)).permute(2, 0, 3, 1, 4).unbind())
    out = module(hidden, **{**arguments, _ARGUMENT: shared})
    new = [shared[source.kind] for source in sources if source.layer == index]
    keys = [torch.stack(tuple(pair)).permute(1, 3, 0, 2, 4).flatten(2) for pair in new]
    return torch.cat([out[0] if isinstance(out, tuple) else out, behind, *keys], dim=-1)
