"""Routed experts in the block walk: one expert in memory at a time, and what the tokens routed to it say of it.

The router is the model's own; what it hands to the module of experts, :class:`StreamedExperts` takes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.calibration.journal import StateStore
from secateur.calibration.statistics import Statistic

if TYPE_CHECKING:
    from secateur.calibration.block import Block

__all__ = ["ExpertOutputs", "ExpertVisits", "RoutedExpert", "RoutedInputs", "StreamedExperts"]


class ExpertOutputs:
    """Sums over the tokens that a layer routes to each expert, for two halves of the calibration.

    With ``f_j(x)`` the output of expert j, and ``g_j`` the weight that the model multiplies it by::

        tokens[h, j]   = number of tokens routed to j
        norms[h, j]    = sum of the L2 norms of f_j(x)
        weighted[h, j] = sum of g_j times the L2 norm of f_j(x)

    Each is float64 [2, experts]. Even windows are the first half, odd ones the second.
    """

    def __init__(self, experts: int, device: str) -> None:
        self.sums = torch.zeros(3, 2, experts, dtype=torch.float64, device=device)

    def update(self, expert: int, odd: Tensor, weights: Tensor, outputs: Tensor) -> None:
        """Add the tokens of one batch that are routed to an expert.

        Args:
            odd: bool [tokens], whether the token's window is an odd one.
            weights: [tokens].
            outputs: of the expert, [tokens, hidden].
        """
        norms = outputs.float().norm(dim=-1).double()
        for half, members in enumerate((~odd, odd)):
            self.sums[0, half, expert] += members.sum()
            self.sums[1, half, expert] += norms[members].sum()
            self.sums[2, half, expert] += (norms * weights.double())[members].sum()

    def join(self) -> None:
        """Add the sums of the other processes: a collective call."""
        self.sums = distributed.all_reduce(self.sums)


class RoutedInputs:
    """What enters a block's module of experts, batch by batch: states, and the experts that tokens are routed to.

    Args:
        experts: number of experts.
        positions: tokens of a window.
        store: for the states.
    """

    def __init__(self, experts: int, positions: int, store: StateStore) -> None:
        self.experts, self.positions, self.store = experts, positions, store
        self.batches: list[tuple[Tensor, Tensor]] = []  #: states [tokens, hidden], experts [tokens, k]

    def add(self, states: Tensor, index: Tensor) -> None:
        """Add one batch."""
        self.batches.append((self.store.save(states), index.cpu()))

    def counts(self) -> list[int]:
        """Tokens routed to each expert, over all processes: a collective call."""
        counts = torch.zeros(self.experts, dtype=torch.int64)
        for _, index in self.batches:
            counts += index.flatten().bincount(minlength=self.experts)
        return distributed.all_reduce(counts).tolist()

    def tokens(self, expert: int) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
        """The tokens routed to an expert, for each batch, as :meth:`Statistic.update_routed` takes them."""
        for states, index in self.batches:
            tokens = (index == expert).any(dim=1).nonzero()[:, 0]
            yield states[tokens], tokens // self.positions, (len(states) // self.positions, self.positions)


@dataclass
class RoutedExpert:
    """One routed expert of a block, and statistics of the tokens routed to it."""

    expert: int
    tokens: int  #: routed to it, over all processes
    tensors: Mapping[str, Tensor]  #: by their names within the module of experts, as stored: [1, ...]
    input: Mapping[type, Tensor] = field(default_factory=dict)  #: kind of statistic of its inputs -> value
    hidden: Mapping[type, Tensor] = field(default_factory=dict)  #: the same of what its down-projection reads


@dataclass(frozen=True)
class ExpertVisits:
    """What to do with each routed expert of a block, one at a time, before the block itself is yielded.

    Attributes:
        visit: called on the main process.
        input: kinds of statistics of an expert's inputs.
        hidden: kinds of statistics of what its down-projection reads.
        least: tokens below which an expert has no statistics.
    """

    visit: Callable[[Block, RoutedExpert], None]
    input: Sequence[type[Statistic]] = ()
    hidden: Sequence[type[Statistic]] = ()
    least: int = 1


class StreamedExperts(nn.Module):
    """Takes the place of a block's module of experts: reads an expert's weights when tokens are routed to it.

    Args:
        experts: the model's own module, which says how an expert computes; its weights are not used.
        read: number of an expert -> its tensors [1, ...].
        place: puts a tensor on the device, in the type of the walk.
    """

    def __init__(
        self, experts: nn.Module, read: Callable[[int], Mapping[str, Tensor]], place: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self._model_experts: list[Any] = [experts]  # in a list, so that it is no part of the block's state
        self.count = int(experts.num_experts)  # type: ignore[arg-type]
        self.read, self.place = read, place
        self.watch: Callable[[int, Tensor, Tensor, Tensor], None] | None = None  #: expert, tokens, weights, outputs
        self.numbers: Tensor | None = None  #: number in the checkpoint of each expert of a router that was cut
        #: called with what enters the module; returns outputs to hand on, or None where they are to be computed
        self.record: Callable[[Tensor, Tensor], Tensor | None] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts on the tokens routed to them.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: experts of each token, [tokens, k].
            top_k_weights: what their outputs are multiplied by, [tokens, k].
        """
        if self.numbers is not None:
            top_k_index = self.numbers.to(top_k_index.device)[top_k_index]
        if self.record is not None and (outputs := self.record(hidden_states, top_k_index)) is not None:
            return outputs
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, slots = (top_k_index == expert).nonzero(as_tuple=True)
            weights = top_k_weights[tokens, slots]
            outputs = self.outputs(expert, hidden_states[tokens])
            if self.watch is not None:
                self.watch(expert, tokens, weights, outputs)
            total.index_add_(0, tokens, (outputs * weights[:, None]).to(total.dtype))
        return total

    def outputs(self, expert: int, states: Tensor) -> Tensor:
        """The outputs of one expert for states [tokens, hidden]: of the same size, not yet weighted."""
        tensors = self.read(expert)
        return self._project(self.hidden(tensors, states), tensors, "down_proj")

    def hidden(self, tensors: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """What the down-projection of an expert with these tensors reads: [tokens, channels]."""
        return self._model_experts[0]._apply_gate(self._project(states, tensors, "gate_up_proj"))

    def _project(self, x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        (experts,) = self._model_experts
        weight = self.place(tensors[name][0])
        x = x @ (weight if experts.is_transposed else weight.T)
        return x + self.place(tensors[f"{name}_bias"][0]) if experts.has_bias else x
