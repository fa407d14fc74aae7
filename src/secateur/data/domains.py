"""A slice of a corpus with its documents and their domains: in order, or one domain after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secateur.data.shards import TokenStore
from secateur.data.tokenizer import Stream

__all__ = ["DomainTokens", "document_stream", "evenly_spaced", "heldout_stream", "window_stream"]


def document_stream(store: TokenStore, split: str, start: int, stop: int) -> Stream:
    """The tokens ``[start, stop)`` of a split, in order, with the document of each and the domain of each document.

    Raises:
        UserError: if the split has fewer than ``stop`` tokens, or a document's domain has no name.
    """
    within = store.documents_in(split, start, stop)
    lengths = np.diff(np.maximum(store.offsets(split, within), start), append=stop)
    domains = store.domains or ("",)
    names = tuple(domains[domain] for domain in store.domains_of(split, within).tolist())
    return Stream(store.read(split, start, stop), np.repeat(np.arange(len(names)), lengths), names)


def evenly_spaced(count: int, of: int) -> NDArray[np.int64]:
    """``count`` of the numbers below ``of``, evenly apart, from 0 on; all of them where there are no more.

    >>> spread(3, 10).tolist()
    [0, 3, 6]
    """
    return np.arange(min(count, of), dtype=np.int64) * of // max(1, min(count, of))


def window_stream(store: TokenStore, split: str, windows: NDArray[np.integer], length: int) -> Stream:
    """The windows of those numbers, ``length`` tokens each and one behind the other, with their documents.

    Raises:
        UserError: if the split ends before one of them does, or a document's domain has no name.
    """
    parts = [document_stream(store, split, int(i) * length, (int(i) + 1) * length) for i in windows]
    known = [store.documents_in(split, int(i) * length, (int(i) + 1) * length).start for i in windows]
    numbers = np.concatenate([part.documents + first for part, first in zip(parts, known, strict=True)])
    kept, documents = np.unique(numbers, return_inverse=True)
    domains = {first + n: name for part, first in zip(parts, known, strict=True) for n, name in enumerate(part.domains)}
    return Stream(np.concatenate([part.ids for part in parts]), documents, tuple(domains[n] for n in kept.tolist()))


def heldout_stream(store: TokenStore, windows: int, length: int, skip: int = 0) -> Stream:
    """Held-out windows, spread evenly over the split, so that no few long documents stand for all.

    Args:
        store: the corpus.
        windows: how many; the whole split, with a shorter last one, where it has no more.
        length: tokens in a window.
        skip: of those that as many windows by themselves would be, none is taken.
    """
    split, there = "heldout", store.tokens("heldout")
    left = np.setdiff1d(np.arange(there // length), evenly_spaced(skip, there // length) if skip else [])
    if not skip and len(left) <= windows:
        return document_stream(store, split, 0, there)
    if not len(left):
        return document_stream(store, split, 0, 0)
    return window_stream(store, split, left[evenly_spaced(windows, len(left))], length)


class DomainTokens:
    """The tokens ``[start, stop)`` of a split under other indices: those of each domain lie together, ids as they were.

    Within a domain documents keep the order of the corpus. One that the slice cuts counts with the part inside. A
    domain with less than a window is left out. A few numbers are held for each document of the slice, none for each
    token; what is read touches only the documents in it.

    Args:
        store: the corpus; where its documents have no domains, all are of the one named ``""``.
        split: of the store; it is the only one that can be asked for.
        start: first token, an index into the split.
        stop: behind the last one.
        sequence: tokens in a window.

    Attributes:
        ranges: domain -> its tokens [start, stop) under the new indices, in the manifest's order.
        short_domains: domain -> its tokens in the slice, fewer than a window; among them domains without any.

    Raises:
        UserError: if the split has fewer than ``stop`` tokens, or a document's domain has no name.
    """

    def __init__(self, store: TokenStore, split: str, start: int, stop: int, sequence: int) -> None:
        self.store, self.split = store, split
        within = store.documents_in(split, start, stop)
        begins = np.maximum(store.offsets(split, within), start)
        lengths = np.diff(begins, append=stop)
        domains = store.domains_of(split, within)
        names = store.domains if store.manifest.splits[split].domains else ("",)
        totals = np.zeros(len(names), dtype=np.int64)
        np.add.at(totals, domains, lengths)
        kept = totals >= sequence
        order = np.argsort(domains, kind="stable")
        order = order[kept[domains[order]]]
        self._documents = within.start + order  # each document's index in the split
        self._sources = begins[order]  # where its first token inside the slice lies in the split
        self._starts = np.concatenate(
            [[0], np.cumsum(lengths[order])], dtype=np.int64
        )  # and under the new indices; the end behind
        ends = np.cumsum(np.where(kept, totals, 0))
        sizes = list(zip(names, totals.tolist(), kept.tolist(), ends.tolist(), strict=True))
        self.ranges = {name: (end - total, end) for name, total, inside, end in sizes if inside}
        self.short_domains = {name: total for name, total, inside, _ in sizes if not inside}

    @property
    def tokens(self) -> int:
        """How many there are, without those of domains that are left out."""
        return int(self._starts[-1])

    def read(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """The ids from ``start`` to ``stop``: int64 of shape [stop - start].

        Raises:
            UserError: if an id is none of the vocabulary.
            ValueError: if not ``0 <= start <= stop <= tokens``, or for another split.
        """
        within = self.documents_in(split, start, stop)
        starts = self._starts[within.start : within.stop + 1]
        begins, ends = np.maximum(starts[:-1], start), np.minimum(starts[1:], stop)
        moved = self._sources[within.start : within.stop] - starts[:-1]
        pieces = [np.empty(0, dtype=np.int64)]
        for begin, end in zip((begins + moved).tolist(), (ends + moved).tolist(), strict=True):
            pieces.append(self.store.read(split, begin, end))
        return np.concatenate(pieces)

    def positions(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """The place of each token in its document: int64 of shape [stop - start].

        It is counted from the document's first token inside the slice, or from ``start`` where that lies before.

        Raises:
            ValueError: if not ``0 <= start <= stop <= tokens``, or for another split.
        """
        within = self.documents_in(split, start, stop)
        begins = np.maximum(self._starts[within.start : within.stop], start)
        return np.arange(start, stop, dtype=np.int64) - np.repeat(begins, np.diff(begins, append=stop))

    def documents_in(self, split: str, start: int, stop: int) -> range:
        """Numbers, in the new order, of the documents with tokens in there, and of empty ones between them.

        Raises:
            ValueError: if not ``0 <= start <= stop <= tokens``, or for another split.
        """
        if split != self.split or not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"not a slice of the {self.tokens} tokens of {self.split!r}: {start} to {stop}, {split!r}")
        if start == stop:
            return range(0)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        return range(first, int(np.searchsorted(self._starts, stop, side="left")))

    def document_name(self, split: str, index: int) -> str:
        """What the store calls the document of that number."""
        return self.store.document_name(split, int(self._documents[index]))
