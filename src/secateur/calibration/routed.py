"""Routed experts in the block walk: one expert in memory at a time, and what the tokens routed to it say of it.

The router is the model's own; what it hands to the module of experts, :class:`StreamedExperts` takes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur import distributed

__all__ = ["ExpertOutputs", "StreamedExperts"]


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

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts on the tokens routed to them.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: experts of each token, [tokens, k].
            top_k_weights: what their outputs are multiplied by, [tokens, k].
        """
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
        (experts,), tensors = self._model_experts, self.read(expert)

        def project(x: Tensor, name: str) -> Tensor:
            weight = self.place(tensors[name][0])
            x = x @ (weight if experts.is_transposed else weight.T)
            return x + self.place(tensors[f"{name}_bias"][0]) if experts.has_bias else x

        return project(experts._apply_gate(project(states, "gate_up_proj")), "down_proj")
