"""Forward hooks that feed the activations at a site of a block to statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.calibration.statistics import Statistic

__all__ = ["Observer", "StopForward"]


class StopForward(Exception):
    """Stops a forward pass once every site has been observed."""


@dataclass
class Observer:
    """Updates statistics with the activations at a site.

    Args:
        statistics: statistics of its activations.
        pending: sites not yet observed in this batch; None if the block runs to its end.
    """

    site: str
    statistics: Sequence[Statistic]
    pending: set[str] | None

    def input(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._update(arguments[0])

    def output(self, _module: nn.Module, _arguments: tuple[Tensor, ...], result: Tensor) -> None:
        self._update(result)

    def _update(self, values: Tensor) -> None:
        for statistic in self.statistics:
            statistic.update(values)
        if self.pending is not None:
            self.pending.discard(self.site)
            if not self.pending:
                raise StopForward
