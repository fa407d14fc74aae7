"""Shows what goes through a site of a block to the statistics that are gathered there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.calibration.statistics import Statistic

__all__ = ["Observer", "StopForward"]


class StopForward(Exception):
    """All that is wanted of a batch has been seen; what the block does next is not needed."""


@dataclass
class Observer:
    """Shows a site's activations to its statistics.

    Args:
        site: its name.
        statistics: of its activations.
        pending: sites of this batch that have not been seen yet; None where the block runs to its end.
    """

    site: str
    statistics: Sequence[Statistic]
    pending: set[str] | None

    def input(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._see(arguments[0])

    def output(self, _module: nn.Module, _arguments: tuple[Tensor, ...], result: Tensor) -> None:
        self._see(result)

    def _see(self, values: Tensor) -> None:
        for statistic in self.statistics:
            statistic.update(values)
        if self.pending is not None:
            self.pending.discard(self.site)
            if not self.pending:
                raise StopForward
