"""Held-out loss of a model in training, its windows shared by all processes."""

from __future__ import annotations

import math

import torch

from secateur import ranks
from secateur.errors import RunError
from secateur.evaluate.loss import Protocol
from secateur.train.batches import Batch
from secateur.train.parallel import Trainee

__all__ = ["held_out_loss"]


@torch.no_grad()
def held_out_loss(trainee: Trainee, protocol: Protocol, batch: int) -> float:
    """The mean loss (nats a predicted token) under a protocol; all processes together.

    Args:
        trainee: it is put into evaluation mode for the time.
        protocol: the windows.
        batch: windows at once in each process.

    Raises:
        RunError: if the loss is not finite.
    """
    trainee.eval()
    sums: list[float] = []
    for part in protocol.windows:
        shares = [range(len(part))[i :: ranks.world()] for i in range(ranks.world())]
        mine = list(shares[ranks.rank()])
        found = torch.zeros(len(part), dtype=torch.float64)
        for start in range(0, len(shares[0]), batch):  # the first process has the most
            chosen = mine[start : start + batch]
            windows = Batch(part[chosen]) if chosen else Batch.empty()
            each = trainee(windows.ids, None, windows.targets)[1]
            found[chosen] = each.double().sum(dim=1)[: len(chosen)].cpu()
        sums += ranks.add(found).tolist()
    trainee.train()
    loss = math.fsum(sums) / protocol.tokens
    if not math.isfinite(loss):
        raise RunError(f"{protocol.source}: the held-out loss is {loss}; lower peak_rate")
    return loss
