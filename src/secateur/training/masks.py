"""Masks of sparse models: a pruned weight is exactly zero before, during and after training.

Masks are explicit bool tensors, sharded like their parameters. They are never derived from ``weight == 0``: a kept
weight may pass through zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.formatting import plural
from secateur.training.adapter import plain_name
from secateur.training.parallel import local_part, part_like

__all__ = ["Masks"]


class Masks:
    """The masks of a model's parameters; each process keeps its part.

    Args:
        masks: parameter name -> bool of the parameter's size, True where kept; may be empty.

    Raises:
        KeyError: if the model has no such parameter.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        parameters |= {plain_name(name): parameter for name, parameter in parameters.items()}
        self._masks = [  # without frozen weights in four bits: an adapter masks its sum with them in each forward pass
            (name, parameters[name], part_like(parameters[name], mask).clone())
            for name, mask in masks.items()
            if parameters[name].is_floating_point()
        ]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights."""
        for _, parameter, mask in self._masks:
            local_part(parameter).mul_(mask).add_(0.0)  # turns -0.0 into 0.0

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the pruned weights' gradients, so that they do not affect the moments."""
        for _, parameter, mask in self._masks:
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(mask)  # NaN and infinity stay, so that the norm shows them

    @torch.no_grad()
    def count_nonzero(self) -> int:
        """Count the pruned weights that are not zero, in all processes together."""
        return sum(self._nonzero())

    @torch.no_grad()
    def check(self) -> None:
        """Assert, in all processes together, that every pruned weight is exactly zero.

        Raises:
            RuntimeError: naming the first parameter with a nonzero pruned weight.
        """
        for (name, _, _), nonzero in zip(self._masks, self._nonzero(), strict=True):
            if nonzero:
                raise RuntimeError(f"{name}: no longer zero: {plural(nonzero, 'pruned weight')}")

    def _nonzero(self) -> list[int]:
        """The number of nonzero pruned weights of each masked parameter."""
        if not self._masks:
            return []
        counts = torch.stack([(local_part(p) != 0).logical_and_(~mask).sum() for _, p, mask in self._masks]).cpu()
        return distributed.all_reduce(counts).tolist()
