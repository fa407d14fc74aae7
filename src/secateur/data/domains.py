"""Slices of a corpus with documents and domains: in corpus order, or grouped by domain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secateur.data.shards import TokenStore
from secateur.data.tokenizer import Stream

__all__ = ["DomainTokens", "document_stream", "evenly_spaced", "heldout_stream", "window_stream"]


def document_stream(store: TokenStore, split: str, start: int, stop: int) -> Stream:
    """Read the tokens ``[start, stop)`` of a split with their documents and domains.

    Raises:
        UserError: if the split has fewer than ``stop`` tokens, or a document's domain has no name.
    """
    within = store.documents_in(split, start, stop)
    lengths = np.diff(np.maximum(store.offsets(split, within), start), append=stop)
    domains = store.domains or ("",)
    names = tuple(domains[domain] for domain in store.domains_of(split, within).tolist())
    numbers = np.repeat(np.arange(len(names)), lengths)
    return Stream(store.read(split, start, stop), numbers, names, store.targets(split, start, stop))


def evenly_spaced(count: int, of: int) -> NDArray[np.int64]:
    """Return ``count`` evenly spaced numbers below ``of``, starting at 0; all of them if ``count`` is larger.

    >>> spread(3, 10).tolist()
    [0, 3, 6]
    """
    return np.arange(min(count, of), dtype=np.int64) * of // max(1, min(count, of))


def window_stream(store: TokenStore, split: str, windows: NDArray[np.integer], length: int) -> Stream:
    """Read windows of ``length`` tokens by number and concatenate them, with their documents.

    Raises:
        UserError: if the split ends before a window does, or a document's domain has no name.
    """
    parts = [document_stream(store, split, int(i) * length, (int(i) + 1) * length) for i in windows]
    first_documents = [store.documents_in(split, int(i) * length, (int(i) + 1) * length).start for i in windows]
    numbers = np.concatenate([part.documents + first for part, first in zip(parts, first_documents, strict=True)])
    unique, documents = np.unique(numbers, return_inverse=True)
    domains = {
        first + n: name
        for part, first in zip(parts, first_documents, strict=True)
        for n, name in enumerate(part.domains)
    }
    masks = [part.targets for part in parts if part.targets is not None]
    return Stream(
        np.concatenate([part.ids for part in parts]),
        documents,
        tuple(domains[n] for n in unique.tolist()),
        np.concatenate(masks) if masks else None,
    )


def heldout_stream(store: TokenStore, windows: int, length: int, skip: int = 0) -> Stream:
    """Read held-out windows evenly spaced over the split, so that a few long documents do not dominate.

    Args:
        windows: number of windows; the whole split, with a shorter last window, if it has no more.
        length: tokens in a window.
        skip: excludes the windows that a call with ``windows=skip`` returns.
    """
    split, tokens = "heldout", store.tokens("heldout")
    numbers = np.setdiff1d(np.arange(tokens // length), evenly_spaced(skip, tokens // length) if skip else [])
    if not skip and len(numbers) <= windows:
        return document_stream(store, split, 0, tokens)
    if not len(numbers):
        return document_stream(store, split, 0, 0)
    return window_stream(store, split, numbers[evenly_spaced(windows, len(numbers))], length)


class DomainTokens:
    """The tokens ``[start, stop)`` of a split, reordered so that each domain is contiguous.

    Within a domain documents stay in corpus order. A document that the slice cuts contributes its part inside. Domains
    with less than a window are excluded. Memory is a few numbers per document; a read touches only its documents.

    Args:
        store: the corpus; documents without domains belong to one named ``""``.
        split: of the store; the other methods accept only this one.
        start: first token, an index into the split.
        stop: end of the slice (exclusive).

    Attributes:
        ranges: domain -> its tokens [start, stop) in the new order; domains are in the manifest's order.
        short_domains: excluded domain -> its number of tokens in the slice, fewer than a window, possibly 0.

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
        included = totals >= sequence
        order = np.argsort(domains, kind="stable")
        order = order[included[domains[order]]]
        self._documents = within.start + order  # each document's index in the split
        self._sources = begins[order]  # where its first token inside the slice lies in the split
        # where it lies in the new order, followed by the end
        self._starts = np.concatenate([[0], np.cumsum(lengths[order])], dtype=np.int64)
        ends = np.cumsum(np.where(included, totals, 0))
        sizes = list(zip(names, totals.tolist(), included.tolist(), ends.tolist(), strict=True))
        self.ranges = {name: (end - total, end) for name, total, inside, end in sizes if inside}
        self.short_domains = {name: total for name, total, inside, _ in sizes if not inside}

    @property
    def tokens(self) -> int:
        """Number of tokens, without excluded domains."""
        return int(self._starts[-1])

    def read(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """Read the ids ``[start, stop)``: int64 [stop - start].

        Raises:
            UserError: if an id is not in the vocabulary.
            ValueError: if not ``0 <= start <= stop <= tokens``, or for another split.
        """
        pieces = [self.store.read(split, *piece) for piece in self._pieces(split, start, stop)]
        return np.concatenate([np.empty(0, dtype=np.int64), *pieces])

    def targets(self, split: str, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Which of the tokens ``[start, stop)`` are targets: bool [stop - start]; None where all are.

        Raises:
            ValueError: if not ``0 <= start <= stop <= tokens``, or for another split.
        """
        if self.store.targets(split, 0, 0) is None:
            return None
        pieces = [self.store.targets(split, *piece) for piece in self._pieces(split, start, stop)]
        return np.concatenate([np.empty(0, dtype=bool), *(piece for piece in pieces if piece is not None)])

    def stream(self, split: str, start: int, stop: int) -> Stream:
        """The tokens ``[start, stop)`` with their documents, whose domains are left out, and their targets."""
        numbers = np.cumsum(self.positions(split, start, stop) == 0) - 1
        names = ("",) * (int(numbers[-1]) + 1 if len(numbers) else 0)
        return Stream(self.read(split, start, stop), numbers, names, self.targets(split, start, stop))

    def _pieces(self, split: str, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the tokens ``[start, stop)`` of the new order lie in the split, document by document."""
        within = self.documents_in(split, start, stop)
        starts = self._starts[within.start : within.stop + 1]
        begins, ends = np.maximum(starts[:-1], start), np.minimum(starts[1:], stop)
        moved = self._sources[within.start : within.stop] - starts[:-1]
        return list(zip((begins + moved).tolist(), (ends + moved).tolist(), strict=True))

    def positions(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """Position of each token in its document: int64 [stop - start].

        It counts from the document's first token inside the slice, or from ``start`` if that token lies earlier.

        Raises:
            ValueError: if not ``0 <= start <= stop <= tokens``, or for another split.
        """
        within = self.documents_in(split, start, stop)
        begins = np.maximum(self._starts[within.start : within.stop], start)
        return np.arange(start, stop, dtype=np.int64) - np.repeat(begins, np.diff(begins, append=stop))

    def documents_in(self, split: str, start: int, stop: int) -> range:
        """Numbers, in the new order, of the documents with tokens in ``[start, stop)``, and of empty ones between.

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
        """Name of a document, see :meth:`TokenStore.document_name`."""
        return self.store.document_name(split, int(self._documents[index]))
