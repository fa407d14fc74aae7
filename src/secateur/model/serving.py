"""The memory that a model takes to serve: weights as stored, KV cache and activations.

A Shape whose sizes are numpy arrays gives arrays of bytes, one for each combination of sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from secateur.formatting import byte_size, plural
from secateur.model.expert_matrices import is_expert_weight, reads_hidden
from secateur.model.shapes import Shape

__all__ = ["GROUP", "Memory", "Serving", "Weights", "memory"]

Weights = Literal["bf16", "float32", "int8", "int4"]  #: the type that weights are stored in

GROUP = 128  #: weights of a row that share an int4 scale and zero point
_WIDTH = {"float32": 4, "bf16": 2, "int8": 2, "int4": 2}  #: bytes of what is not quantised: norms, embeddings, cache


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        context: tokens of each sequence, prompt and answer.
        sequences: sequences at once.
        weights: ``bf16``, ``float32``, or ``int8`` (a 16-bit scale for each row of a linear) and ``int4`` (a 16-bit
            scale and zero point for each ``GROUP`` weights of a row). Of quantised models, the linears of the blocks
            alone are quantised; embeddings, head, norms, routers and biases stay bf16, and so do cache and activations.
    """

    context: int
    sequences: int = 1
    weights: Weights = "bf16"

    @property
    def width(self) -> int:
        """Bytes of a value that is not quantised."""
        return _WIDTH[self.weights]


@dataclass(frozen=True)
class Memory:
    """Bytes by part; of a shape with arrays for sizes, arrays."""

    weights: Any
    cache: Any
    activations: Any
    serving: Serving

    @property
    def total(self) -> Any:
        """All parts together."""
        return self.weights + self.cache + self.activations

    def record(self) -> dict[str, Any]:
        """Plain values."""
        parts = {name: int(getattr(self, name)) for name in ("weights", "cache", "activations", "total")}
        return {**parts, "serving": vars(self.serving)}

    def formula(self, shape: Shape) -> list[str]:
        """The parts with the numbers that they come from, one line each."""
        serving, width = self.serving, self.serving.width
        linears, rest = shape.block_weights, shape.total - shape.block_weights
        quantised = {
            "int8": f"{linears:,} x 1 (linears) + 2 for each row",
            "int4": f"{linears:,} x 0.5 (linears) + 4 for each group of {GROUP} weights of a row",
        }
        stored = f"{shape.total:,} x {width}"
        if serving.weights in quantised:
            stored = f"{quantised[serving.weights]} + {rest:,} x {width} (all else, bf16)"
        per_token = shape.kv_cache_bytes // 2
        tokens, windows = plural(serving.context, "token"), ""
        if shape.windows and any(window and window <= serving.context for window in shape.windows):
            windows = ", sliding windows hold one position less than their size"
        return [
            f"weights      {byte_size(self.weights)} = {stored} bytes",
            f"KV cache     {byte_size(self.cache)} = {serving.sequences} x {tokens} x {per_token:,} "
            f"values (keys and values of all layers) x {width} bytes{windows}",
            f"activations  {byte_size(self.activations)} = {serving.sequences} x ({tokens} x "
            f"{_live_values(shape):,} values + {shape.vocabulary:,} logits) x {width} bytes (plain transformers, the "
            "whole prompt in one pass, an estimate)",
        ]


def memory(shape: Shape, serving: Serving) -> Memory:
    """Bytes that a model of this shape takes to serve.

    Cache: what the DynamicCache of transformers allocates. Activations: an estimate of the largest part of a block that
    lives at once, in a pass over the whole prompt.
    """
    width, tokens = serving.width, serving.sequences * serving.context
    if serving.weights in ("int8", "int4"):
        quantised = shape.sum_over_layers(lambda layer: _quantised_bytes(shape, layer, serving.weights))
        weights = quantised + (shape.total - shape.block_weights) * width
    else:
        weights = shape.total * width
    cache = shape.cached_values(serving.context) * serving.sequences * width
    activations = (tokens * _live_values(shape) + serving.sequences * shape.vocabulary) * width
    return Memory(weights, cache, activations, serving)


def _quantised_bytes(shape: Shape, layer: int, weights: Weights) -> Any:
    """Bytes of a block's linears with their scales."""
    tensors, total = shape.block_tensors(layer), 0
    for name in shape.linears(layer):
        axes = tensors[name]
        size = shape.tensor_size(axes)
        row = size[-1]
        if is_expert_weight(axes):
            row = shape.hidden if reads_hidden(axes) else shape.expert_ffn
        rows = math.prod(size) // row
        if weights == "int8":
            total = total + rows * row + 2 * rows
        else:
            total = total + rows * ((row + 1) // 2) + 4 * rows * -(-row // GROUP)
    return total


def _live_values(shape: Shape) -> Any:
    """Values of a token that live at once in a block: residual and normed states, with attention's or the FFN's."""
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim  # queries, keys, values and outputs
    ffn = 3 * np.maximum(shape.ffn, shape.active * shape.expert_ffn)  # gate, up and their product
    live = 2 * shape.hidden + np.maximum(attention, ffn)
    return live if isinstance(live, np.ndarray) and live.ndim else int(live)
