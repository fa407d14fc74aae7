"""External sort of documents by their hash: sorted runs on disk, merged bucket by bucket.

A run contains consecutive documents of the source, sorted by the hash that orders the corpus. Runs are written
atomically, so the existing runs show how far reading has come. A bucket is a range of hashes: its documents are
contiguous in every run, and the sequence of buckets is the ordered corpus. Memory is that of a run or bucket.

A run is a folder with ``rows`` (dtype ROW, sorted), ``ids`` (of the rows, in their order), ``fences`` (int64 [FENCES +
1, 2]: the first row, and its first id, of each of FENCES equal ranges of hashes) and ``finished`` (JSON).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from secateur.data.encode import ROW, EncodedBlock, Skipped
from secateur.errors import UserError
from secateur.files import read_json, sync_tree, write_json

__all__ = ["BYTES", "FENCES", "Bucket", "SortedRuns"]

BYTES = 2**26  #: size of a run, and of a bucket unless that needs more than FENCES buckets
FENCES = 2**12

_FENCE = np.dtype("<i8")
_MAX_DOMAINS = 2**16


@dataclass(frozen=True)
class Bucket:
    """Distinct documents in order: ``rows`` of dtype ROW, and their concatenated ``ids``."""

    rows: NDArray[np.void]
    ids: NDArray[Any]


class SortedRuns:
    """The sorted runs in ``folder``; continues from the runs of an earlier process.

    Args:
        folder: used by nothing else.
        dtype: of the blocks' ids.

    Attributes:
        documents: number of documents of the source that finished runs account for, skipped ones included.
        complete: whether the source has been read completely.
    """

    def __init__(self, folder: Path, dtype: DTypeLike) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype).newbyteorder("<")
        for half in folder.glob("*.half"):
            shutil.rmtree(half)
        self._metadata = [read_json(path) for path in sorted(folder.glob("run-*/finished"))]
        self.documents = self._position = sum(run["documents"] for run in self._metadata)
        self.complete = (folder / "complete.json").is_file()
        self._tokens = sum(run["tokens"] for run in self._metadata)
        self._blocks: list[EncodedBlock] = []
        self._bytes = 0
        self._pending = Skipped()  # of the blocks
        self._names: dict[str, int] = {name: i for i, name in enumerate(self.domains)}

    @property
    def tokens(self) -> int:
        """Tokens added so far, including those of duplicates."""
        return self._tokens

    @property
    def skipped(self) -> Skipped:
        """The documents of finished runs that were not encoded."""
        total = Skipped()
        for run in self._metadata:
            total.update(Skipped(Counter(run.get("skipped", {})), run.get("first_skipped", "")))
        return total

    @property
    def domains(self) -> list[str]:
        """Names of the domains of all documents, sorted."""
        return sorted({name for run in self._metadata for name in run["domains"]})

    def add(self, block: EncodedBlock) -> None:
        """Add the next documents of the source.

        Raises:
            UserError: if there are more than 65,536 domains.
        """
        rows = block.rows.copy()
        rows["place"] = self._position + np.arange(len(rows))
        self._position += len(rows) + block.skipped.reasons.total()
        self._pending.update(block.skipped)
        self._tokens += len(block.ids)
        for name in block.domains:
            self._names.setdefault(name, len(self._names))
        if len(self._names) > _MAX_DOMAINS:
            raise UserError(f"there are more than {_MAX_DOMAINS} domains; name a field with fewer values")
        self._blocks.append(EncodedBlock(rows, block.ids, block.domains))
        self._bytes += rows.nbytes + block.ids.nbytes
        if self._bytes >= BYTES:
            self._write()

    def finish(self) -> None:
        """Write the remaining documents, and mark the source as completely read."""
        if self._blocks:
            self._write()
        write_json(self.folder / "complete.json", {"documents": self.documents})
        self.complete = True

    def buckets(self) -> Iterator[Bucket]:
        """Yield the distinct documents of all runs in order; duplicates are dropped but for the first in the source.

        A row's ``domain`` is an index into ``domains``.
        """
        index = {name: i for i, name in enumerate(self.domains)}
        runs = [_Run(self.folder / run["name"], self.dtype, run, index) for run in self._metadata]
        size = sum(run["bytes"] for run in self._metadata)
        count = 1
        while count < FENCES and size / count > BYTES:
            count *= 2
        for first in range(0, FENCES, FENCES // count):
            yield _sorted(run.read(first, first + FENCES // count) for run in runs)

    def _write(self) -> None:
        """Write the pending blocks as a run."""
        names = list(dict.fromkeys(name for block in self._blocks for name in block.domains))
        index = {name: i for i, name in enumerate(names)}
        for block in self._blocks:
            block.rows["domain"] = np.array([index[name] for name in block.domains], dtype="<u2")[block.rows["domain"]]
        run = _sorted(((block.rows, block.ids) for block in self._blocks), distinct=False)
        name = f"run-{len(self._metadata):06}"
        metadata = {
            "name": name,
            "documents": len(run.rows) + self._pending.reasons.total(),
            "tokens": len(run.ids),
            "bytes": run.rows.nbytes + run.ids.nbytes,
            "domains": names,
            **({"skipped": self._pending.reasons, "first_skipped": self._pending.first} if self._pending.first else {}),
        }
        half = self.folder / f"{name}.half"
        half.mkdir()
        fences = np.searchsorted(
            run.rows["order"][:, 0] // np.uint64(2**64 // FENCES), np.arange(FENCES + 1, dtype="<u8")
        )
        tokens = np.concatenate([[0], np.cumsum(run.rows["tokens"])])
        _save(half / "fences", np.stack([fences, tokens[fences]], axis=1).astype(_FENCE))
        _save(half / "rows", run.rows)
        _save(half / "ids", run.ids.astype(self.dtype, copy=False))
        (half / "finished").write_text(json.dumps(metadata), encoding="utf-8")
        sync_tree(half)
        os.rename(half, self.folder / name)
        self._metadata.append(metadata)
        self.documents += metadata["documents"]
        self._blocks, self._bytes, self._pending = [], 0, Skipped()


class _Run:
    """A finished run; only the requested range is read."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], metadata: dict[str, Any], index: dict[str, int]) -> None:
        self.folder, self.dtype = folder, dtype
        self.domains = np.array([index[name] for name in metadata["domains"]], dtype="<u2")

    def read(self, first: int, last: int) -> tuple[NDArray[np.void], NDArray[Any]]:
        """The rows between two fences, and their ids."""
        fences = self._part("fences", _FENCE, 2 * first, 2 * (last + 1)).reshape(-1, 2)
        (row, token), (row_end, token_end) = fences[0].tolist(), fences[-1].tolist()
        rows = self._part("rows", ROW, row, row_end)
        rows["domain"] = self.domains[rows["domain"]]
        return rows, self._part("ids", self.dtype, token, token_end)

    def _part(self, name: str, dtype: np.dtype[Any], start: int, stop: int) -> NDArray:
        path = self.folder / name
        values = np.fromfile(path, dtype=dtype, count=stop - start, offset=start * dtype.itemsize)
        if len(values) < stop - start:
            raise UserError(f"{path}: is truncated; delete {self.folder.parent.parent} and run the same command again")
        return values


def _sorted(parts: Iterable[tuple[NDArray[np.void], NDArray[Any]]], *, distinct: bool = True) -> Bucket:
    """Merge rows and their ids in order; ``distinct`` drops duplicates but for the first."""
    rows, ids = map(list, zip(*parts, strict=True))
    merged, flat = np.concatenate(rows), np.concatenate(ids)
    del rows, ids  # as large as the arrays made of them
    starts = np.cumsum(merged["tokens"]).astype(np.int64) - merged["tokens"].astype(np.int64)
    hashes = merged["order"]
    order = np.lexsort((merged["place"], hashes[:, 1], hashes[:, 0]))
    if distinct:
        ordered = hashes[order]
        order = order[np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])] if len(order) else order
    ordered_rows = merged[order]
    out = np.empty(int(ordered_rows["tokens"].sum()), dtype=flat.dtype)
    at = 0
    for start, tokens in zip(starts[order].tolist(), ordered_rows["tokens"].tolist(), strict=True):
        out[at : at + tokens] = flat[start : start + tokens]
        at += tokens
    return Bucket(ordered_rows, out)


def _save(path: Path, values: NDArray) -> None:
    with path.open("wb") as file:
        file.write(np.ascontiguousarray(values).data)
