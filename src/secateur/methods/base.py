"""The base classes of pruning methods.

A method turns statistics, weights and losses into scores; units with high scores stay. It knows no device, hook, ratio
or file: the walk gathers the statistics that it ``needs``, and the selector applies the ratio. Its fields are its
options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from secateur.calibration.place import Place
from secateur.calibration.statistics import Statistic
from secateur.methods.selection import Selector
from secateur.model.families import Granularity
from secateur.model.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ExpertMethod",
    "LayerMethod",
    "LearnedMethod",
    "Method",
    "RemovalMethod",
    "RoutedTokens",
    "Statistics",
    "WeightMethod",
    "WidthMethod",
]

Statistics = Mapping[type[Statistic], "Tensor"]  #: kind of statistic -> its value at one site


class Method(ABC):
    """The base class of all methods."""

    granularity: ClassVar[Granularity]
    source: ClassVar[str]  #: the paper of the formula, e.g. ``arXiv:2306.11695``
    needs: ClassVar[Sequence[type]] = ()  #: kinds of statistics; none if weights suffice
    calibrated: ClassVar[bool] = True  #: whether it needs calibration text
    axes: ClassVar[Sequence[str]] = ()  #: spaces that a width method narrows by default
    scores: ClassVar[Sequence[str]] = ()  #: spaces that a width method can score
    stochastic: ClassVar[bool] = False  #: whether scores come from one random stream, so that none can be skipped

    def config_switches(self, shape: Shape, spaces: Sequence[str]) -> list[str]:
        """The config keys that pruning these spaces to ``shape`` switches on: those of new biases."""
        return []


class LayerMethod(Method):
    """Scores layers one by one; layers with the lowest scores are removed."""

    granularity = "depth"

    @abstractmethod
    def score(self, layer: Place) -> Tensor:
        """Score a layer: a scalar."""


class RemovalMethod(Method):
    """Scores layers, or contiguous runs of layers, by the loss or accuracy without them."""

    granularity = "depth"
    contiguous: ClassVar[bool]  #: whether a candidate is one run of all the layers to remove, or a single layer
    greedy: ClassVar[bool] = False  #: whether single layers go one by one, and the others are scored again each time
    task: str = ""  #: lm-eval task to measure; empty for the calibration loss

    def spared(self, layers: int) -> frozenset[int]:
        """The layers, of ``layers``, that always stay."""
        return frozenset()

    @abstractmethod
    def score(self, full: float, pruned: Tensor) -> Tensor:
        """Score each candidate; the lowest is removed.

        Args:
            full: loss (nats per token) or accuracy of the whole model.
            pruned: the same without each candidate, [candidates].
        """


class WidthMethod(Method):
    """Scores the units of a space: hidden or FFN channels, or KV heads with their query heads."""

    granularity = "width"
    axes: ClassVar[Sequence[str]] = ("kv", "ffn")
    scores: ClassVar[Sequence[str]] = ("hidden", "ffn", "kv")
    sequential: ClassVar[bool] = False  #: whether each block sees the outputs of the pruned blocks before it
    #: whether biases make up for the mean of removed channels; ``auto``: if the family has biases
    bias: Literal["auto", "require", "none"] = "none"

    def config_switches(self, shape: Shape, spaces: Sequence[str]) -> list[str]:
        compensated = [space for space in spaces if space != "hidden"] if self.bias != "none" else []
        keys = {shape.family.bias_switch(shape.family.reader(space)) for space in compensated}
        return sorted(key for key in keys if key)

    @abstractmethod
    def score(self, place: Place) -> Tensor:
        """Score the units: [units]. Scores of hidden channels are summed over several places."""


@dataclass(frozen=True)
class RoutedTokens:
    """What a layer's calibration tokens say of its routed experts, each [experts], float64.

    With ``f_j(x)`` the output of expert j, and ``g_j`` the weight that the model multiplies it by.
    """

    tokens: Tensor  #: number of tokens routed to j
    norms: Tensor  #: sum over them of the L2 norm of f_j(x)
    weighted: Tensor  #: sum over them of g_j times the L2 norm of f_j(x)


class ExpertMethod(Method):
    """Scores the routed experts of a layer; those with the lowest scores are removed, as many in every layer."""

    granularity = "experts"

    @abstractmethod
    def score(self, experts: RoutedTokens) -> Tensor:
        """Score each expert: [experts]."""


class WeightMethod(Method):
    """Scores single weights."""

    granularity = "sparse"
    needs: ClassVar[Sequence[type[Statistic]]] = ()  #: statistics of the linear's input
    compare: ClassVar[Literal["row", "linear"]]  #: the group within which scores compete

    @property
    def updates(self) -> bool:
        """Whether it also changes the weights that stay."""
        return type(self).prune is not WeightMethod.prune

    def group_size(self, out: int, width: int) -> int:
        """Size of the largest group of competing weights in a linear [out, width], without an N:M pattern."""
        return width if self.compare == "row" else out * width

    def prepare(self, stats: Statistics) -> Any:
        """Compute, once for each input, what all linears that read it share.

        Returns:
            The ``stats`` argument of :meth:`score` and :meth:`prune`; by default the statistics themselves.
        """
        return stats

    @abstractmethod
    def score(self, weight: Tensor, stats: Any) -> Tensor:
        """Score each weight: [out, in] -> [out, in].

        Args:
            weight: of a linear; do not change it.
            stats: statistics of its input, as :meth:`prepare` returns them.
        """

    def prune(self, weight: Tensor, stats: Any, select: Selector) -> tuple[Tensor, Tensor]:
        """Prune a linear. A method that also updates the weights that stay overrides this.

        Args:
            weight: [out, in]; do not change it.
            stats: statistics of its input, as :meth:`prepare` returns them.
            select: turns scores [out, in], of all or some columns, into a mask of the weights that stay.

        Returns:
            The pruned weight and its mask, bool, True for weights that stay; both [out, in] and new.
        """
        mask = select(self.score(weight, stats))
        return weight.masked_fill(~mask, 0), mask


class LearnedMethod(Method):
    """Trains a gate on each unit until the number of open gates matches the target shape.

    A subclass defines the distribution of a gate with parameter ``a``, and the penalty on the number of open gates.
    """

    granularity = "depth+width"
    axes: ClassVar[Sequence[str]] = ("hidden", "ffn")
    scores: ClassVar[Sequence[str]] = ("layers", "hidden", "ffn", "kv")
    START: ClassVar[float]  #: initial parameter of every gate
    LIMIT: ClassVar[float]  #: bound on the parameter's absolute value
    steps: int  #: training steps
    windows: int  #: windows in a step
    rate: float  #: peak learning rate of the weights; 0 freezes them
    mask_rate: float  #: peak learning rate of the gates, on the schedule of ``rate``
    multiplier_rate: float  #: peak learning rate of the multipliers, on the same schedule
    phi: float  #: initial quadratic multiplier
    warmup: float  #: share of the steps in which the target falls to the requested shape
    seed: int  #: seed of the gates' noise and of the order of the windows

    def tokens(self, seqlen: int) -> int:
        """Number of training tokens, with windows of ``seqlen`` tokens."""
        return self.steps * self.windows * seqlen

    @abstractmethod
    def sample_gates(self, a: Tensor, u: Tensor) -> Tensor:
        """Sample gates from uniform noise ``u`` in (0, 1), of the same size as ``a``."""

    @abstractmethod
    def eval_gates(self, a: Tensor) -> Tensor:
        """Compute the gates for evaluation, without noise."""

    @abstractmethod
    def open_probability(self, a: Tensor) -> Tensor:
        """The probability that a gate is not zero."""

    @abstractmethod
    def penalty(self, d: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The term added to the loss, a scalar.

        Args:
            d: expected share of open gates minus target share, [constraints].
            linear: multipliers of ``d``, [constraints]; trained to maximise the penalty.
            quadratic: multipliers of ``d^2``, [constraints]; likewise.
        """
