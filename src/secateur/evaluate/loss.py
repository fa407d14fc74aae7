"""Held-out loss and perplexity, window by window, under a protocol that has a fingerprint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.data.tokenizer import token_hash
from secateur.errors import UserError
from secateur.runtime import pick_batch
from secateur.spec import fingerprint
from secateur.token_loss import model_loss

__all__ = ["Protocol", "evaluate", "token_losses"]


@dataclass(frozen=True)
class Protocol:
    """What a loss is measured on. Losses of different fingerprints are never compared.

    Every window is scored on its own: its first token is context only, so it predicts ``length - 1`` tokens.
    """

    windows: tuple[Tensor, ...]  #: int64 ids, [windows, positions] each; several where the last window is shorter
    source: str

    @classmethod
    def of_stream(cls, ids: np.ndarray, seqlen: int, source: str) -> Protocol:
        """Cut a token stream [tokens] into windows; a shorter tail of two tokens or more counts too.

        Raises:
            UserError: if there are fewer than two tokens.
        """
        if ids.size < 2:
            raise UserError(f"{source}: has fewer than two tokens; there is nothing to predict")
        whole = ids.size // seqlen * seqlen
        parts = [torch.from_numpy(ids[:whole].reshape(-1, seqlen))] if whole else []
        if ids.size - whole >= 2:
            parts.append(torch.from_numpy(ids[whole:].reshape(1, -1)))
        return cls(tuple(parts), source)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(part.shape[0] * (part.shape[1] - 1) for part in self.windows)

    def record(self) -> dict[str, Any]:
        """What identifies the protocol, with its fingerprint."""
        content = {
            "source": self.source,
            "windows": sum(part.shape[0] for part in self.windows),
            "seqlen": self.windows[0].shape[1],
            "tokens": self.tokens,
            "hash": token_hash(np.concatenate([part.numpy().reshape(-1) for part in self.windows])),
        }
        # The same ids under another path are the same measurement.
        return {**content, "fingerprint": fingerprint({k: v for k, v in content.items() if k != "source"})}


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Next-token losses (nats): ids [windows, positions] -> float32 [windows, positions - 1], without gradients."""
    return model_loss(model, ids)[1]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    protocol: Protocol,
    *,
    batch: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: it is put into evaluation mode for the time.
        protocol: the windows.
        batch: windows at once; None for what suits the device.
        advance: told the number of tokens after each batch.

    Returns:
        ``loss`` (nats per predicted token), ``perplexity``, ``tokens``, and ``windows``: each window's mean loss.

    Raises:
        UserError: if the loss is not finite.
    """
    was_training = model.training
    model.eval()
    sums: list[float] = []
    lengths: list[int] = []
    for part in protocol.windows:
        for ids in part.split(batch or pick_batch(part.shape[1], str(model.device))):
            losses = token_losses(model, ids.to(model.device)).double().sum(dim=1)
            sums += losses.tolist()
            lengths += [ids.shape[1] - 1] * ids.shape[0]
            if advance:
                advance(ids.numel())
    model.train(was_training)
    loss = math.fsum(sums) / sum(lengths)
    if not math.isfinite(loss):
        raise UserError(f"{protocol.source}: the loss is {loss}; the model puts out NaN or infinity")
    means: Sequence[float] = [s / n for s, n in zip(sums, lengths, strict=True)]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": sum(lengths), "windows": list(means)}
