"""Score the FFN channels of routed experts, one expert at a time, on the tokens that the router sends to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.place import Place
from secateur.calibration.routed import ExpertVisits, RoutedExpert
from secateur.methods.base import WidthMethod
from secateur.model.expert_matrices import reads_hidden, weight_matrices
from secateur.pruning.expert_scoring import FEW_TOKENS, report_few_tokens

__all__ = ["ExpertChannels"]


class ExpertChannels:
    """Scores each expert's channels by its own hidden activations: what its down-projection reads.

    The channels of an expert that fewer than :data:`FEW_TOKENS` tokens reach are scored by the L2 norm of the column
    of the down-projection that reads them.
    """

    def __init__(self, method: WidthMethod, walk: BlockWalk) -> None:
        self.method, self.walk = method, walk
        self.visits = ExpertVisits(self._score, hidden=method.needs, least=FEW_TOKENS)
        self._scores: list[Tensor] = []  #: of the present block's experts
        self._tokens: list[int] = []  #: routed to each of them

    def _score(self, block: Block, expert: RoutedExpert) -> None:
        shape, family = self.walk.checkpoint.shape, self.walk.family
        ((rest, axes),) = [item for item in shape.expert_weights(block.index).items() if not reads_hidden(item[1])]
        stored = expert.tensors[family.within_experts(rest)][0].to(self.walk.device, torch.float32)
        (down,) = weight_matrices(stored, axes)
        if self.method.needs and expert.tokens < FEW_TOKENS:
            score = torch.linalg.vector_norm(down, dim=0)
        else:
            place = Place("expert_ffn", shape.expert_ffn, shape, block.index, expert.hidden, down)
            score = self.method.score(place)
        self._scores.append(score.cpu())
        self._tokens.append(expert.tokens)

    def entries(self, layer: int) -> dict[str, Tensor]:
        """Take out the journal entries of the block that was scored last; empty for a block without experts."""
        scores, tokens = self._scores, torch.tensor(self._tokens)
        self._scores, self._tokens = [], []
        return {f"score.expert_ffn.{layer}": torch.stack(scores), f"routed.{layer}": tokens} if scores else {}

    def report(self) -> dict[str, Any]:
        """Describe the tokens of each expert, and list in a line those that few tokens reach."""
        return report_few_tokens(self.walk, FEW_TOKENS, "have their channels chosen by the norm of their weights")
