"""Build a folder of shards from a source: read, encode, sort, write.

A document's split and position depend only on the hash of its text: neither the order of files nor the number of
workers matters, and duplicates are never in both splits. The first pass encodes the source into sorted runs and resumes
after a kill; the second pass writes the runs in order and restarts.
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
from secateur.data.documents import Document
from secateur.data.encode import Encoder
from secateur.data.external_sort import Bucket, SortedRuns
from secateur.data.manifest import Split
from secateur.data.shards import SHARD_TOKENS, ShardWriter, TokenStore
from secateur.data.sources import Source
from secateur.data.tokenizer import token_hash_of
from secateur.data.worker_pool import encode_in_workers
from secateur.errors import UserError
from secateur.formatting import plural

__all__ = ["HELDOUT", "TRAIN", "BuildResult", "Holdout", "hash_splits", "is_heldout", "track_documents", "write_splits"]

TRAIN, HELDOUT = "train", "heldout"

_BATCH_BYTES = 2**18  # of text
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Holdout:
    """The share of documents in the held-out split.

    Attributes:
        share: of the documents, by hash; 0 for no held-out split.
        option: name of the share in error messages.
    """

    share: float = 0.05
    option: str = "`holdout`"

    def empty(self, side: str, documents: int) -> UserError:
        """Make the error for a split without any of ``documents`` distinct documents."""
        change = "lower" if side == TRAIN else "raise"
        return UserError(
            f"{self.option}: {self.share} of {plural(documents, 'document')} leaves no {side} document; "
            f"{change} it or name a source with more documents"
        )


@dataclass
class BuildResult:
    """The written splits.

    Attributes:
        splits: entries of the manifest.
        domains: sorted names; empty if there is only one.
        duplicates: number of dropped documents that equal an earlier one.
        counts: split -> int64 [domains, 3]: documents, tokens and bytes of text per domain.
    """

    splits: dict[str, Split]
    domains: list[str]
    duplicates: int
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of UTF-8 text per split; 0 for documents of ids."""
        return {split: int(counts[:, 2].sum()) for split, counts in self.counts.items()}


def is_heldout(hashes: NDArray[np.uint64], holdout: float) -> NDArray[np.bool_]:
    """Return a mask of held-out documents: those whose hash is in the lowest share ``holdout`` of all hashes."""
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
        encoder: encodes the documents; its seed also determines their order.
        out: files of an earlier run are overwritten.
        work: stores the runs of the first pass; a killed build resumes from them.
        documents: maximal number to read, in the source's order.
        workers: number of encoding processes; does not change the result.

    Raises:
        UserError: if the source cannot be read, or a split is empty.
    """
    work.mkdir(parents=True, exist_ok=True)
    runs = SortedRuns(work, encoder.block_dtype)
    if not runs.complete:
        _encode(source, encoder, runs, documents, workers)
    return _write(runs, out, holdout, shard_tokens)


def _encode(source: Source, encoder: Encoder, runs: SortedRuns, limit: int | None, workers: int) -> None:
    """First pass: read and encode the documents that the runs lack."""
    with progress.track(f"read {source.name}", limit or source.size() or 0) as task:
        stream = track_documents(source.documents(), task, limit, lambda: f", {plural(runs.tokens, 'token')}")
        if runs.documents:
            progress.notify(f"{source.name}: already encoded: {plural(runs.documents, 'document')}")
            next(islice(stream, runs.documents - 1, runs.documents), None)  # skips them
        for block in encode_in_workers(batch_documents(stream), encoder, workers):
            runs.add(block)
        runs.finish()
    skipped = runs.skipped
    if skipped.first and skipped.reasons.total() == runs.documents:
        raise UserError(f"{source.name}: holds no conversation that can be encoded; {skipped}")
    if skipped.first:
        progress.notify(f"{source.name}: {skipped}")


def track_documents(
    documents: Iterable[Document], task: progress.ProgressTask, limit: int | None, note: Callable[[], str] = str
) -> Iterator[Document]:
    """Yield at most ``limit`` documents and report progress: of ``limit`` documents, or of the task's bytes."""
    amount = 0
    for number, document in enumerate(islice(documents, limit), start=1):
        amount += 1 if limit else text_bytes(document)
        if number % 64 == 0 or (amount >= _BATCH_BYTES and not limit):
            # The size is an estimate, so the bar must not pass its end.
            task.advance(min(amount, task.total - task.done), f"{plural(number, 'document')}{note()}")
            amount = 0
        yield document


def text_bytes(document: Document) -> int:
    """Approximate bytes of a document in its source."""
    if document.ids is not None:
        return document.ids.nbytes
    return len(document.text) if document.text.isascii() else len(document.text.encode())


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents in batches of limited number and size."""
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
    """Second pass: write the sorted documents as shards."""
    domains = runs.domains
    sides = [TRAIN, *([HELDOUT] if holdout.share else [])]
    counts = {side: np.zeros((len(domains), 3), dtype=np.int64) for side in sides}
    with ExitStack() as stack, progress.track("sort and write", runs.tokens) as task:
        id_type: np.dtype[Any] = runs.dtype.fields["id"][0] if runs.dtype.fields else runs.dtype
        dtype = "uint16" if id_type.itemsize == 2 else "uint32"
        writers = {}
        for side in sides:
            options = {"domains": len(domains) > 1, "targets": runs.dtype.names is not None}
            writers[side] = ShardWriter(out, side, dtype, shard_tokens, **options)
            stack.callback(writers[side].abandon)
        read = 0
        for bucket in runs.buckets():
            heldout = is_heldout(bucket.rows["hash"], holdout.share)
            for side, mask in ((TRAIN, ~heldout), (HELDOUT, heldout)):
                if side in writers:
                    _write_documents(writers[side], bucket, mask, counts[side])
            read += len(bucket.rows)
            task.advance(len(bucket.ids), plural(read, "document"))
        for side, writer in writers.items():
            if not writer.documents:
                raise holdout.empty(side, read)
        splits = {side: writer.close() for side, writer in writers.items()}
    duplicates = runs.documents - runs.skipped.reasons.total() - read
    return BuildResult(splits, domains if len(domains) > 1 else [], duplicates, counts)


def _write_documents(writer: ShardWriter, bucket: Bucket, mask: NDArray[np.bool_], counts: NDArray[np.int64]) -> None:
    """Write the masked documents of a bucket, and count them by domain."""
    rows = bucket.rows[mask]
    ids = bucket.ids if mask.all() else bucket.ids[np.repeat(mask, bucket.rows["tokens"].astype(np.int64))]
    ids, targets = (ids["id"], ids["target"]) if ids.dtype.names else (ids, None)
    writer.extend(ids, rows["tokens"].astype(np.int64), rows["hash"], rows["domain"], targets)
    np.add.at(counts[:, 0], rows["domain"], 1)
    np.add.at(counts[:, 1], rows["domain"], rows["tokens"].astype(np.int64))
    np.add.at(counts[:, 2], rows["domain"], rows["bytes"].astype(np.int64))


def hash_splits(store: TokenStore) -> dict[str, str]:
    """Compute the ``token_hash`` of each split's ids."""
    hashes = {}
    with progress.track("hash the ids", sum(store.tokens(split) for split in store.manifest.splits)) as task:

        def track_parts(parts: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
            for part in parts:
                yield part
                task.advance(len(part))

        for split in store.manifest.splits:
            hashes[split] = token_hash_of(track_parts(store.chunks(split)), [store.tokens(split)])
    return hashes
