"""Text from local files: which files, in which order, and the digest of their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from secateur import progress
from secateur.data.documents import BadRow, Document, Fields, select_documents
from secateur.data.text_files import split_suffix
from secateur.files import sha256_file
from secateur.formatting import plural

__all__ = ["FileSource", "by_relative_path", "folder_domain", "hash_files", "report_files", "walk"]

_HASH_THREADS = 4  # the disk is the bottleneck
_KINDS = 10  # of files in a message, at most


@dataclass(frozen=True)
class FileSource:
    """Local files, read in order; see ``by_relative_path`` for their names."""

    name: str
    files: Mapping[str, Path]
    read: Callable[[Path, str], Iterator[Document | BadRow]]  #: takes a file and its name
    measure: Callable[[Path], int | None] = lambda path: path.stat().st_size  #: bytes of text in a file, roughly
    fields: Fields = field(default_factory=Fields)

    def digest(self) -> str:
        return hash_files(self.files)

    def size(self) -> int | None:
        sizes = [self.measure(path) for path in self.files.values()]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def documents(self) -> Iterator[Document]:
        rows = (row for name, path in self.files.items() for row in self.read(path, name))
        remedy = "name a source with at least one document that is not empty"
        return select_documents(rows, self.name, self.fields, remedy)


def folder_domain(root: Path, files: Sequence[Path]) -> Callable[[Path], str]:
    """Return a function from a file to its domain: the first folder below ``root`` that contains it.

    Files directly in ``root`` belong to the domain ``.``; without any folders, all belong to one unnamed domain.
    """
    if not any(file.parent != root for file in files):
        return lambda file: ""
    return lambda file: file.relative_to(root).parts[0] if file.parent != root else "."


def by_relative_path(root: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Map relative paths to files below ``root``, in the order of ``files``."""
    return {path.relative_to(root).as_posix(): path for path in files}


def walk(root: Path, extensions: tuple[str, ...] = (), skip: Set[str] = frozenset()) -> list[Path]:
    """List files below ``root``, sorted by relative path; hidden files and folders are skipped.

    Args:
        extensions: of the files; empty for any.
        skip: names of folders to ignore at any depth.
    """
    files: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in skip and not name.startswith(".")]
        files += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and (not extensions or name.lower().endswith(extensions))
        ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def report_files(name: str, root: Path, files: Collection[Path], metadata: Collection[Path] = ()) -> None:
    """Print how many files of a folder a source reads and passes over, by suffix; nothing if all are of one kind.

    Args:
        files: that the source reads.
        metadata: files that describe data, by their content.
    """
    reading = Counter(map(_kind, files))
    named = {*files, *metadata}
    unread = Counter(_kind(path) for path in walk(root) if path not in named)
    unread[".json without the text field"] = len(metadata)
    unread["linked folder"] = sum(path.is_symlink() for path in _folders(root))
    if len(reading) > 1 or unread.total():
        rest = f"; {unread.total():,} passed over ({_listing(unread)})" if unread.total() else ""
        progress.notify(f"{name}: {plural(reading.total(), 'file')} read ({_listing(reading)}){rest}")


def _folders(root: Path) -> Iterator[Path]:
    """The folders below ``root`` that are not hidden; links are not followed."""
    for folder, below, _ in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(folder, name) for name in below)


def _listing(counts: Counter[str]) -> str:
    most = [f"{count:,} {kind}" for kind, count in counts.most_common(_KINDS) if count]
    return ", ".join([*most, *(["..."] if len(counts) > _KINDS else [])]) or "none"


def _kind(path: Path) -> str:
    return "".join(split_suffix(path)) or "without a suffix"


def hash_files(files: Mapping[str, Path]) -> str:
    """SHA-256 of the names and the content of files, in hexadecimal."""
    pairs = []
    sizes = [path.stat().st_size for path in files.values()]
    with progress.track("hash the source", sum(sizes)) as task, ThreadPoolExecutor(_HASH_THREADS) as pool:
        for name, size, digest in zip(files, sizes, pool.map(sha256_file, files.values()), strict=True):
            pairs.append([name, digest])
            task.advance(size)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
