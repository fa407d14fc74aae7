"""Prune the weights of routed experts, one expert at a time, each by the tokens that the router sends to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.routed import ExpertVisits, RoutedExpert
from secateur.calibration.statistics import Gram
from secateur.methods.base import WeightMethod
from secateur.methods.selection import Selector
from secateur.model.expert_matrices import reads_hidden, weight_matrices
from secateur.pruning.expert_scoring import FEW_TOKENS, report_few_tokens
from secateur.pruning.matrix_pruning import check_statistics, prune_matrix

__all__ = ["ExpertPruner"]


class ExpertPruner:
    """Prunes each expert's matrices by statistics of its own inputs, and of its own dense hidden activations.

    An expert that too few tokens reach keeps its largest weights instead, of as many in each group as the method
    compares. Too few are fewer than :data:`FEW_TOKENS`, and for a method that reads Gram matrices fewer than an expert
    has inputs or channels, since the matrix is singular then.
    """

    def __init__(self, method: WeightMethod, walk: BlockWalk, select: Selector) -> None:
        self.method, self.walk, self.select = method, walk, select
        self.checkpoint, self.shape, self.family = walk.checkpoint, walk.checkpoint.shape, walk.family
        self.least = FEW_TOKENS
        if Gram in method.needs:
            self.least = max(FEW_TOKENS, self.shape.hidden, self.shape.expert_ffn)
        self.visits = ExpertVisits(self._prune, method.needs, method.needs, self.least)
        self._entries: dict[str, Tensor] = {}  #: of the present block: journal entry -> tensor over all experts

    def _prune(self, block: Block, expert: RoutedExpert) -> None:
        number, magnitude = expert.expert, bool(self.method.needs) and expert.tokens < self.least
        for rest, axes in self.shape.expert_weights(block.index).items():
            name = self.family.block_tensor(block.index, rest)
            weight = expert.tensors[self.family.within_experts(rest)][0].to(self.walk.device, torch.float32, copy=True)
            keep = torch.ones_like(weight, dtype=torch.bool)
            earlier = self.checkpoint.masks[name][number].to(keep.device) if name in self.checkpoint.masks else keep
            stats = expert.input if reads_hidden(axes) else expert.hidden
            check_statistics(stats, name, self.checkpoint.directory)
            shared = None if magnitude else self.method.prepare(stats)
            views = zip(*(weight_matrices(tensor, axes) for tensor in (weight, keep, earlier)), strict=True)
            for matrix, matrix_keep, mask in views:
                select = dataclasses.replace(self.select, mask=None if earlier is keep else mask.clone())
                pruned, stays = prune_matrix(
                    self.method, matrix.contiguous(), shared, select, name, self.checkpoint.directory
                )
                matrix.copy_(pruned)
                matrix_keep.copy_(stays)
            self._collect(f"mask.{name}", number, keep)
            if self.method.updates:
                self._collect(f"weight.{name}", number, weight.to(self.checkpoint.dtype_of(name)))
        self._collect(f"routed.{block.index}", number, torch.tensor(expert.tokens))

    def _collect(self, entry: str, number: int, part: Tensor) -> None:
        """Put an expert's part into a tensor over all experts."""
        if entry not in self._entries:
            self._entries[entry] = part.new_empty((self.shape.experts, *part.shape), device="cpu")
        self._entries[entry][number] = part

    def entries(self, layer: int) -> dict[str, Tensor]:
        """Take out the journal entries of the block that was pruned last; empty for a block without experts."""
        entries, self._entries = self._entries, {}
        for rest in self.shape.expert_weights(layer):
            name = self.family.block_tensor(layer, rest)
            keep = entries[f"mask.{name}"]
            entries[f"zeros.{name}"] = keep.numel() - keep.count_nonzero()
        return entries

    def restore(self, block: Block) -> None:
        """Have a block's experts compute with the pruned weights of the journal."""
        if (experts := block.experts) is not None:
            experts.read = partial(self._read_pruned, block.index)

    def _read_pruned(self, layer: int, number: int) -> Mapping[str, Tensor]:
        tensors = dict(self.walk.read_expert(layer, number))
        for rest in self.shape.expert_weights(layer):
            name, within = self.family.block_tensor(layer, rest), self.family.within_experts(rest)
            if self.method.updates:
                tensors[within] = self.walk.journal[f"weight.{name}"][number : number + 1]
            else:
                tensors[within] = tensors[within] * self.walk.journal[f"mask.{name}"][number : number + 1]
        return tensors

    def report(self) -> dict[str, Any]:
        """Describe the tokens of each expert, and list in a line those that few tokens reach."""
        return report_few_tokens(self.walk, self.least, "are pruned by magnitude")
