"""Targets in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.model.goal import describe_goal

__all__ = ["describe_target"]


def describe_target(target: Mapping[str, Any]) -> str:
    """Describe a target (:meth:`Target.record`) in words."""
    parts = [describe_goal(target["goal"])] if "goal" in target else []
    if "ratio" in target:
        parts.append(f"{100 * target['ratio']:.4g}% of {_COUNTED[target['of']]}")
    if "shape" in target:
        parts.append(",".join(f"{name}={size}" for name, size in target["shape"].items()))
    if "layer_ratios" in target:
        parts.append(f"{100 * sum(target['layer_ratios']) / len(target['layer_ratios']):.4g}% of the weights, by layer")
    parts += [f"{key} {target[key]}" for key in ("pattern", "allocation", "step", "propagate") if key in target]
    if "keep_pattern" in target:
        parts.append(f"keep_pattern {'on' if target['keep_pattern'] else 'off'}")
    if "axes" in target:
        parts.append(f"axes {','.join(target['axes'])}")
    return ", ".join(parts)


_COUNTED = {
    "total": "all parameters",
    "non_embedding": "the parameters outside the embeddings",
    "block_weights": "the weights of the blocks' linears",
    "experts": "the routed experts",
}
