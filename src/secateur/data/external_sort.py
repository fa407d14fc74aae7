"""Documents on their way into an order that is not the source's: sorted runs on disk, read back bucket by bucket.

A run holds documents that follow each other in the source, sorted by the hash that orders the corpus. It is written
whole or not at all, so that the runs that are there say how far reading has come. A bucket is a range of hashes: its
documents lie together in every run, and the buckets one after the other are the corpus in order. Memory is that of one
run, and then of one bucket, whatever the size of the corpus.

A run is a folder with ``rows`` (dtype ROW, sorted), ``ids`` (of the rows, in their order), ``fences`` (int64 [FENCES +
1, 2]: the first row, and its first id, of each of FENCES equal ranges of hashes) and ``finished`` (JSON).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.encode import ROW, EncodedBlock
from secateur.errors import UserError
from secateur.files import read_json, sync_tree, write_json

__all__ = ["BYTES", "FENCES", "Bucket", "SortedRuns"]

BYTES = 2**26  #: of a run, and of a bucket where there are no more than FENCES
FENCES = 2**12

_FENCE = np.dtype("<i8")
_MOST_DOMAINS = 2**16


@dataclass(frozen=True)
class Bucket:
    """Distinct documents in order: ``rows`` of dtype ROW, and their ``ids`` one after the other."""

    rows: NDArray[np.void]
    ids: NDArray[np.unsignedinteger]


class SortedRuns:
    """The runs in ``folder``; what an unfinished process left there is taken over.

    Args:
        folder: that nothing else is written to.
        dtype: of the ids.

    Attributes:
        documents: read from the source and safe on disk.
        complete: whether the source has been read to its end.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype).newbyteorder("<")
        for half in folder.glob("*.half"):
            shutil.rmtree(half)
        self._told = [read_json(path) for path in sorted(folder.glob("run-*/finished"))]
        self.documents = self._taken = sum(told["documents"] for told in self._told)
        self.complete = (folder / "complete.json").is_file()
        self._tokens = sum(told["tokens"] for told in self._told)
        self._blocks: list[EncodedBlock] = []
        self._bytes = 0
        self._names: dict[str, int] = {name: i for i, name in enumerate(self.domains)}

    @property
    def tokens(self) -> int:
        """Taken so far, those of repeated documents included."""
        return self._tokens

    @property
    def domains(self) -> list[str]:
        """Names of the domains of all documents, sorted."""
        return sorted({name for told in self._told for name in told["domains"]})

    def add(self, block: EncodedBlock) -> None:
        """Take the next documents of the source.

        Raises:
            UserError: if there are more domains than can be told apart.
        """
        rows = block.rows.copy()
        rows["place"] = self._taken + np.arange(len(rows))
        self._taken += len(rows)
        self._tokens += len(block.ids)
        for name in block.domains:
            self._names.setdefault(name, len(self._names))
        if len(self._names) > _MOST_DOMAINS:
            raise UserError(f"there are more than {_MOST_DOMAINS} domains; name a field with fewer values")
        self._blocks.append(EncodedBlock(rows, block.ids, block.domains))
        self._bytes += rows.nbytes + block.ids.nbytes
        if self._bytes >= BYTES:
            self._write()

    def finish(self) -> None:
        """Write what is left: the source has been read to its end."""
        if self._blocks:
            self._write()
        write_json(self.folder / "complete.json", {"documents": self.documents})
        self.complete = True

    def buckets(self) -> Iterator[Bucket]:
        """The distinct documents of all runs in order; of those with the same hash, the first in the source.

        A row's ``domain`` is an index into ``domains``.
        """
        index = {name: i for i, name in enumerate(self.domains)}
        runs = [_Run(self.folder / told["name"], self.dtype, told, index) for told in self._told]
        size = sum(told["bytes"] for told in self._told)
        count = 1
        while count < FENCES and size / count > BYTES:
            count *= 2
        for first in range(0, FENCES, FENCES // count):
            yield _sorted(run.read(first, first + FENCES // count) for run in runs)

    def _write(self) -> None:
        """Make a run of the blocks that wait."""
        names = list(dict.fromkeys(name for block in self._blocks for name in block.domains))
        index = {name: i for i, name in enumerate(names)}
        for block in self._blocks:
            block.rows["domain"] = np.array([index[name] for name in block.domains], dtype="<u2")[block.rows["domain"]]
        run = _sorted(((block.rows, block.ids) for block in self._blocks), distinct=False)
        name = f"run-{len(self._told):06}"
        told = {
            "name": name,
            "documents": len(run.rows),
            "tokens": len(run.ids),
            "bytes": run.rows.nbytes + run.ids.nbytes,
            "domains": names,
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
        (half / "finished").write_text(json.dumps(told), encoding="utf-8")
        sync_tree(half)
        os.rename(half, self.folder / name)
        self._told.append(told)
        self.documents += len(run.rows)
        self._blocks, self._bytes = [], 0


class _Run:
    """A finished run, from which no more is read than a range."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], told: dict[str, Any], index: dict[str, int]) -> None:
        self.folder, self.dtype = folder, dtype
        self.domains = np.array([index[name] for name in told["domains"]], dtype="<u2")

    def read(self, first: int, last: int) -> tuple[NDArray[np.void], NDArray[np.unsignedinteger]]:
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
            raise UserError(f"{path}: is cut off; delete {self.folder.parent.parent} and run the same command again")
        return values


def _sorted(parts: Iterable[tuple[NDArray[np.void], NDArray[np.unsignedinteger]]], *, distinct: bool = True) -> Bucket:
    """Documents in order, of rows and their ids; ``distinct`` leaves only the first of those that repeat each other."""
    rows, ids = map(list, zip(*parts, strict=True))
    known, flat = np.concatenate(rows), np.concatenate(ids)
    del rows, ids  # as large as what was made of them
    starts = np.cumsum(known["tokens"]).astype(np.int64) - known["tokens"].astype(np.int64)
    hashes = known["order"]
    order = np.lexsort((known["place"], hashes[:, 1], hashes[:, 0]))
    if distinct:
        ordered = hashes[order]
        order = order[np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])] if len(order) else order
    kept = known[order]
    out = np.empty(int(kept["tokens"].sum()), dtype=flat.dtype)
    at = 0
    for start, tokens in zip(starts[order].tolist(), kept["tokens"].tolist(), strict=True):
        out[at : at + tokens] = flat[start : start + tokens]
        at += tokens
    return Bucket(kept, out)


def _save(path: Path, values: NDArray) -> None:
    with path.open("wb") as file:
        file.write(np.ascontiguousarray(values).data)
