"""Token shards on disk: plain ``.npy`` files, memory-mapped, and a manifest that says what there must be.

A folder holds ``manifest.json`` and for each split ``<split>-00000.npy``, ... (the ids) and ``documents.<split>.npy``
(int64 offset of each document's first token). The manifest is written last: a folder without one is not a store.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UserError, did_you_mean
from secateur.files import read_json, sha256_file, write_json
from secateur.spec import Positive, identity, parse, spec

__all__ = ["Manifest", "Shard", "ShardWriter", "Split", "TokenStore", "smallest_dtype", "write_manifest"]

_VERSION = 1


@spec
class Shard:
    """One file of ids; ``tokens`` is its length."""

    file: str
    tokens: Positive
    sha256: str


@spec
class Split:
    """The shards of one split in order, and the file of its documents' offsets."""

    tokens: Positive
    documents: Positive
    offsets: str
    offsets_sha256: str
    shards: tuple[Shard, ...]


@spec
class Manifest:
    """What a folder of shards holds; every id is below ``vocabulary``."""

    version: int = _VERSION
    dtype: Literal["uint16", "uint32"]
    vocabulary: Positive
    splits: dict[str, Split]


def smallest_dtype(vocabulary: int) -> Literal["uint16", "uint32"]:
    """The dtype of ids below ``vocabulary``."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


class ShardWriter:
    """Write one split: ``append`` each document's ids, then ``close``."""

    def __init__(self, folder: Path, split: str, dtype: Literal["uint16", "uint32"], shard_tokens: int = 2**26) -> None:
        if shard_tokens < 1:
            raise ValueError(f"a shard holds at least one token, not {shard_tokens}")
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self._parts: list[NDArray[np.unsignedinteger]] = []  # what the next shard holds so far
        self._waiting = 0  # tokens in _parts
        self.tokens = 0
        self._starts: list[int] = []
        self._shards: list[Shard] = []

    def append(self, ids: NDArray[np.integer]) -> None:
        """Add one document, ids of shape [tokens]; it may go on in the next shard.

        Raises:
            ValueError: if an id does not fit the dtype, or ``ids`` is not one-dimensional.
        """
        if ids.ndim != 1 or (ids.size and (ids.min() < 0 or ids.max() > np.iinfo(self.dtype).max)):
            raise ValueError(f"{self.split}: ids must be a line of numbers that fit {self.dtype}")
        self._starts.append(self.tokens)
        self.tokens += len(ids)
        rest = ids.astype(self.dtype)
        while len(rest):
            part, rest = np.split(rest, [self.shard_tokens - self._waiting])
            self._parts.append(part)
            self._waiting += len(part)
            if self._waiting == self.shard_tokens:
                self._flush()

    def close(self) -> Split:
        """Write what is left and the offsets; returns the manifest's entry.

        Raises:
            UserError: if the split holds no token.
        """
        if not self.tokens:
            raise UserError(f"{self.folder}: split {self.split!r} has no tokens; name a source with more text")
        if self._waiting:
            self._flush()
        offsets = self.folder / f"documents.{self.split}.npy"
        np.save(offsets, np.array(self._starts, dtype="<i8"), allow_pickle=False)
        return Split(
            tokens=self.tokens,
            documents=len(self._starts),
            offsets=offsets.name,
            offsets_sha256=sha256_file(offsets),
            shards=tuple(self._shards),
        )

    def _flush(self) -> None:
        path = self.folder / f"{self.split}-{len(self._shards):05}.npy"
        np.save(path, np.concatenate(self._parts).astype(self.dtype.newbyteorder("<")), allow_pickle=False)
        self._shards.append(Shard(file=path.name, tokens=self._waiting, sha256=sha256_file(path)))
        self._parts, self._waiting = [], 0


def write_manifest(folder: Path, vocabulary: int, splits: dict[str, Split]) -> None:
    """Write the manifest, which makes ``folder`` a store; call it when every split is closed."""
    manifest = Manifest(dtype=smallest_dtype(vocabulary), vocabulary=vocabulary, splits=splits)
    write_json(folder / "manifest.json", identity(manifest))


class TokenStore:
    """Exact slices of the splits in ``folder``.

    Raises:
        UserError: if the manifest is missing or malformed, or a file is missing, damaged or not as the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        raw = read_json(path)
        if isinstance(raw, dict) and raw.get("version", _VERSION) != _VERSION:
            raise UserError(
                f"{path}: format {raw['version']!r}, but this secateur reads {_VERSION}; build the data again"
            )
        self.manifest = parse(Manifest, raw, origin=str(path))
        self._shards = {name: self._open_split(name, split) for name, split in self.manifest.splits.items()}
        self._bounds = {
            name: np.cumsum([0, *(shard.tokens for shard in split.shards)])
            for name, split in self.manifest.splits.items()
        }

    @property
    def vocabulary(self) -> int:
        """Every id is below this."""
        return self.manifest.vocabulary

    def tokens(self, split: str) -> int:
        """How many tokens the split has."""
        return self._split(split).tokens

    def offsets(self, split: str) -> NDArray[np.int64]:
        """Where each document starts: int64 of shape [documents]."""
        entry = self._split(split)
        return np.array(self._open(entry.offsets, "int64", entry.documents))

    def read(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """The ids from ``start`` to ``stop``: int64 of shape [stop - start].

        Raises:
            UserError: if the split has fewer than ``stop`` tokens.
            ValueError: if not ``0 <= start <= stop``.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"not a slice of tokens: {start} to {stop}")
        total = self.tokens(split)
        if stop > total:
            raise UserError(
                f"{self.folder}: {split!r} has {total} tokens, but tokens {start} to {stop} were asked for; "
                f"lower the token budget by {stop - total}, or build a larger corpus"
            )
        out, filled = np.empty(stop - start, dtype=np.int64), 0
        for shard, (first, last) in zip(self._shards[split], pairwise(self._bounds[split].tolist()), strict=True):
            part = shard[max(start - first, 0) : max(min(stop, last) - first, 0)]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            UserError: at the first file that has changed.
        """
        for split in self.manifest.splits.values():
            pairs = [(shard.file, shard.sha256) for shard in split.shards]
            for name, expected in [*pairs, (split.offsets, split.offsets_sha256)]:
                if sha256_file(self.folder / name) != expected:
                    raise UserError(f"{self.folder / name}: has changed since it was written; build the data again")

    def _split(self, split: str) -> Split:
        if split not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {split!r}{did_you_mean(split, self.manifest.splits)}")
        return self.manifest.splits[split]

    def _open_split(self, name: str, split: Split) -> list[NDArray[np.unsignedinteger]]:
        if sum(shard.tokens for shard in split.shards) != split.tokens:
            raise UserError(f"{self.folder}: the shards of {name!r} do not add up to its tokens; build the data again")
        self._open(split.offsets, "int64", split.documents)
        return [self._open(shard.file, self.manifest.dtype, shard.tokens) for shard in split.shards]

    def _open(self, name: str, dtype: str, length: int) -> NDArray:
        if Path(name).name != name or name == "..":
            raise UserError(
                f"{self.folder}: the manifest names {name!r}, a file outside the folder; build the data again"
            )
        path = self.folder / name
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # .npy alone: no archives, no pickles
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but the manifest names it; build the data again") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); build the data again") from None
        if array.shape != (length,) or array.dtype != np.dtype(dtype):
            raise UserError(f"{path}: not the {length} values of {dtype} that the manifest names; build the data again")
        return array
