"""Training data by step: exact tokens, in an order independent of processes and micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import UserError
from secateur.formatting import plural
from secateur.losses.next_token import IGNORE_INDEX
from secateur.losses.top_k import TopK
from secateur.progress import notify
from secateur.training.recipe import Recipe

__all__ = [
    "Batch",
    "Data",
    "Slice",
    "Span",
    "TeacherRows",
    "Tokens",
    "WindowTokens",
    "count_targets",
    "document_names",
    "micro_batches",
    "read_batch",
]

Span = tuple[int, int]  #: the tokens [start, stop) of a split


class Tokens(Protocol):
    """A split of a corpus that can be read by token index."""

    def read(self, split: str, start: int, stop: int) -> NDArray[np.int64]: ...

    def positions(self, split: str, start: int, stop: int) -> NDArray[np.int64]: ...

    def targets(self, split: str, start: int, stop: int) -> NDArray[np.bool_] | None: ...

    def documents_in(self, split: str, start: int, stop: int) -> range: ...

    def document_name(self, split: str, index: int) -> str: ...


@dataclass(frozen=True)
class Batch:
    """Windows of one length; ``positions`` count within documents, for attention within documents."""

    ids: Tensor  #: int64 [windows, positions]
    positions: Tensor | None = None  #: int64 of the same size
    targets: Tensor | None = None  #: int64 [windows, positions - 1]; None for the tokens that follow
    teacher: TopK | None = None  #: a teacher's distribution at all positions but each window's last, [tokens, ...]

    @classmethod
    def empty(cls) -> Batch:
        """A batch without a loss, for a process without windows: it must take part in all collectives."""
        return cls(torch.zeros(1, 2, dtype=torch.int64), None, torch.full((1, 1), IGNORE_INDEX))


class TeacherRows(Protocol):
    """A teacher's saved log-probabilities by window."""

    def read(self, spans: Sequence[Span]) -> TopK: ...

    def empty(self) -> TopK: ...


