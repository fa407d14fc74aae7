"""Held-out loss and perplexity of every token, under a protocol with a fingerprint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from secateur import distributed
from secateur.config import fingerprint
from secateur.data.tokenizer import Stream, token_hash
from secateur.errors import UserError
from secateur.evaluation.results import Measurement
from secateur.formatting import plural
from secateur.losses.next_token import IGNORE_INDEX, model_loss
from secateur.runtime import pick_batch

__all__ = ["Losses", "Protocol", "measure_loss", "token_losses", "window_losses"]


@dataclass(frozen=True)
class Protocol:
    """The windows that a loss is measured on. Losses of different fingerprints are never compared.

    Every window is read on its own. Its first tokens are context only: one token, or, where windows overlap, those that
    the window before predicts. Of chat data the loss is on targets alone, and attention stays within conversations.
    """

    windows: tuple[Tensor, ...]  #: int64 ids, [windows, positions] each; several parts if sizes or contexts differ
    source: str
    contexts: tuple[int, ...] = ()  #: tokens of context in the windows of each part; empty for one token everywhere
    documents: tuple[
        Tensor, ...
    ] = ()  #: document number of each token, shaped like ``windows``; empty where documents are not known
    domains: tuple[str, ...] = ()  #: of each document, by its number
    targets: tuple[
        Tensor, ...
    ] = ()  #: bool, whether each token is predicted, shaped like ``windows``, false in contexts; empty where all are
    name: str = ""  #: of a named protocol, e.g. ``heldout/c4``
    split: str | None = None  #: of the dataset
    stride: int | None = None  #: tokens from the start of a window to that of the next; None for the window's length
    bos: bool | None = None  #: whether the tokenizer begins a text with BOS; None for ids from elsewhere
    note: str | None = None  #: warning for readers of the figure

    @classmethod
    def of_stream(
        cls,
        stream: Stream | NDArray[np.integer],
        seqlen: int,
        source: str,
        *,
        stride: int | None = None,
        whole: bool = False,
        **fields: Any,
    ) -> Protocol:
        """Cut a token stream [tokens] into windows.

        Args:
            stream: the ids with their documents, or the ids alone where documents are not known.
            seqlen: tokens in a window; a shorter last window counts too if it has a token to predict.
            stride: tokens from window to window; None for ``seqlen``. With a shorter stride windows overlap, and every
                token but the first is predicted once.
            whole: leave out a shorter last window.

        Raises:
            UserError: if there are fewer than two tokens, or, with ``whole``, no whole window; or if none is a target.
        """
        ids = stream.ids if isinstance(stream, Stream) else stream
        if ids.size < 2:
            raise UserError(f"{source}: has fewer than two tokens; there is nothing to predict")
        if whole and ids.size < seqlen:
            raise UserError(f"{source}: {plural(ids.size, 'token')}, less than a window of {seqlen:,}; use more text")
        step = stride or seqlen
        if not 1 <= step <= seqlen:
            raise UserError(
                f"a stride of {step} leaves tokens out between windows of {seqlen}; make it {seqlen} or less"
            )
        overlap = max(1, seqlen - step)
        starts = np.arange(0, max(ids.size - seqlen, -1) + 1, step)
        last = len(starts) * step  # start of the shorter window
        groups = [(starts[:1], 1, seqlen), (starts[1:], overlap, seqlen)] if overlap > 1 else [(starts, 1, seqlen)]
        tail = int(ids.size) - last
        if not whole and tail > (overlap if last else 1):
            groups.append((np.array([last]), overlap if last else 1, tail))
        groups = [group for group in groups if len(group[0])]

        def cut(tokens: np.ndarray) -> tuple[Tensor, ...]:
            return tuple(torch.from_numpy(tokens[at[:, None] + np.arange(size)]) for at, _, size in groups)

        fields = {"stride": step if step < seqlen and len(groups) > 1 else None, **fields}
        if overlap > 1:
            fields["contexts"] = tuple(context for _, context, _ in groups)
        if isinstance(stream, Stream):
            fields |= {"documents": cut(stream.documents), "domains": stream.domains}
        if isinstance(stream, Stream) and stream.targets is not None:
            fields["targets"] = cut(stream.targets)
            for mask, (_, context, _) in zip(fields["targets"], groups, strict=True):
                mask[:, :context] = False
            if not any(mask.any() for mask in fields["targets"]):
                raise UserError(
                    f"{source}: no token of these windows is the assistant's; there is nothing to predict: use more "
                    "windows, or other chat data"
                )
        return cls(cut(ids), source, **fields)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        if self.targets:
            return sum(int(mask.sum()) for mask in self.targets)
        return sum(part.shape[0] * (part.shape[1] - context) for part, context in self.parts())

    def parts(self) -> list[tuple[Tensor, int]]:
        """Windows of one size, [windows, positions], each part with its number of context tokens in a window."""
        return list(zip(self.windows, self.contexts or (1,) * len(self.windows), strict=True))

    def batch(self, number: int, rows: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Windows of a part by their rows, as the model reads them.

        Returns:
            ids [windows, positions]; the place of each token in its conversation, of the same size, and the targets
            [windows, positions - 1] with ``IGNORE_INDEX`` where there is none, both None where all tokens are targets.
        """
        ids = self.windows[number][rows]
        if not self.targets:
            return ids, None, None
        targets = ids[:, 1:].where(self.targets[number][rows][:, 1:], IGNORE_INDEX)
        return ids, _places(self.documents[number][rows]), targets

    def record(self) -> dict[str, Any]:
        """The identity of the protocol, its fingerprint and its descriptions."""
        content: dict[str, Any] = {
            "source": self.source,
            "windows": sum(part.shape[0] for part in self.windows),
            "seqlen": self.windows[0].shape[1],
            "tokens": self.tokens,
            "hash": token_hash(np.concatenate([part.numpy().reshape(-1) for part in self.windows])),
        }
        if self.stride is not None:
            content["stride"] = self.stride
        if self.targets:
            places = [_places(part).numpy().reshape(-1) for part in self.documents]
            content["targets"] = token_hash(np.concatenate([mask.numpy().reshape(-1) for mask in self.targets]))
            content["places"] = token_hash(np.concatenate(places))
        # The same ids under another path are the same measurement.
        identity = fingerprint({k: v for k, v in content.items() if k != "source"})
        descriptions = {"name": self.name or None, "split": self.split, "bos": self.bos, "note": self.note}
        return {**{k: v for k, v in descriptions.items() if v is not None}, **content, "fingerprint": identity}


