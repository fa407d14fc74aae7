"""The pruning methods: what a method is, and the registry that finds it by name.

A method turns statistics into scores: higher means worth keeping. It sees neither a device, a hook, a ratio nor a file;
the engine gathers what it ``needs`` and the selector decides how much to keep.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from secateur.calibrate.stats import Statistic
from secateur.errors import UserError, did_you_mean

__all__ = ["METHODS", "DepthMethod", "Granularity", "Method", "Statistics", "WeightMethod", "WidthMethod", "get_method"]

Granularity = Literal["depth", "width", "sparse"]
Statistics = Mapping[type[Statistic], Tensor]  #: kind of statistic -> its value at one site

METHODS = {
    "minitron-depth": "secateur.methods.minitron_depth:MinitronDepth",
    "minitron-width": "secateur.methods.minitron_width:MinitronWidth",
    "wanda": "secateur.methods.wanda:Wanda",
}


class Method(ABC):
    """What all methods have in common."""

    granularity: ClassVar[Granularity]
    source: ClassVar[str]  #: where the formula stands


class DepthMethod(Method):
    """Scores contiguous runs of layers by what their removal does to the loss."""

    granularity = "depth"

    @abstractmethod
    def score(self, loss_full: float, loss_without: Tensor) -> Tensor:
        """Score each candidate run; the run of the lowest score goes.

        Args:
            loss_full: loss of the whole model, nats per token.
            loss_without: loss with each run removed, [candidates].
        """


class WidthMethod(Method):
    """Scores channels that run through many tensors."""

    granularity = "width"
    needs: ClassVar[Mapping[str, Sequence[type[Statistic]]]]  #: space ("hidden", "ffn") -> statistics at its sites

    @abstractmethod
    def score(self, space: str, sites: Sequence[Statistics]) -> Tensor:
        """Score the channels of ``space`` from the statistics of every site where they are seen: [channels]."""


class WeightMethod(Method):
    """Scores single weights."""

    granularity = "sparse"
    needs: ClassVar[Sequence[type[Statistic]]]  #: statistics of the linear's input
    compare: ClassVar[Literal["row", "linear"]]  #: the group within which scores compete

    @abstractmethod
    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Score each weight: [out, in] -> [out, in]."""


def get_method(name: str) -> Method:
    """Make the method ``name``.

    Raises:
        UserError: if there is none; the nearest name is told.
    """
    if name not in METHODS:
        raise UserError(f"{name!r} is not a known method{did_you_mean(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
