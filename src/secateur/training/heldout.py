"""Held-out loss of a model in training, over all text or by domain; processes share the windows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from secateur import distributed
from secateur.data.domains import DomainTokens
from secateur.data.shards import TokenStore
from secateur.errors import DivergenceError
from secateur.evaluation.loss import Protocol
from secateur.training.batches import Batch
from secateur.training.parallel import TrainModule

__all__ = ["domain_losses", "domain_protocols", "heldout_loss"]


@torch.no_grad()
def heldout_loss(module: TrainModule, protocol: Protocol, batch: int) -> float:
    """The mean loss (nats a predicted token) under a protocol; all processes together.

    Args:
        module: the model; in training mode afterwards.

    Raises:
        DivergenceError: if the loss is not finite.
    """
    module.eval()
    sums: list[float] = []
    for number, part in enumerate(protocol.windows):
        shares = [range(len(part))[i :: distributed.world_size()] for i in range(distributed.world_size())]
        share = list(shares[distributed.rank()])
        window_losses = torch.zeros(len(part), dtype=torch.float64)
        for start in range(0, len(shares[0]), batch):  # the first process has the most
            rows = share[start : start + batch]
            windows = Batch(*protocol.batch(number, rows)) if rows else Batch.empty()
            each = module(windows.ids, windows.positions, windows.targets)[1]
            window_losses[rows] = each.double().sum(dim=1)[: len(rows)].cpu()
        sums += distributed.all_reduce(window_losses).tolist()
    module.train()
    loss = math.fsum(sums) / protocol.tokens
    if not math.isfinite(loss):
        raise DivergenceError(f"lower peak_rate: the held-out loss is {loss} on {protocol.source}")
    return loss


def domain_losses(module: TrainModule, protocols: Mapping[str, Protocol], batch: int) -> dict[str, float]:
    """The mean loss of each domain (nats a predicted token), as :func:`heldout_loss` gives it; all processes together.

    A domain without a protocol is absent from the result.
    """
    return {name: heldout_loss(module, protocol, batch) for name, protocol in protocols.items()}


def domain_protocols(store: TokenStore, sequence: int, most: int) -> dict[str, Protocol]:
    """The first whole held-out windows of each domain: at most ``most`` of ``sequence`` tokens.

    A domain without a whole window is absent. Without a held-out split the result is empty.
    """
    split = "heldout"
    if split not in store.manifest.splits:
        return {}
    view = DomainTokens(store, split, 0, store.tokens(split), sequence)
    protocols = {}
    for name, (start, stop) in view.ranges.items():
        windows = min(most, (stop - start) // sequence)
        source = f"held-out documents of domain {name}" if name else "held-out documents"
        stop = start + windows * sequence
        mask = view.targets(split, start, stop)
        if mask is not None:
            if mask.reshape(windows, sequence)[:, 1:].any():
                protocols[name] = Protocol.of_stream(view.stream(split, start, stop), sequence, source)
            continue
        ids = torch.from_numpy(view.read(split, start, stop))
        protocols[name] = Protocol((ids.reshape(windows, sequence),), source)
    return protocols