def _places(documents: Tensor) -> Tensor:
    """The place of each token in its document, or in the window where that began before: int64 [windows, positions].

    Args:
        documents: number of each token's document, of the same size.
    """
    at = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - at.where(begins, 0).cummax(dim=1).values


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None, targets: Tensor | None = None
) -> Tensor:
    """Next-token losses (nats): ids [windows, positions] -> float32 [windows, positions - 1], without gradients.

    For ``positions`` and ``targets`` see :func:`secateur.losses.next_token.model_loss`.
    """
    return model_loss(model, ids, position_ids=positions, targets=targets)[1]


@dataclass(frozen=True)
class Losses:
    """The loss of every predicted token under a protocol."""

    protocol: Protocol
    #: float32 [windows, positions - 1] for each part; those of context tokens do not count, and others that are no
    #: targets are zero
    losses: tuple[Tensor, ...]

    def windows(self) -> list[tuple[int, float]]:
        """The number of predicted tokens and their summed loss (nats) of each window."""
        return [
            (count, total)
            for (part, context), losses, mask in zip(self.protocol.parts(), self.losses, self._masks(), strict=True)
            for count, total in zip(
                [part.shape[1] - context] * len(part) if mask is None else mask.sum(dim=1).tolist(),
                losses[:, context - 1 :].double().sum(dim=1).tolist(),
                strict=True,
            )
        ]

    def _masks(self) -> Sequence[Tensor | None]:
        """The targets of each part; None where all tokens are."""
        return self.protocol.targets or (None,) * len(self.losses)

    def documents(self) -> dict[int, tuple[int, float]]:
        """The number of predicted tokens and their summed loss (nats) of each document with any, by its number.

        A token belongs to its own document, even where the tokens before it in the window are another's. Empty where
        documents are not known.
        """
        if not self.protocol.documents:
            return {}
        width = len(self.protocol.domains)
        counts, sums = np.zeros(width, dtype=np.int64), np.zeros(width)
        parts = zip(self.protocol.parts(), self.losses, self.protocol.documents, self._masks(), strict=True)
        for (_, context), losses, documents, mask in parts:
            numbers = documents[:, context:].numpy().reshape(-1)
            predicted = numbers if mask is None else numbers[mask[:, context:].numpy().reshape(-1)]
            counts += np.bincount(predicted, minlength=width)
            sums += np.bincount(numbers, losses[:, context - 1 :].double().numpy().reshape(-1), minlength=width)
        return {n: (int(counts[n]), float(sums[n])) for n in np.flatnonzero(counts).tolist()}

    def domains(self) -> list[dict[str, Any]]:
        """The mean loss of each domain; empty for a single domain."""
        totals: dict[str, tuple[int, float]] = {}
        for number, (count, total) in self.documents().items():
            domain = self.protocol.domains[number]
            tokens, loss = totals.get(domain, (0, 0.0))
            totals[domain] = tokens + count, loss + total
        if len(totals) < 2:
            return []
        return [{"domain": d, "tokens": n, "loss": total / n} for d, (n, total) in sorted(totals.items())]

    def positions(self) -> list[dict[str, Any]]:
        """The mean loss by the number of tokens before the predicted one in its window: 1, 2 to 3, 4 to 7 and so on."""
        width = max(part.shape[1] for part in self.protocol.windows)
        sums, counts = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.int64)
        for (part, context), losses, mask in zip(self.protocol.parts(), self.losses, self._masks(), strict=True):
            sums[context : part.shape[1]] += losses[:, context - 1 :].double().sum(dim=0)
            counts[context : part.shape[1]] += part.shape[0] if mask is None else mask[:, context:].sum(dim=0)
        buckets, start = [], 1
        while start < width:
            stop = min(2 * start, width)
            count = int(counts[start:stop].sum())
            if count:
                mean = float(sums[start:stop].sum()) / count
                buckets.append({"from": start, "to": stop - 1, "tokens": count, "loss": mean})
            start = stop
        return buckets

    def mean(self) -> float:
        """The mean over all predicted tokens (nats).

        Raises:
            UserError: if it is not finite.
        """
        windows = self.windows()
        loss = math.fsum(total for _, total in windows) / sum(count for count, _ in windows)
        if not math.isfinite(loss):
            raise UserError(f"{self.protocol.source}: the loss is {loss}; the model's outputs are NaN or infinite")
        return loss

    def summary(self) -> dict[str, Any]:
        """``loss`` (nats per predicted token), ``perplexity``, ``tokens``, and the loss by window and by document.

        ``windows`` is each window's mean loss; of chat data windows without targets are left out, and
        ``window_tokens`` has the number of targets of the others. ``documents`` is three lists of one length: each
        document's ``number`` in the protocol, its predicted ``tokens`` and their summed loss ``loss_sum`` (nats); empty
        where documents are not known.

        Raises:
            UserError: if the loss is not finite.
        """
        loss, windows = self.mean(), [window for window in self.windows() if window[0]]
        documents = self.documents()
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "tokens": self.protocol.tokens,
            "windows": [total / count for count, total in windows],
            **({"window_tokens": [count for count, _ in windows]} if self.protocol.targets else {}),
            "documents": {
                "number": list(documents),
                "tokens": [count for count, _ in documents.values()],
                "loss_sum": [total for _, total in documents.values()],
            },
        }


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    protocol: Protocol,
    *,
    batch: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Losses:
    """Measure the loss of every token; several processes share the windows, and all return the same.

    Args:
        model: in any mode; it is measured in evaluation mode.
        batch: windows at once; None for what suits the device.
        advance: called with the number of tokens after each batch.
    """
    was_training = model.training
    model.eval()
    parts = []
    for number, part in enumerate(protocol.windows):
        losses = torch.zeros(part.shape[0], part.shape[1] - 1)
        batches = torch.arange(part.shape[0]).split(batch or pick_batch(part.shape[1], str(model.device)))
        for rows in batches[distributed.rank() :: distributed.world_size()]:
            inputs = [None if value is None else value.to(model.device) for value in protocol.batch(number, rows)]
            losses[rows] = token_losses(model, *inputs).float().cpu()  # type: ignore[arg-type]
            if advance:
                advance(part[rows].numel() * distributed.world_size())
        parts.append(distributed.all_reduce(losses))
    model.train(was_training)
    return Losses(protocol, tuple(parts))


def measure_loss(losses: Losses, name: str) -> Measurement:
    """Make a measurement of losses: mean, perplexity, means by position and domain, items by document or window.

    Raises:
        UserError: if the loss is not finite.
    """
    loss = losses.mean()
    documents = losses.documents()
    parts = documents or {number: window for number, window in enumerate(losses.windows()) if window[0]}
    items: list[dict[str, Any]] = [{"value": total / count, "tokens": count} for count, total in parts.values()]
    details: dict[str, Any] = {"perplexity": perplexity(loss), "tokens": losses.protocol.tokens}
    details |= {"by_position": losses.positions()}
    if domains := losses.domains():
        details["by_domain"] = domains
        for number, item in zip(parts, items, strict=True):
            item["domain"] = losses.protocol.domains[number]
    unit = "documents" if documents else "windows"
    return Measurement(name, "loss", loss, losses.protocol.record(), unit, items, details)


def perplexity(loss: float) -> float:
    """The exponential of a loss (nats), bounded so that it stays finite."""
    return math.exp(min(loss, 700))
