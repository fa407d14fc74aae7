"""Token shards on disk: memory-mapped ``.npy`` files and a manifest that lists them.

A folder contains ``manifest.json`` and for each split ``<split>-00000.npy``, ... (the ids), ``documents.<split>.npy``
(int64 offset of each document's first token), ``hashes.<split>.npy`` (uint64, the first eight bytes of each document's
SHA-256) and, if documents have several domains, ``domains.<split>.npy`` (uint16 index into the manifest's names).
Beside the ids of conversations lie ``targets.<split>-00000.npy``, ... (bool, true for what the assistant says).
The tokenizer is in ``tokenizer/``. The manifest is written last: a folder without it is not a store.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.config import fingerprint, parse
from secateur.data.encode import hash_of_ids
from secateur.data.manifest import FORMAT, Column, Manifest, Shard, Split
from secateur.data.npy_writer import ColumnWriter
from secateur.errors import UserError, did_you_mean
from secateur.files import read_json, sha256_file, sha256_tree
from secateur.formatting import plural

__all__ = ["SHARD_TOKENS", "ShardWriter", "TokenStore"]

SHARD_TOKENS = 2**26  #: default tokens in a shard

_MAPS = 256  #: files open at once; a corpus may have more shards than the limit of open files


class ShardWriter:
    """Writes a split: ``append`` or ``extend`` by documents, then ``close``; nothing stays in memory.

    Args:
        shard_tokens: tokens in each file except the last.
        domains: whether documents have several domains.
        targets: whether some tokens are no targets, so that each shard has a file that marks those that are.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: Literal["uint16", "uint32"],
        shard_tokens: int = SHARD_TOKENS,
        *,
        domains: bool = False,
        targets: bool = False,
    ) -> None:
        if shard_tokens < 1:
            raise ValueError(f"a shard holds at least one token, not {shard_tokens}")
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.tokens = self.documents = self.largest_id = 0
        kinds = {"documents": "i8", "hashes": "u8", **({"domains": "u2"} if domains else {})}
        self._columns = {kind: ColumnWriter(folder / f"{kind}.{split}.npy", size) for kind, size in kinds.items()}
        self._shard: ColumnWriter | None = None  # current, not full
        self._mask: ColumnWriter | None = None  # of its targets
        self.targets: int | None = 0 if targets else None
        self._shards: list[Shard] = []

    def append(self, ids: NDArray[np.integer], *, digest: bytes | None = None, domain: int = 0) -> None:
        """Add one document; it may continue in the next shard.

        Args:
            ids: of shape [tokens].
            digest: SHA-256 of the document's text; None for that of its ids.

        Raises:
            ValueError: if an id does not fit the dtype, or ``ids`` is not one-dimensional.
        """
        if ids.ndim != 1 or (ids.size and (ids.min() < 0 or ids.max() > np.iinfo(self.dtype).max)):
            raise ValueError(f"{self.split}: ids must be one-dimensional and fit {self.dtype}")
        hash_value = int.from_bytes((digest or hash_of_ids(ids))[:8], "big")
        self.extend(ids.astype(self.dtype), [len(ids)], np.array([hash_value], dtype=np.uint64), [domain])

    def extend(
        self,
        ids: NDArray[np.unsignedinteger],
        lengths: Sequence[int] | NDArray[np.integer],
        hashes: NDArray[np.uint64],
        domains: Sequence[int] | NDArray[np.integer],
        targets: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add documents whose concatenated ``ids`` have the dtype of the split.

        Args:
            ids: of shape [tokens].
            lengths: tokens of each document, of shape [documents].
            hashes: first eight bytes of each document's SHA-256, of shape [documents].
            domains: index of each document's domain, of shape [documents]; ignored without that column.
            targets: of shape [tokens], for a split with targets.
        """
        ends = self.tokens + np.cumsum(np.asarray(lengths, dtype=np.int64))
        self._columns["documents"].write(ends - lengths)
        self._columns["hashes"].write(hashes)
        if "domains" in self._columns:
            self._columns["domains"].write(domains)
        self.tokens += len(ids)
        self.documents += len(ends)
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))
        if targets is not None and self.targets is not None:
            self.targets += int(targets.sum())
        while len(ids):
            self._shard = self._shard or ColumnWriter(self._path(), self.dtype)
            room = self.shard_tokens - self._shard.length
            part, ids = np.split(ids, [room])
            self._shard.write(part)
            if targets is not None and self.targets is not None:
                self._mask = self._mask or ColumnWriter(self._path("targets."), np.bool_)
                part, targets = np.split(targets, [room])
                self._mask.write(part)
            if self._shard.length == self.shard_tokens:
                self._finish_shard()

    def close(self) -> Split:
        """Complete the files and return the manifest's entry.

        Raises:
            UserError: if the split has no tokens.
        """
        if not self.tokens:
            self.abandon()
            raise UserError(f"{self.folder}: split {self.split!r} has no tokens; name a source with more text")
        if self._shard:
            self._finish_shard()
        columns = {kind: Column(file=c.path.name, sha256=c.close()) for kind, c in self._columns.items()}
        return Split(
            tokens=self.tokens,
            documents=self.documents,
            offsets=columns["documents"],
            hashes=columns["hashes"],
            domains=columns.get("domains"),
            shards=tuple(self._shards),
            largest_id=self.largest_id,
            targets=self.targets,
        )

    def abandon(self) -> None:
        """Close the files as they are, e.g. after an error."""
        for column in [*self._columns.values(), *filter(None, (self._shard, self._mask))]:
            column.abandon()

    def _path(self, prefix: str = "") -> Path:
        return self.folder / f"{prefix}{self.split}-{len(self._shards):05}.npy"

    def _finish_shard(self) -> None:
        assert self._shard is not None
        tokens, name = self._shard.length, self._shard.path.name
        targets = Column(file=self._mask.path.name, sha256=self._mask.close()) if self._mask else None
        self._shards.append(Shard(file=name, tokens=tokens, sha256=self._shard.close(), targets=targets))
        self._shard = self._mask = None


class TokenStore:
    """Exact slices of the splits in ``folder``, and their documents.

    Opening reads only the header of each file; slices are read from memory-mapped files.

    Raises:
        UserError: if the manifest is missing or malformed, or a file is missing, damaged or does not match it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        raw = read_json(path)
        if isinstance(raw, dict) and raw.get("version", FORMAT) != FORMAT:
            raise UserError(
                f"{path}: format {raw['version']!r}, but this secateur reads {FORMAT}; build the data again"
            )
        self.manifest = parse(Manifest, raw, origin=str(path))
        self._map = functools.lru_cache(maxsize=_MAPS)(self._open)
        for name, split in self.manifest.splits.items():
            self._check(name, split)
        self._bounds = {
            name: np.cumsum([0, *(shard.tokens for shard in split.shards)])
            for name, split in self.manifest.splits.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)  # another process maps the files itself

    @property
    def vocabulary(self) -> int:
        """Upper bound (exclusive) of the ids."""
        return self.manifest.vocabulary

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest id of all splits; every token is read where the manifest does not name it."""
        splits = self.manifest.splits.items()
        return max(
            max(int(ids.max()) for ids in self.chunks(name)) if split.largest_id is None else split.largest_id
            for name, split in splits
        )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the documents' domains; empty if there is only one."""
        return self.manifest.domains

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer that made the ids."""
        return self.folder / "tokenizer"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of ids, documents, domains and tokenizer, in hexadecimal; excludes the provenance."""
        return fingerprint(self.manifest)

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return self._split(split).tokens

    def documents(self, split: str) -> int:
        """Number of documents in a split."""
        return self._split(split).documents

    def offsets(self, split: str, documents: range | None = None) -> NDArray[np.int64]:
        """First token of each document, or of each in a range: int64 [documents], in memory."""
        part = slice(documents.start, documents.stop) if documents is not None else slice(None)
        return np.array(self._offsets(split)[part])

    def domains_of(self, split: str, documents: range) -> NDArray[np.uint16]:
        """Domain of each document in a range, an index into :attr:`domains`; zeros if there is only one.

        Raises:
            UserError: if a domain has no name.
        """
        column = self._split(split).domains
        if column is None:
            return np.zeros(len(documents), dtype=np.uint16)
        indices = np.array(self._map(column.file, "uint16", self.documents(split))[documents.start : documents.stop])
        if len(indices) and indices.max() >= len(self.domains):
            raise UserError(
                f"{self.folder / column.file}: a document of domain {indices.max()}, but the manifest names "
                f"{len(self.domains)}: the files are damaged; build the data again"
            )
        return indices

    def read(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """Read the ids ``[start, stop)``: int64 [stop - start].

        Raises:
            UserError: if the split has fewer than ``stop`` tokens, or an id is not in the vocabulary.
            ValueError: if not ``0 <= start <= stop``.
        """
        self._check_slice(split, start, stop)
        out = np.empty(stop - start, dtype=np.int64)
        self._fill(out, split, start, [shard.file for shard in self.manifest.splits[split].shards], self.manifest.dtype)
        if len(out) and out.max() >= self.vocabulary:
            raise UserError(
                f"{self.folder}: an id of {int(out.max())} among tokens {start} to {stop} of {split!r}, beyond the "
                f"vocabulary of {self.vocabulary}: the files are damaged; build the data again"
            )
        return out

    def targets(self, split: str, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Which of the tokens ``[start, stop)`` are targets of a loss: bool [stop - start]; None where all are.

        Raises:
            UserError: if the split has fewer than ``stop`` tokens.
            ValueError: if not ``0 <= start <= stop``.
        """
        self._check_slice(split, start, stop)
        files = [shard.targets.file for shard in self.manifest.splits[split].shards if shard.targets]
        if not files:
            return None
        out = np.empty(stop - start, dtype=bool)
        self._fill(out, split, start, files, "bool")
        return out

    def _fill(self, out: NDArray[Any], split: str, start: int, files: Sequence[str], dtype: str) -> None:
        """Copy values from ``start`` on out of the files of a split's shards."""
        bounds, shards = self._bounds[split], self.manifest.splits[split].shards
        at = int(np.searchsorted(bounds, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            values = self._map(files[at], dtype, shards[at].tokens)
            first = start + filled - int(bounds[at])
            part = values[first : first + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            at += 1

    def chunks(self, split: str, tokens: int = 2**20) -> Iterator[NDArray[np.int64]]:
        """Iterate over the ids of a split, ``tokens`` at a time."""
        total = self.tokens(split)
        for start in range(0, total, tokens):
            yield self.read(split, start, min(start + tokens, total))

    def documents_in(self, split: str, start: int, stop: int) -> range:
        """Indices of the documents with tokens in ``[start, stop)``, and of empty ones between.

        Raises:
            UserError: if the split has fewer than ``stop`` tokens.
            ValueError: if not ``0 <= start <= stop``.
        """
        self._check_slice(split, start, stop)
        if start == stop:
            return range(0)
        offsets = self._offsets(split)
        first = int(np.searchsorted(offsets, np.int64(start), side="right")) - 1
        return range(first, int(np.searchsorted(offsets, np.int64(stop), side="left")))

    def document_name(self, split: str, index: int) -> str:
        """Name of a document, e.g. ``document 3 (sha256 0123456789abcdef, domain books)``.

        The hash is the first 16 digits of that of its text.

        Raises:
            IndexError: if there is no such document.
        """
        entry = self._split(split)
        if not 0 <= index < entry.documents:
            raise IndexError(f"{split!r} has {plural(entry.documents, 'document')}; there is no document {index}")
        label = f"sha256 {int(self._map(entry.hashes.file, 'uint64', entry.documents)[index]):016x}"
        if entry.domains is not None:
            domain = int(self._map(entry.domains.file, "uint16", entry.documents)[index])
            label += f", domain {self.domains[domain] if domain < len(self.domains) else f'{domain} (unknown)'}"
        return f"document {index} ({label})"

    def positions(self, split: str, start: int, stop: int) -> NDArray[np.int64]:
        """Position of each token in its document: int64 [stop - start].

        It counts from the document's first token, or from ``start`` if the document begins earlier.

        Raises:
            UserError: if the split has fewer than ``stop`` tokens.
            ValueError: if not ``0 <= start <= stop``.
        """
        within = self.documents_in(split, start, stop)
        begins = np.maximum(self._offsets(split)[within.start : within.stop], start)
        lengths = np.diff(begins, append=stop)
        return np.arange(start, stop, dtype=np.int64) - np.repeat(np.asarray(begins, dtype=np.int64), lengths)

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            UserError: at the first file that has changed.
        """
        for split in self.manifest.splits.values():
            columns = [split.offsets, split.hashes, split.domains, *(shard.targets for shard in split.shards)]
            for entry in [*split.shards, *filter(None, columns)]:
                if sha256_file(self.folder / entry.file) != entry.sha256:
                    self._changed(entry.file)
        if self.manifest.tokenizer_sha256 not in (None, sha256_tree(self.tokenizer)):
            self._changed("tokenizer")

    def _changed(self, name: str) -> None:
        raise UserError(f"{self.folder / name}: has changed since it was written; build the data again")

    def _split(self, split: str) -> Split:
        if split not in self.manifest.splits:
            raise UserError(f"{self.folder}: no split {split!r}{did_you_mean(split, self.manifest.splits)}")
        return self.manifest.splits[split]

    def _offsets(self, split: str) -> NDArray[np.int64]:
        entry = self._split(split)
        return self._map(entry.offsets.file, "int64", entry.documents)

    def _check_slice(self, split: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop:
            raise ValueError(f"not a slice of tokens: {start} to {stop}")
        total = self.tokens(split)
        if stop > total:
            raise UserError(
                f"{self.folder}: {split!r} has {plural(total, 'token')}, but tokens {start} to {stop} are needed; "
                f"lower the token budget by {stop - total}, or build a larger corpus"
            )

    def _check(self, name: str, split: Split) -> None:
        """Check the header of each file of a split."""
        if sum(shard.tokens for shard in split.shards) != split.tokens:
            raise UserError(f"{self.folder}: the shards of {name!r} do not add up to its tokens; build the data again")
        self._open(split.offsets.file, "int64", split.documents)
        self._open(split.hashes.file, "uint64", split.documents)
        if split.domains is not None:
            self._open(split.domains.file, "uint16", split.documents)
        if len({shard.targets is None for shard in split.shards}) > 1:
            raise UserError(f"{self.folder}: some shards of {name!r} have targets, others none; build the data again")
        for shard in split.shards:
            self._open(shard.file, self.manifest.dtype, shard.tokens)
            if shard.targets is not None:
                self._open(shard.targets.file, "bool", shard.tokens)

    def _open(self, name: str, dtype: str, length: int) -> NDArray:
        if Path(name).name != name or name == "..":
            raise UserError(
                f"{self.folder}: the manifest names {name!r}, a file outside the folder; build the data again"
            )
        path = self.folder / name
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # only .npy: no archives, no pickles
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but the manifest names it; build the data again") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); build the data again") from None
        if array.shape != (length,) or array.dtype != np.dtype(dtype):
            raise UserError(f"{path}: not the {length} values of {dtype} that the manifest names; build the data again")
        return array
