"""Statistics of activations, gathered batch by batch and merged without order mattering beyond rounding.

A statistic sees activations ``x`` of size [windows, positions, channels] and ends as one tensor. Sums are kept in
float32 or better whatever the activations' type.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["AbsMeanByPosition", "MeanSquare", "Statistic"]


class Statistic(Protocol):
    """An accumulator over batches of activations."""

    def update(self, x: Tensor) -> None:
        """Take in one batch [windows, positions, channels]."""
        ...

    def value(self) -> Tensor:
        """The statistic over all batches so far."""
        ...


class MeanSquare:
    """Mean over all tokens of ``x^2``, for each channel: [channels], float32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        squares = x.float().square().sum(dim=(0, 1), dtype=torch.float64)
        self.total = squares if self.total is None else self.total + squares
        self.tokens += x.shape[0] * x.shape[1]

    def value(self) -> Tensor:
        assert self.total is not None, "no batch has been seen"
        return (self.total / self.tokens).float()


class AbsMeanByPosition:
    """Mean over all windows of ``|x|``, for each position and channel: [positions, channels], float32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.windows = 0

    def update(self, x: Tensor) -> None:
        magnitudes = x.float().abs().sum(dim=0)
        self.total = magnitudes if self.total is None else self.total + magnitudes
        self.windows += x.shape[0]

    def value(self) -> Tensor:
        assert self.total is not None, "no batch has been seen"
        return self.total / self.windows
