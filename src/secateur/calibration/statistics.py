"""Statistics accumulated batch by batch; the order of batches only affects rounding.

There are three kinds: of activations ``x`` [windows, positions, channels] at a site, of the states that enter and
leave a block, and of gradients of the loss with respect to weights. Sums are float32 within a piece of a batch and
float64 over pieces; Gram matrices are float32 throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from secateur import distributed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GradientStatistic",
    "Gram",
    "Mean",
    "MeanCosine",
    "MeanGradient",
    "MeanSquare",
    "MeanSquareGradient",
    "StateStatistic",
    "Statistic",
    "Variance",
    "WindowMagnitude",
    "join",
]


class Statistic(ABC):
    """An accumulator over batches of activations.

    Args:
        width: channels in a unit at this site: the head size for heads, otherwise one.
    """

    def __init__(self, width: int = 1) -> None:
        self.width = width
        self.total: Tensor | None = None
        self.count = 0

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add one batch [windows, positions, channels]."""

    def update_routed(self, x: Tensor, windows: Tensor, size: tuple[int, int]) -> None:
        """Add the tokens of one batch that are routed to an expert.

        Args:
            x: [tokens, channels].
            windows: the number of each token's window within the batch, [tokens].
            size: windows of the batch, and positions of a window.
        """
        self.update(x[None])

    def value(self) -> Tensor:
        """The statistic over all batches so far, float32."""
        assert self.total is not None, "no batch was added"
        return (self.total / self.count).float()

    def join(self, device: str) -> None:
        """Merge with the other processes: a collective call. This process may have had no batch."""
        self.total = distributed.all_reduce(distributed.like_main(self.total, device))
        self.count = distributed.sum_count(self.count)

    def _add(self, total: Tensor, count: int) -> None:
        self.total = total if self.total is None else self.total + total
        self.count += count


