"""Random scores: the controls that every method must beat at its granularity."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from secateur.config import spec
from secateur.methods.base import ExpertMethod, LayerMethod, Place, RoutedTokens, Statistics, WeightMethod, WidthMethod

if TYPE_CHECKING:
    from torch import Generator, Tensor

_NO_SOURCE = "a control: uniform random scores"

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Stochastic:
    stochastic: ClassVar[bool] = True
    seed: int

    @cached_property
    def _generator(self) -> Generator:
        import torch

        return torch.Generator().manual_seed(self.seed)

    def _sample(self, *size: int) -> Tensor:
        import torch

        return torch.rand(size, generator=self._generator)


@spec
class RandomDepth(_Stochastic, LayerMethod):
    """Layers at random."""

    source = _NO_SOURCE
    calibrated = False
    seed: Seed = 42

    def score(self, layer: Place) -> Tensor:
        return self._sample(1)[0]


@spec
class RandomWidth(_Stochastic, WidthMethod):
    """Channels and KV heads at random."""

    source = _NO_SOURCE
    calibrated = False
    axes = ("hidden", "ffn")
    scores = (*WidthMethod.scores, "expert_ffn")
    seed: Seed = 42

    def score(self, place: Place) -> Tensor:
        return self._sample(place.units)


@spec
class RandomWeight(_Stochastic, WeightMethod):
    """Weights at random, as many in every row."""

    source = _NO_SOURCE
    calibrated = False
    compare = "row"
    seed: Seed = 42

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        return self._sample(*weight.shape).to(weight)


@spec
class RandomExpert(_Stochastic, ExpertMethod):
    """Experts at random."""

    source = _NO_SOURCE
    calibrated = False
    seed: Seed = 42

    def score(self, experts: RoutedTokens) -> Tensor:
        return self._sample(len(experts.tokens))
