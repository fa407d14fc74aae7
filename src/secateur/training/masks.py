"""Masks that hold: a pruned weight is exactly zero before, during and after training.

Masks are explicit bool tensors, sharded like their parameters. They are never derived from ``weight == 0``: a kept
weight may pass through zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.training.parallel import local_part, part_like

__all__ = ["Masks"]


class Masks:
    """The masks of a model's parameters; each process keeps its part.

    Args:
        model: the model that they belong to.
        masks: parameter name -> bool of the parameter's size, True where kept; may be empty.

    Raises:
        KeyError: if the model has no such parameter.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self._kept = [(name, parameters[name], part_like(parameters[name], masks[name]).clone()) for name in masks]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights."""
        for _, parameter, kept in self._kept:
            local_part(parameter).mul_(kept).add_(0.0)  # of a negative weight times zero a sign would stay

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the pruned weights' gradients, so that neither the clipping norm nor the moments know of them."""
        for _, parameter, kept in self._kept:
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(kept)  # what is not finite stays so, and is found

    @torch.no_grad()
    def check(self) -> None:
        """Assert, in all processes together, that every pruned weight is exactly zero.

        Raises:
            RuntimeError: naming the first parameter where one is not.
        """
        if not self._kept:
            return
        found = torch.stack([(local_part(p) != 0).logical_and_(~kept).sum() for _, p, kept in self._kept]).cpu()
        for (name, _, _), revived in zip(self._kept, distributed.all_reduce(found).tolist(), strict=True):
            if revived:
                raise RuntimeError(f"{name}: {revived} pruned weights are no longer zero")