def _pieces(x: Tensor, values: int = 2**18) -> Iterator[Tensor]:
    """Split a batch into float32 pieces [tokens, channels] of about ``values`` values, small enough for the cache."""
    for piece in x.flatten(0, -2).split(max(values // x.shape[-1], 1)):
        yield piece.float()


class Mean(Statistic):
    """Mean over all tokens of ``x``, for each channel: [channels]."""

    def update(self, x: Tensor) -> None:
        for tokens in _pieces(x):
            self._add(tokens.sum(dim=0).double(), len(tokens))


class MeanSquare(Statistic):
    """Mean over all tokens of ``x^2``, for each channel: [channels]."""

    def update(self, x: Tensor) -> None:
        for tokens in _pieces(x):
            self._add(tokens.square().sum(dim=0).double(), len(tokens))


class Variance(Statistic):
    """Variance over all N tokens, with ``1/(N-1)``, for each channel: [channels].

    Pieces of batches are merged by their means and squared deviations (Chan et al., 1979), which does not cancel.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__(width)
        self.mean: Tensor | float = 0.0

    def update(self, x: Tensor) -> None:
        for tokens in _pieces(x):
            reference = tokens[0]  # differences from one token are exact even if the mean is large
            difference = tokens - reference
            count, mean = len(tokens), difference.mean(dim=0)
            shift = reference.double() + mean - self.mean
            between = shift.square() * (self.count * count / (self.count + count))
            self.mean = self.mean + shift * (count / (self.count + count))
            self._add(difference.sub_(mean).square_().sum(dim=0).double() + between, count)

    def value(self) -> Tensor:
        assert self.total is not None, "no batch was added"
        return (self.total / max(self.count - 1, 1)).float()

    def join(self, device: str) -> None:
        import torch

        count = self.count
        super().join(device)  # squared deviations within each process; those between processes follow
        assert self.total is not None
        mean = self.mean + torch.zeros_like(self.total)
        self.mean = distributed.all_reduce(mean * count) / self.count
        self.total += distributed.all_reduce((mean - self.mean).square() * count)


class Gram(Statistic):
    """Mean over all tokens of ``x x^T``: [channels, channels].

    One matrix holds the mean so far, and only the tiles on and above its diagonal are computed until :meth:`value`.
    """

    tile = 512  #: rows updated at once
    tokens = 512  #: tokens added at once, which bounds the float32 copy

    def update(self, x: Tensor) -> None:
        import torch

        if self.total is None:
            self.total = x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float32)
        for piece in x.flatten(0, -2).split(self.tokens) if x.numel() else ():
            tokens = piece.float()
            before, self.count = self.count, self.count + len(tokens)
            for rows in self._rows():
                self.total[rows, rows.start :].addmm_(
                    tokens[:, rows].T, tokens[:, rows.start :], beta=before / self.count, alpha=1 / self.count
                )

    def value(self) -> Tensor:
        """The statistic over all batches so far, float32: the matrix itself, which a later batch would change."""
        assert self.total is not None, "no batch was added"
        for rows in self._rows():
            tile = self.total[rows, rows]
            tile.copy_(tile.triu() + tile.triu(1).T)
            self.total[rows.stop :, rows] = self.total[rows, rows.stop :].T
        return self.total

    def join(self, device: str) -> None:
        count, self.count = self.count, distributed.sum_count(self.count)
        self.total = distributed.all_reduce(distributed.like_main(self.total, device).mul_(count / self.count))

    def _rows(self) -> list[slice]:
        assert self.total is not None
        return [slice(first, first + self.tile) for first in range(0, len(self.total), self.tile)]


class WindowMagnitude(Statistic):
    """Aggregates of a unit's L2 norm, ``|x|`` for a channel: [2, 2, units], indexed by batch and sequence.

    Each window is aggregated over its positions (sequence), and the results over windows (batch); in both, index 0 is
    the mean and 1 the L2 norm, the root of the sum of squares. All windows must have the same length.
    """

    def update(self, x: Tensor) -> None:
        import torch

        for window in x:  # one by one, to bound the memory of the float32 copy
            norms = torch.linalg.vector_norm(window.float().unflatten(-1, (-1, self.width)), dim=-1)
            self._add_window(norms.mean(dim=0), norms)

    def update_routed(self, x: Tensor, windows: Tensor, size: tuple[int, int]) -> None:
        """Add the tokens of one batch that are routed to an expert; positions of others count as zero."""
        for window in range(size[0]):
            norms = x[windows == window].float().abs()
            self._add_window(norms.sum(dim=0) / size[1], norms)

    def _add_window(self, mean: Tensor, norms: Tensor) -> None:
        """Add one window: the mean of its norms over positions [units], and the norms [positions, units]."""
        import torch

        magnitudes = torch.stack([mean, torch.linalg.vector_norm(norms, dim=0)]).double()
        self._add(torch.stack([magnitudes, magnitudes.square()]), 1)

    def value(self) -> Tensor:
        import torch

        assert self.total is not None, "no batch was added"
        return torch.stack([self.total[0] / self.count, self.total[1].sqrt()]).float()


class StateStatistic(ABC):
    """An accumulator over the hidden states before and after a block."""

    @abstractmethod
    def update(self, before: Tensor, after: Tensor) -> None:
        """Add one batch, both [windows, positions, hidden]."""

    @abstractmethod
    def value(self) -> Tensor:
        """The statistic over all batches so far."""

    @abstractmethod
    def join(self, device: str) -> None:
        """Merge with the other processes: a collective call. This process may have had no batch."""


class MeanCosine(StateStatistic):
    """Mean over all tokens of the cosine between a state before and after the block: a scalar.

    The sum is of one minus the cosine, from the change ``d = g - h`` of the state:
    ``(d.d - (d.(g + h) / (|g| + |h|))^2) / (2 |g| |h|)``. If a block changes little, the cosine itself would round
    to 1.
    """

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def update(self, before: Tensor, after: Tensor) -> None:
        import torch

        for h, g in zip(_pieces(before), _pieces(after), strict=True):
            change = g - h
            norms = [torch.linalg.vector_norm(v, dim=-1).double() for v in (h, g)]
            norm_change = torch.linalg.vecdot(change, g + h).double() / sum(norms)
            square = torch.linalg.vecdot(change, change).double() - norm_change.square()
            self.total += float((square / (2 * norms[0] * norms[1])).sum())
            self.tokens += len(h)

    def value(self) -> Tensor:
        import torch

        return 1 - torch.tensor(self.total / self.tokens, dtype=torch.float64)

    def join(self, device: str) -> None:
        import torch

        self.total = float(distributed.all_reduce(torch.tensor([self.total], dtype=torch.float64)))
        self.tokens = distributed.sum_count(self.tokens)


class GradientStatistic(ABC):
    """An accumulator over windows of the gradient of a window's mean loss with respect to one tensor."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.windows = 0

    def update(self, gradient: Tensor) -> None:
        """Add one window's gradient."""
        term = self.term(gradient)
        self.total = term if self.total is None else self.total.add_(term)
        self.windows += 1

    @abstractmethod
    def term(self, gradient: Tensor) -> Tensor:
        """The term that a window adds to the mean: a new tensor."""

    def value(self) -> Tensor:
        """The mean over all windows, of the tensor's size. It overwrites the sum: add no window afterwards."""
        assert self.total is not None, "no window was added"
        self.total.div_(self.windows)
        self.windows = 1
        return self.total

    def join(self, device: str) -> None:
        """Merge with the other processes: a collective call. This process may have had no batch."""
        self.total = distributed.all_reduce(distributed.like_main(self.total, device))
        self.windows = distributed.sum_count(self.windows)


class MeanGradient(GradientStatistic):
    """The gradient of the calibration loss, ``dL/dW``."""

    def term(self, gradient: Tensor) -> Tensor:
        return gradient.clone()


class MeanSquareGradient(GradientStatistic):
    """Mean square of the windows' gradients: the empirical Fisher diagonal, which approximates the Hessian's."""

    def term(self, gradient: Tensor) -> Tensor:
        return gradient.square()


def join(statistics: Iterable[Statistic | StateStatistic | GradientStatistic], device: str) -> None:
    """Merge each statistic over all processes; a single process changes nothing, to the last bit."""
    for statistic in statistics if distributed.world_size() > 1 else ():
        statistic.join(device)
