"""Write a trained model as a checkpoint, from however many processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.errors import RunError
from secateur.model.checkpoint import in_write_order, model_card, write_checkpoint
from secateur.model.safetensors_io import Stored
from secateur.training.parallel import TrainModule, full_tensor

__all__ = ["overflow", "write_trained"]


def write_trained(
    out: Path,
    module: TrainModule,
    config: dict[str, Any],
    dtype: Callable[[str], torch.dtype],
    *,
    provenance: dict[str, Any],
    line: str,
    title: str | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    remedy: str = "start from a checkpoint that is stored in bfloat16 or float32",
) -> None:
    """Write a model tensor by tensor: all processes send their parts, the first one writes.

    Args:
        dtype: name of a parameter -> the dtype to store.
        change: (name of a parameter, its whole float32 value) -> the value to write.
        remedy: advice where values do not fit the type to store.

    Raises:
        RunError: in all processes, if a value is beyond the range of the type to store.
    """

    def stored(name: str, parameter: Tensor) -> Stored:
        def parts() -> tuple[Tensor]:
            value = change(name, full_tensor(parameter.detach()))
            if problem := overflow(name, value, dtype(name)):
                raise RunError(f"{problem}; {remedy}")
            return (value.to(dtype(name)),)

        return Stored(name, dtype(name), tuple(parameter.shape), parts)

    tensors = [stored(name, parameter) for name, parameter in module.model.named_parameters()]
    if distributed.is_main():
        card = model_card(title or out.name, None, [line])
        write_checkpoint(out, config, tensors, provenance=provenance, card=card)
        return
    for tensor in in_write_order(tensors):
        list(tensor.parts())


def overflow(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """Describe the largest value of a finite tensor, if it would become infinity in ``dtype``; else empty."""
    if not tensor.numel() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return ""
    ends = torch.stack(tuple(tensor.aminmax()))
    if not ends.to(dtype).isinf().any():
        return ""
    kind, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return f"{name} holds {float(ends.abs().max()):.6g}, beyond the range of {kind} (at most {limit:g})"
