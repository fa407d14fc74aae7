"""The base classes of pruning methods.

A method turns evidence into scores: higher means worth keeping. It sees neither a device, a hook, a ratio nor a file;
the engine gathers what it ``needs`` and the selector decides how much to keep. The fields of a method are its options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from secateur.calibration.place import Place
from secateur.calibration.statistics import Statistic
from secateur.methods.selection import Selector
from secateur.model.families import Granularity
from secateur.model.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LayerMethod",
    "LearnedMethod",
    "Method",
    "Place",
    "RemovalMethod",
    "Selector",
    "Statistics",
    "WeightMethod",
    "WidthMethod",
]

Statistics = Mapping[type[Statistic], "Tensor"]  #: kind of statistic -> its value at one site


class Method(ABC):
    """What all methods have in common."""

    granularity: ClassVar[Granularity]
    source: ClassVar[str]  #: where the formula stands
    needs: ClassVar[Sequence[type]] = ()  #: kinds of statistics; none where weights are all that is looked at
    calibrated: ClassVar[bool] = True  #: whether it looks at calibration text
    axes: ClassVar[Sequence[str]] = ()  #: spaces that a width method narrows unless told otherwise
    scores: ClassVar[Sequence[str]] = ()  #: spaces that a width method has scores for
    stochastic: ClassVar[bool] = False  #: whether scores are drawn one after the other, so that none can be left out

    def config_switches(self, shape: Shape, spaces: Sequence[str]) -> list[str]:
        """The config keys that pruning these spaces to ``shape`` switches on: those of biases, where it makes any."""
        return []


class LayerMethod(Method):
    """Scores layers one by one; those of the lowest scores go."""

    granularity = "depth"

    @abstractmethod
    def score(self, layer: Place) -> Tensor:
        """Score a layer: a scalar."""


class RemovalMethod(Method):
    """Scores layers, or contiguous runs of them, by what their removal does to the model."""

    granularity = "depth"
    contiguous: ClassVar[bool]  #: whether a candidate is a run of as many layers as are to go, or a single layer
    task: str = ""  #: the task whose accuracy is measured; none: the calibration loss

    @abstractmethod
    def score(self, full: float, without: Tensor) -> Tensor:
        """Score each candidate; the lowest goes.

        Args:
            full: loss (nats per token) or accuracy of the whole model.
            without: the same with each candidate removed, [candidates].
        """


class WidthMethod(Method):
    """Scores the units of a space: hidden or FFN channels, KV heads with the query heads on them."""

    granularity = "width"
    axes: ClassVar[Sequence[str]] = ("kv", "ffn")
    scores: ClassVar[Sequence[str]] = ("hidden", "ffn", "kv")
    sequential: ClassVar[bool] = False  #: whether each block sees the outputs of the already pruned ones
    #: whether the mean of what is removed is put into biases: ``auto`` where the family has them
    bias: Literal["auto", "require", "none"] = "none"

    def config_switches(self, shape: Shape, spaces: Sequence[str]) -> list[str]:
        compensated = [space for space in spaces if space != "hidden"] if self.bias != "none" else []
        keys = {shape.family.bias_switch(shape.family.reader(space)) for space in compensated}
        return sorted(key for key in keys if key)

    @abstractmethod
    def score(self, place: Place) -> Tensor:
        """Score the units: [units]. Hidden channels are seen at several places, and their scores are summed."""


class WeightMethod(Method):
    """Scores single weights."""

    granularity = "sparse"
    needs: ClassVar[Sequence[type[Statistic]]] = ()  #: statistics of the linear's input
    compare: ClassVar[Literal["row", "linear"]]  #: the group within which scores compete

    @property
    def updates(self) -> bool:
        """Whether the weights that stay are changed as well."""
        return type(self).prune is not WeightMethod.prune

    def group_size(self, out: int, width: int) -> int:
        """How many weights of a linear [out, width] make up a group, the largest, where no pattern does."""
        return width if self.compare == "row" else out * width

    def prepare(self, stats: Statistics) -> Any:
        """Work out, once for each input, what all linears that read it share.

        Returns:
            What :meth:`score` and :meth:`prune` are shown as ``stats``: the statistics, unless a method says otherwise.
        """
        return stats

    @abstractmethod
    def score(self, weight: Tensor, stats: Any) -> Tensor:
        """Score each weight: [out, in] -> [out, in].

        Args:
            weight: of a linear; it is left as it is.
            stats: of its input, as :meth:`prepare` returns them.
        """

    def prune(self, weight: Tensor, stats: Any, select: Selector) -> tuple[Tensor, Tensor]:
        """Prune a linear; a method that also updates the weights that stay does so here.

        Args:
            weight: [out, in]; it is left as it is.
            stats: of its input, as :meth:`prepare` returns them.
            select: marks what stays among scores [out, in], or those of some columns.

        Returns:
            The weight that stays, [out, in], and bool of the same size, True where it is kept: new tensors.
        """
        keep = select(self.score(weight, stats))
        return weight.masked_fill(~keep, 0), keep


class LearnedMethod(Method):
    """Learns what to cut by training a gate on each unit, until as many are open as the shape asked for has.

    It says what a gate is, by a parameter ``a`` of its own, and what draws their number to the target.
    """

    granularity = "depth+width"
    axes: ClassVar[Sequence[str]] = ("hidden", "ffn")
    scores: ClassVar[Sequence[str]] = ("layers", "hidden", "ffn", "kv")
    START: ClassVar[float]  #: the parameter of every gate at first
    LIMIT: ClassVar[float]  #: it stays between this and its negative
    steps: int  #: of training
    windows: int  #: that a step reads
    rate: float  #: peak learning rate of the weights; 0 leaves them as they are
    mask_rate: float  #: peak learning rate of the gates; it follows the schedule of the weights' rate
    multiplier_rate: float  #: that of the multipliers, likewise
    phi: float  #: the quadratic multiplier at first
    warmup: float  #: share of the steps in which the target comes down to the shape
    seed: int  #: of the gates' noise and of the order of the windows

    def tokens(self, seqlen: int) -> int:
        """How many tokens it trains on, in windows of ``seqlen``: a part of what the pipeline costs."""
        return self.steps * self.windows * seqlen

    @abstractmethod
    def sample_gates(self, a: Tensor, u: Tensor) -> Tensor:
        """Gates for uniform noise ``u`` in (0, 1), of the same size as ``a``."""

    @abstractmethod
    def eval_gates(self, a: Tensor) -> Tensor:
        """Gates without noise."""

    @abstractmethod
    def open_probability(self, a: Tensor) -> Tensor:
        """The probability that a gate is not zero."""

    @abstractmethod
    def penalty(self, d: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """What is added to the loss, a scalar.

        Args:
            d: the share of open gates expected under each constraint less the share that is to stay, [constraints].
            linear: multipliers, of the same size; they are trained to make the penalty as large as can be.
            quadratic: others.
        """