class Data(Protocol):
    """The training data of a run, step by step: a :class:`Slice` or a mixture."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def tokens(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def spans(self, step: int) -> list[Span]: ...

    def batch(self, spans: Sequence[Span]) -> Batch: ...

    def targets(self, spans: Sequence[Span]) -> int: ...

    def documents(self, spans: Sequence[Span], most: int = 1000) -> list[str]: ...

    def state(self) -> Any:
        """Plain values, saved with a checkpoint, on which the next steps depend besides their number."""

    def restore(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Slice:
    """The tokens ``[start, stop)`` of a corpus's training split, read once each as ``recipe`` says."""

    store: Tokens
    start: int
    stop: int
    recipe: Recipe
    teacher: TeacherRows | None = None  #: a teacher's log-probabilities of these tokens, which each batch gets

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.recipe.steps(self.tokens)

    @cached_property
    def order(self) -> Tensor:
        """The slice's whole windows in the order in which they are read: neighbours in a document end up far apart."""
        generator = torch.Generator().manual_seed(self.recipe.data_seed)
        return torch.randperm(self.tokens // self.recipe.sequence, generator=generator)

    def spans(self, step: int) -> list[Span]:
        """The windows of a step, for all processes; the last window of the slice may be shorter."""
        length = self.recipe.sequence
        each = self.recipe.tokens_per_step // length
        starts = (self.start + self.order[step * each : (step + 1) * each] * length).tolist()
        spans = [(at, at + length) for at in starts]
        rest = self.tokens % length
        if rest and step == self.steps - 1:
            spans.append((self.stop - rest, self.stop))
        return spans

    def batch(self, spans: Sequence[Span]) -> Batch:
        """Read windows of one length; none give the empty batch."""
        batch = read_batch(self.store, self.recipe, spans)
        if self.teacher is None:
            return batch
        return dataclasses.replace(batch, teacher=self.teacher.read(spans) if spans else self.teacher.empty())

    def targets(self, spans: Sequence[Span]) -> int:
        """Number of tokens that windows predict."""
        return count_targets(self.store, spans)

    def report_targets(self) -> None:
        """Print which tokens of chat data the loss is on; nothing where it is on all.

        Raises:
            UserError: if it is on none.
        """
        if self.store.targets("train", self.start, self.start) is None:
            return
        counts = [self.targets(self.spans(step)) for step in range(self.steps)]
        total, empty = sum(counts), counts.count(0)
        if not total:
            raise UserError("`data`: no token of the slice is the assistant's; name other chat data, or a longer slice")
        if empty:
            notify(
                f"chat data: {empty} of {plural(self.steps, 'step')} have no target, and so no loss; a larger "
                "`tokens_per_step` gives each some"
            )
        attention = "attention stays within conversations"
        if self.recipe.attention == "window":
            attention = (
                "conversations in one window read each other (attention=window); set attention=document in `recipe` to "
                "keep them apart"
            )
        notify(
            f"chat data: the loss is on {plural(total, 'target')} of {plural(self.tokens, 'token')}, those of the "
            f"assistant; {attention}"
        )

    def state(self) -> None:
        """None: the windows of a step follow from its number."""

    def restore(self, state: None) -> None:
        """Do nothing."""

    def documents(self, spans: Sequence[Span], most: int = 1000) -> list[str]:
        """The names of the documents that the windows lie in, at most ``most``."""
        return document_names(self.store, spans, most)


class WindowTokens:
    """Windows of ids in memory, end to end, as :class:`Tokens`: each is a document of its own, whatever the split.

    Args:
        ids: int64 [windows, length].
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.length = ids.numpy().reshape(-1), ids.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def read(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """The ids from ``start`` to ``stop``: int64 [stop - start]."""
        self._check(start, stop)
        return self.ids[start:stop].copy()

    def positions(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """The place of each token in its window, or from ``start`` where the window began before."""
        self._check(start, stop)
        at = np.arange(start, stop, dtype=np.int64)
        return at - np.maximum(at // self.length * self.length, start)

    def targets(self, split: str, start: int, stop: int) -> None:
        """None: every token is a target."""

    def documents_in(self, split: str, start: int, stop: int) -> range:
        """The windows that have tokens between ``start`` and ``stop``."""
        self._check(start, stop)
        return range(start // self.length, -(-stop // self.length) if stop > start else start // self.length)

    def document_name(self, split: str, index: int) -> str:
        """E.g. ``window 17``."""
        return f"window {index}"

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"not a slice of {self.tokens} tokens: {start} to {stop}")


def read_batch(store: Tokens, recipe: Recipe, spans: Sequence[Span]) -> Batch:
    """Read windows of one length, with positions where attention stays within documents; none give the empty batch.

    Tokens of chat data that the assistant does not say have no loss.
    """
    if not spans:
        return Batch.empty()
    ids = torch.from_numpy(np.stack([store.read("train", *span) for span in spans]))
    masks = [mask for span in spans if (mask := store.targets("train", *span)) is not None]
    targets = ids[:, 1:].where(torch.from_numpy(np.stack(masks))[:, 1:], IGNORE_INDEX) if masks else None
    if recipe.attention == "window":
        return Batch(ids, None, targets)
    return Batch(ids, torch.from_numpy(np.stack([store.positions("train", *span) for span in spans])), targets)


def count_targets(store: Tokens, spans: Sequence[Span]) -> int:
    """Number of tokens that windows predict: all but each window's first, or those of them that are targets."""
    total = 0
    for start, stop in spans:
        mask = store.targets("train", start, stop)
        total += stop - start - 1 if mask is None else int(mask[1:].sum())
    return total


def document_names(store: Tokens, spans: Sequence[Span], most: int) -> list[str]:
    """The names of the documents that the windows lie in, at most ``most``."""
    indices = {index: None for span in spans for index in store.documents_in("train", *span)}
    return [store.document_name("train", index) for index in list(indices)[:most]]


def micro_batches(spans: Sequence[Span], size: int, *, rank: int, world: int) -> list[list[Span]]:
    """This process's part of a step's windows, at most ``size`` of one length at once.

    Every process gets as many lists, since all compute together; some may be empty. A window of one token predicts
    nothing and is in none.
    """
    shares = [_groups(part, size) for part in _split([s for s in spans if s[1] - s[0] > 1], world)]
    most = max(len(share) for share in shares)
    return shares[rank] + [[]] * (most - len(shares[rank]))


def _split(spans: Sequence[Span], parts: int) -> list[Sequence[Span]]:
    each, more = divmod(len(spans), parts)
    ends = [(i + 1) * each + min(i + 1, more) for i in range(parts)]
    return [spans[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _groups(spans: Sequence[Span], size: int) -> list[list[Span]]:
    groups: list[list[Span]] = []
    for span in spans:
        last = groups[-1] if groups else []
        if last and len(last) < size and last[0][1] - last[0][0] == span[1] - span[0]:
            last.append(span)
        else:
            groups.append([span])
    return groups
