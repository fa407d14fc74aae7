"""Masks that hold: a pruned weight is exactly zero before, during and after training.

Masks are explicit bool tensors. They are never derived from ``weight == 0``: a kept weight may pass through zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Masks"]


class Masks:
    """The masks of a model's parameters.

    Args:
        model: the model that they belong to.
        masks: parameter name -> bool of the parameter's size, True where kept; may be empty.

    Raises:
        KeyError: if the model has no such parameter.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self.pairs = [(name, parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights."""
        for _, parameter, mask in self.pairs:
            parameter.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the pruned weights' gradients, so that neither the clipping norm nor the moments know of them."""
        for _, parameter, mask in self.pairs:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def check(self) -> None:
        """Assert that every pruned weight is exactly zero.

        Raises:
            RuntimeError: naming the first parameter where one is not.
        """
        for name, parameter, mask in self.pairs:
            revived = int((parameter[~mask] != 0).sum())
            if revived:
                raise RuntimeError(f"{name}: {revived} pruned weights are no longer zero")
