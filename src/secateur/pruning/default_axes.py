"""The axes that a width method narrows where a request names none."""

from __future__ import annotations

import dataclasses

from secateur.methods.base import Method
from secateur.model.shapes import Shape
from secateur.progress import notify_once
from secateur.pruning.target import Target

__all__ = ["with_default_axes"]


def with_default_axes(target: Target, before: Shape, method: Method, name: str) -> Target:
    """Name the axes of a target for a mixture whose every layer has experts, where the method's own do not suit it.

    Such a model has no ``ffn``. The method's other axes stay, and ``expert_ffn`` takes the place of ``ffn`` where the
    method scores it. One line says so. A target with axes or sizes stays as it is, and so does one for another model.
    """
    family = before.family
    suits = target.axes or target.sizes or not before.experts or before.layers_with("ffn")
    if suits or method.granularity != "width" or "ffn" not in method.axes:
        return target
    axes = [axis for axis in method.axes if axis != "ffn" and axis in family.axes]
    axes += ["expert_ffn"] if "expert_ffn" in method.scores and "expert_ffn" in family.axes else []
    if family.heads_span_hidden and family.relaxed is None and not {"hidden", "kv"}.issubset(axes):
        axes = [axis for axis in axes if axis not in ("hidden", "kv")]  # neither is cut without the other
    if not axes:
        return target
    notify_once(
        f"`axes`: every layer of this {family.name} has experts and none an FFN, so {name} narrows "
        f"{' and '.join(axes)} instead of {' and '.join(method.axes)}"
    )
    return dataclasses.replace(target, axes=tuple(axes))
