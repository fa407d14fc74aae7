"""The one surgeon: cuts a checkpoint to a plan, for every method and family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from secateur.checkpoint import Checkpoint
from secateur.families import Axis
from secateur.plan import Plan

__all__ = ["cut_config", "cut_tensors"]


def cut_tensors(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Read the checkpoint tensor by tensor and yield what the plan keeps, under the new layer numbers."""
    family = checkpoint.family
    kept = {family.block_tensor(old, ""): new for new, old in enumerate(plan.keep_layers.tolist())}
    for name, axes in checkpoint.tensors().items():
        if name in family.outer:
            yield name, _slice(checkpoint.tensor(name), axes, plan, layer=-1)
            continue
        old, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
        prefix = family.block_tensor(int(old), "")
        if prefix in kept:
            tensor = _slice(checkpoint.tensor(name), axes, plan, layer=int(old))
            if name in plan.masks:
                tensor = tensor.masked_fill(~plan.masks[name], 0)
            yield family.block_tensor(kept[prefix], rest), tensor


def _slice(tensor: Tensor, axes: tuple[Axis, ...], plan: Plan, layer: int) -> Tensor:
    for dimension, axis in enumerate(axes):
        indices = plan.indices(axis, layer)
        if indices is not None:
            tensor = tensor.index_select(dimension, indices)
    return tensor


def cut_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The content of config.json after the cut; ``head_dim`` is always written, since hidden / heads may not be it."""
    config = dict(checkpoint.raw_config) | plan.after.config_changes()
    for key in checkpoint.family.per_layer_keys:
        values = config.get(key)
        if isinstance(values, list) and len(values) == plan.before.layers:
            config[key] = [values[layer] for layer in plan.keep_layers.tolist()]
    return config
