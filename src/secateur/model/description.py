"""What a model's shape alone says of it: parameters, FLOPs and KV cache."""

from __future__ import annotations

from typing import Any

from secateur.model.shapes import Shape
from secateur.progress import notify

__all__ = ["describe_shape", "flops_context"]

CONTEXT = 2048  #: default window that FLOPs per token are averaged over


def describe_shape(shape: Shape, context: int) -> dict[str, Any]:
    """Describe a shape as plain values; FLOPs are averaged over windows of ``context`` tokens."""
    return {
        "family": shape.family.name,
        "shape": shape.as_dict(),
        "parameters": {
            "total": shape.total,
            "non_embedding": shape.non_embedding,
            **({"active": shape.active_parameters} if shape.layers_with("experts") else {}),
        },
        "flops_per_token": {"forward": shape.forward_flops(context), "context": context},
        "kv_cache_bytes_per_token": shape.kv_cache_bytes,
    }


def flops_context(context: int | None, positions: int | None) -> int:
    """The window that FLOPs are averaged over: ``context`` or the default, at most the model's positions."""
    length = context or CONTEXT
    if context and positions and positions < context:
        reason = "the model has no more positions (`context`)"
        notify(f"FLOPs for windows of {positions} tokens instead of {context}: {reason}")
    return min(length, positions or length)
