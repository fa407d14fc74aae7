"""Models spliced from levels that were pruned once, and their divergence from the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.lm_head import LMHead

__all__ = ["SplicedModels"]


class SplicedModels:
    """Candidates, each with a level for every linear; a block is loaded once for all candidates.

    Args:
        walk: over the dense model; its windows are those of the search.
        levels: entries ``level.NAME.LEVEL``: masks, or weights for methods that change them.
        updates: whether ``levels`` holds weights.
        names: of the linears, in the order of the candidates' levels.
    """

    def __init__(self, walk: BlockWalk, levels: Mapping[str, Tensor], updates: bool, names: Sequence[str]) -> None:
        self.walk, self.levels, self.updates = walk, levels, updates
        self.positions = {name: i for i, name in enumerate(names)}
        self.windows = torch.cat(walk.batches)
        self.batch = len(walk.batches[0])
        self._dense = torch.cat(self._last_states([None], walk.batches)[0])

    def divergences(self, candidates: Sequence[Sequence[int]], windows: Sequence[int]) -> list[float]:
        """The mean over tokens of ``KL(dense, spliced)`` of each candidate, in nats."""
        ids = list(self.windows[list(windows)].split(self.batch))
        dense = self._dense[list(windows)]
        sets = self._last_states(candidates, ids)
        head = self.walk.head()
        return [_divergence(head, dense, torch.cat(states)) for states in sets]

    def _last_states(self, candidates: Sequence[Sequence[int] | None], ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """The states that leave the last block of each candidate; None is the dense model."""
        start = self.walk.start(ids)
        sets = [list(start) for _ in candidates]
        for index in range(len(self.walk.layers)):
            with self.walk.block(index) as block:
                weights = {linear: block.weight(linear) for linear, _ in self._linears(block)}
                for number, candidate in enumerate(candidates):
                    if candidate is not None:
                        self._splice(block, weights, candidate)
                    sets[number] = block.run(sets[number])
        return sets

    def _linears(self, block: Block) -> Iterator[tuple[str, str]]:
        for linear in self.walk.checkpoint.shape.matrices(block.index):
            yield linear, self.walk.family.block_tensor(block.index, linear)

    def _splice(self, block: Block, weights: Mapping[str, Tensor], candidate: Sequence[int]) -> None:
        for linear, name in self._linears(block):
            level = self.levels[f"level.{name}.{candidate[self.positions[name]]}"].to(self.walk.device)
            block.set_weight(linear, level if self.updates else weights[linear] * level)


def _divergence(head: LMHead, dense: Tensor, spliced: Tensor) -> float:
    """KL from the last states [windows, positions, hidden], in one pass over the vocabulary.

    With logits z of the dense model and y of the spliced one, ``KL = sum_i p_i (z_i - y_i) - log Z_z + log Z_y``.
    """
    windows, tokens = list(zip(dense, spliced, strict=True)), dense.shape[1] - 1
    size = (len(windows), tokens)
    top, scale, excess, partition = (
        torch.full(size, -torch.inf, device=head.device),
        torch.zeros(size, device=head.device),
        torch.zeros(size, device=head.device),
        torch.full(size, -torch.inf, device=head.device),
    )
    for _, rows in head.chunks():
        for i, (a, b) in enumerate(windows):
            with torch.no_grad():
                z, y = head.logits(a, rows), head.logits(b, rows)
            highest = torch.maximum(top[i], z.amax(dim=1))
            shrink, share = (top[i] - highest).exp(), (z - highest[:, None]).exp()
            scale[i] = scale[i] * shrink + share.sum(dim=1)
            excess[i] = excess[i] * shrink + (share * (z - y)).sum(dim=1)
            partition[i] = torch.logaddexp(partition[i], y.logsumexp(dim=1))
            top[i] = highest
    return float((excess / scale - top - scale.log() + partition).double().mean())
