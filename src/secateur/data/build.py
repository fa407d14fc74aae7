"""From a source to a folder of shards: read, encode, bring into order, write.

Which side a document falls on, and its place there, follow from the hash of its text alone: neither the order of files
nor the number of workers can change them, and a document that occurs twice is never on both sides. The first pass
reads the source and encodes it into sorted runs, the second writes the runs in order; the first goes on where it was
killed, the second starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur import progress
from secateur.data.encode import Encoder
from secateur.data.external_sort import Bucket, SortedRuns
from secateur.data.manifest import Split
from secateur.data.readers import Document
from secateur.data.shards import SHARD_TOKENS, ShardWriter, TokenStore
from secateur.data.sources import Source
from secateur.data.tokenizer import token_hash_of
from secateur.data.worker_pool import encode_in_workers
from secateur.errors import UserError

__all__ = ["HELDOUT", "TRAIN", "BuildResult", "Holdout", "hash_splits", "is_heldout", "track_documents", "write_splits"]

TRAIN, HELDOUT = "train", "heldout"

_BATCH_BYTES = 2**18  # of text, encoded at once
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Holdout:
    """How much is held out.

    Attributes:
        share: of the documents, by hash; with 0 there is no such split.
        option: what the share is called where it was set, for errors.
    """

    share: float = 0.05
    option: str = "`holdout`"

    def empty(self, side: str, documents: int) -> UserError:
        """That of so many distinct documents none is on a side."""
        way = "lower" if side == TRAIN else "raise"
        return UserError(
            f"{self.option}: {self.share} of {documents} documents leaves no {side} document; "
            f"{way} it or name a source with more documents"
        )


@dataclass
class BuildResult:
    """What was written.

    Attributes:
        splits: the manifest's entries.
        domains: names, sorted; empty where there is only one.
        duplicates: documents that repeated an earlier one and were dropped.
        counts: split -> int64 [domains, 3]: documents, tokens and bytes of text, of each domain.
    """

    splits: dict[str, Split]
    domains: list[str]
    duplicates: int
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def bytes(self) -> dict[str, int]:
        """Of the documents' UTF-8 text, by split; 0 where they came as ids."""
        return {split: int(counts[:, 2].sum()) for split, counts in self.counts.items()}


def is_heldout(hashes: NDArray[np.uint64], holdout: float) -> NDArray[np.bool_]:
    """Whether documents are held out: the first eight bytes of a hash, as a share of all there are, decide."""
    return hashes.astype(np.float64) / 2.0**64 < holdout


def write_splits(
    source: Source,
    encoder: Encoder,
    out: Path,
    work: Path,
    *,
    holdout: Holdout,
    documents: int | None = None,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> BuildResult:
    """Write the shards and columns of all splits, but no manifest, into the folder ``out``.

    Args:
        source: of the documents.
        encoder: how they become ids; its seed is that of their order.
        out: what an earlier run left there is written over.
        work: keeps what the first pass has; a run that was killed goes on from there.
        holdout: how much is held out.
        documents: at most so many are read, in the source's order.
        workers: processes that encode; the bytes written do not depend on it.
        shard_tokens: tokens in a shard.

    Raises:
        UserError: if the source cannot be read, or a side is empty.
    """
    work.mkdir(parents=True, exist_ok=True)
    runs = SortedRuns(work, encoder.dtype)
    if not runs.complete:
        _encode(source, encoder, runs, documents, workers)
    return _write(runs, out, holdout, shard_tokens)


def _encode(source: Source, encoder: Encoder, runs: SortedRuns, limit: int | None, workers: int) -> None:
    """The first pass: what the runs do not have yet is read and encoded."""
    with progress.track(f"read {source.name}", limit or source.size() or 0) as task:
        stream = track_documents(source.documents(), task, limit, lambda: f", {runs.tokens:,} tokens")
        if runs.documents:
            progress.notify(f"{source.name}: {runs.documents:,} documents are encoded already")
            next(islice(stream, runs.documents - 1, runs.documents), None)  # read, and not looked at
        for block in encode_in_workers(batch_documents(stream), encoder, workers):
            runs.add(block)
        runs.finish()


def track_documents(
    documents: Iterable[Document], task: progress.ProgressTask, limit: int | None, note: Callable[[], str] = str
) -> Iterator[Document]:
    """At most ``limit`` documents, whose progress is told: out of so many, or of the bytes that the task expects."""
    amount = 0
    for number, document in enumerate(islice(documents, limit), start=1):
        amount += 1 if limit else text_bytes(document)
        if number % 64 == 0 or (amount >= _BATCH_BYTES and not limit):
            # The size is an estimate, so the bar stops at its end and waits there.
            task.advance(min(amount, task.total - task.done), f"{number:,} documents{note()}")
            amount = 0
        yield document


def text_bytes(document: Document) -> int:
    """Bytes of a document in its source, about."""
    if document.ids is not None:
        return document.ids.nbytes
    return len(document.text) if document.text.isascii() else len(document.text.encode())


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists that are encoded at once: few, or of little text."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += text_bytes(document)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(runs: SortedRuns, out: Path, holdout: Holdout, shard_tokens: int) -> BuildResult:
    """The second pass: the runs, in order, become shards."""
    domains = runs.domains
    sides = [TRAIN, *([HELDOUT] if holdout.share else [])]
    counts = {side: np.zeros((len(domains), 3), dtype=np.int64) for side in sides}
    with ExitStack() as stack, progress.track("bring into order", runs.tokens) as task:
        writers = {}
        for side in sides:
            writers[side] = ShardWriter(out, side, _dtype(runs), shard_tokens, domains=len(domains) > 1)
            stack.callback(writers[side].abandon)
        read = 0
        for bucket in runs.buckets():
            held = is_heldout(bucket.rows["hash"], holdout.share)
            for side, chosen in ((TRAIN, ~held), (HELDOUT, held)):
                if side in writers:
                    _take(writers[side], bucket, chosen, counts[side])
            read += len(bucket.rows)
            task.advance(len(bucket.ids), f"{read:,} documents")
        for side, writer in writers.items():
            if not writer.documents:
                raise holdout.empty(side, read)
        splits = {side: writer.close() for side, writer in writers.items()}
    return BuildResult(splits, domains if len(domains) > 1 else [], runs.documents - read, counts)


def _dtype(runs: SortedRuns) -> Any:
    return "uint16" if runs.dtype.itemsize == 2 else "uint32"


def _take(writer: ShardWriter, bucket: Bucket, chosen: NDArray[np.bool_], counts: NDArray[np.int64]) -> None:
    """Write the chosen documents of a bucket, and count them by domain."""
    rows = bucket.rows[chosen]
    ids = bucket.ids if chosen.all() else bucket.ids[np.repeat(chosen, bucket.rows["tokens"].astype(np.int64))]
    writer.extend(ids, rows["tokens"].astype(np.int64), rows["hash"], rows["domain"])
    np.add.at(counts[:, 0], rows["domain"], 1)
    np.add.at(counts[:, 1], rows["domain"], rows["tokens"].astype(np.int64))
    np.add.at(counts[:, 2], rows["domain"], rows["bytes"].astype(np.int64))


def hash_splits(store: TokenStore) -> dict[str, str]:
    """The ``token_hash`` of each split's ids."""
    found = {}
    with progress.track("hash the ids", sum(store.tokens(split) for split in store.manifest.splits)) as task:

        def counted(parts: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
            for part in parts:
                yield part
                task.advance(len(part))

        for split in store.manifest.splits:
            found[split] = token_hash_of(counted(store.chunks(split)), [store.tokens(split)])
    return found
