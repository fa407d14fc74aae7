"""The loss of the model without each contiguous run of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur import distributed
from secateur.calibration.block import States
from secateur.calibration.block_walk import BlockWalk
from secateur.formatting import plural

__all__ = ["GROUP_BYTES", "removal_losses"]

GROUP_BYTES = 2**29  #: memory for the states of all candidates


def removal_losses(walk: BlockWalk, length: int, removed: Sequence[int] = ()) -> tuple[float, list[float]]:
    """The loss with each contiguous run of ``length`` blocks bypassed.

    The states before a run are those of the full model, so candidate ``i`` only runs the blocks after it. Windows are
    processed in groups, so that the states of all candidates fit into memory. The journal has a step for each group,
    behind those of the calls with fewer ``removed``.

    Args:
        removed: blocks that are bypassed in every candidate and in the full model; only with runs of one block.

    Returns:
        The full model's loss (nats per token), and each candidate's, by the index of the first block removed; of a
        block in ``removed`` the full model's.
    """
    candidates = len(walk.layers) - length + 1
    width = walk.checkpoint.shape.hidden * walk.dtype.itemsize
    group_size = max(1, GROUP_BYTES // ((candidates + 1) * walk.main_batches[0].numel() * width))
    starts = range(0, len(walk.main_batches), group_size)  # as many groups in each process
    groups = [walk.batches[start : start + group_size] for start in starts]
    before = len(removed) * len(groups)
    for step, group in enumerate(groups, start=before):
        if step >= walk.journal.finished_steps:
            part = f", without {plural(len(removed), 'layer')}" if removed else ""
            part += f", part {step - before + 1} of {len(groups)}" if len(groups) > 1 else ""
            share = _removal_losses(walk, length, group, frozenset(removed), part)
            for losses in walk.yield_on_main(step, distributed.all_reduce(share)):
                walk.journal.put(step, {f"losses.{step}": losses})
            walk.journal.finish(step)
    total = torch.stack([walk.journal[f"losses.{before + n}"] for n in range(len(groups))]).sum(dim=0)
    full, *without = (total / walk.targets).tolist()
    return full, without


def _removal_losses(
    walk: BlockWalk, length: int, batches: Sequence[Tensor], removed: frozenset[int], part: str
) -> Tensor:
    """Losses summed over some windows, float64 [1 + candidates]: the full model, then with each run bypassed."""
    full = walk.start(batches)
    candidates: dict[int, States] = {}  # first bypassed block -> states so far
    last = len(walk.layers) - length
    for block in walk.blocks(part=part):
        if block.index in removed:
            continue
        if block.index <= last:
            candidates[block.index] = full
        full = block.run(full)
        keys = sum(source.channels for source in walk.key_sources if source.layer == block.index)
        for first in candidates:
            if block.index >= first + length:
                candidates[first] = block.run(candidates[first], consume=True)
            elif keys:  # later blocks read them, so this layer is never removed; its figure leaves them as they were
                pairs = zip(candidates[first], full, strict=True)
                candidates[first] = [walk.store.save(torch.cat([s, f[..., -keys:].to(s)], -1)) for s, f in pairs]
    ends = [full, *(candidates.get(first, full) for first in range(last + 1))]
    losses = walk.head().losses(batches, ends)
    return torch.tensor(losses, dtype=torch.float64)
