"""Sources of text: ``stdlib``, ``python``, ``text:PATH`` or ``hf:NAME[:config]``.

Every source yields documents in a fixed order and has a digest that identifies its content. Bytes are decoded as UTF-8
and not normalized: newlines stay as they are. Documents of white space only are skipped.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from secateur import progress
from secateur.data.installed_code import FOREIGN, PACKAGES, package_source
from secateur.data.readers import (
    TEXT_EXTENSIONS,
    Document,
    Fields,
    parquet_bytes,
    read_jsonl,
    read_lossy,
    read_parquet,
    read_plain,
)
from secateur.errors import RunError, UserError, did_you_mean
from secateur.files import sha256_file

__all__ = ["FileSource", "Source", "by_relative_path", "folder_domain", "open_source", "walk"]

_HASH_THREADS = 4  # the disk is the bottleneck


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def name(self) -> str:
        """The source as a user would write it, but only the last component of a local path."""
        ...

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal; needs no network."""
        ...

    def size(self) -> int | None:
        """Approximate number of bytes to read, for progress; None if unknown."""
        ...

    def documents(self) -> Iterator[Document]:
        """Iterate over the documents, from the first on each call.

        Raises:
            UserError: at the first record that cannot be read, or at the end if there was no document.
        """
        ...


def open_source(
    source: str,
    *,
    field: str = "text",
    split: str = "train",
    domain: str | None = None,
    blank: bool = False,
    besides: Sequence[str] = (),
) -> Source:
    """Open the text source named ``source``.

    Local sources must exist. A dataset of the Hub is accessed when its documents are first read.

    Args:
        source: ``stdlib`` (Python's standard library), ``python`` (the same plus the packages that secateur needs),
            ``text:PATH`` (a file, or a folder of .txt, .jsonl and .parquet files) or ``hf:NAME[:config]`` (a dataset of
            the Hugging Face Hub, or a local folder of one).
        field: the key or column with the text, where records have keys.
        domain: the key or column that names a document's domain; None for the first subfolder, see
            ``folder_domain``.
        blank: whether to include documents of white space only, e.g. the empty lines of a text.
        besides: further forms that the caller accepts, e.g. ``tokens:FILE.npy``, for error messages.

    Raises:
        UserError: for an unknown scheme or a missing path.
    """
    scheme, _, rest = source.partition(":")
    if scheme not in _SCHEMES or bool(rest) == (scheme in _BUILT_IN):
        if Path(source).exists():
            suffix = Path(source).suffix
            form = next((form for form in besides if suffix and form.endswith(suffix)), "text:")
            raise UserError(f"{source}: is a path; write '{form.partition(':')[0]}:{source}' to read it")
        forms = [*_BUILT_IN, "text:PATH", "hf:NAME", *besides]
        hint = did_you_mean(scheme, [form.partition(":")[0] for form in forms])
        raise UserError(f"{source!r} is not a source, which is {', '.join(forms[:-1])} or {forms[-1]}{hint}")
    return _SCHEMES[scheme](rest, Fields(field, domain, blank), split)


@dataclass(frozen=True)
class FileSource:
    """Local files, read in order; see ``by_relative_path`` for their names."""

    name: str
    files: Mapping[str, Path]
    read: Callable[[Path, str], Iterator[Document]]  #: takes a file and its name
    measure: Callable[[Path], int] = lambda path: path.stat().st_size  #: bytes of text in a file, roughly
    blank: bool = False  #: whether to include documents of white space only

    def digest(self) -> str:
        return _hash_files(self.files)

    def size(self) -> int | None:
        return sum(self.measure(path) for path in self.files.values())

    def documents(self) -> Iterator[Document]:
        empty = True
        for name, path in self.files.items():
            for document in self.read(path, name):
                full = bool(len(document.ids) if document.ids is not None else document.text.strip())
                empty &= not full
                if full or self.blank:
                    yield document
        if empty:
            raise UserError(f"{self.name}: holds no text; name a source with at least one document that is not empty")


@dataclass(frozen=True)
class HubSource:
    """A streaming dataset of the ``datasets`` library; ``local`` is its folder if it is not on the Hub."""

    name: str
    path: str
    config: str | None
    fields: Fields
    split: str
    local: Path | None

    def digest(self) -> str:
        # A local folder is identified by its content, a dataset of the Hub by its name.
        content = _hash_files(by_relative_path(self.local, walk(self.local))) if self.local else self.path
        return hashlib.sha256(json.dumps(["hf", content, self.config, self.split]).encode()).hexdigest()

    def size(self) -> int | None:
        return None

    def load(self) -> Any:
        """Open the streaming dataset.

        Raises:
            UserError: if a local dataset, its configuration or its split does not exist.
            RunError: the same for the Hub, or if the Hub cannot be reached.
        """
        import datasets  # takes a second

        if self.local is None:
            progress.notify(f"{self.name}: fetching from the Hugging Face Hub")
        with self._translate_errors():
            return datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)

    def documents(self) -> Iterator[Document]:
        empty = True
        for number, row in enumerate(self._rows()):
            at = f"{self.name}: {self.split} row {number}"
            document = self.fields.document(row, f"{self.split}:{number}", at, "")
            full = bool(document.text.strip())
            empty &= not full
            if full or self.fields.blank:
                yield document
        if empty:
            raise UserError(f"{self.name}: split {self.split!r} holds no text; name another split or field")

    def _rows(self) -> Iterator[Any]:
        try:
            with self._translate_errors():
                yield from self.load()
        finally:
            # An unfinished parquet scan aborts the process at exit unless it is collected before
            # (https://github.com/apache/arrow/issues/45214).
            gc.collect()

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn errors of ``datasets`` into one line."""

        def failure(text: str) -> Exception:
            return UserError(text) if self.local else RunError(text, 2)  # a network failure may pass

        try:
            yield
        except (UserError, RunError):
            raise
        except ConnectionError:
            hint = "connect to the network, or name a local folder of .jsonl or .parquet files"
            raise failure(f"{self.name}: the Hugging Face Hub cannot be reached; {hint}") from None
        except Exception as error:  # `datasets` raises what its readers raise, of any class
            lines = (str(error).strip() or type(error).__name__).splitlines()
            reason = " ... ".join(dict.fromkeys([lines[0], lines[-1]])).rstrip(".")
            hint = f"check the dataset's name, its configuration ({self.config or 'none'}) and split {self.split!r}"
            raise failure(f"{self.name}: {reason}; {hint}") from None


def _open_stdlib(rest: str, fields: Fields, split: str) -> Source:
    return FileSource("stdlib", _library(fields), read_lossy)


def _open_python(rest: str, fields: Fields, split: str) -> Source:
    files = {f"stdlib/{name}": path for name, path in _library(fields).items()}
    for name in PACKAGES:
        files |= package_source(name)
    return FileSource("python", files, read_lossy)


def _library(fields: Fields) -> dict[str, Path]:
    """The files of Python's standard library."""
    if fields.domain is not None:
        raise UserError(f"`domain`: Python's sources have no fields, got {fields.domain!r}; leave it out")
    root = Path(sysconfig.get_paths()["stdlib"])
    # Excludes the files that describe how this Python was built.
    files = [
        path
        for path in walk(root, (".py",), FOREIGN)
        if not path.name.startswith("_sysconfigdata") and not path.parent.name.startswith("config-")
    ]
    if not files:
        raise UserError(f"stdlib: {root} holds no Python sources; use text:PATH instead")
    return by_relative_path(root, files)


def _open_text(rest: str, fields: Fields, split: str) -> Source:
    path = Path(rest).expanduser()
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    if not path.exists():
        raise UserError(f"text:{rest}: no such file or folder; relative paths start at {Path.cwd()}")
    root = path if path.is_dir() else path.parent
    files = walk(path, TEXT_EXTENSIONS) if path.is_dir() else [path]
    if not files:
        raise UserError(f"text:{rest}: the folder has no {', '.join(TEXT_EXTENSIONS)} file; name a folder with one")
    unreadable = next((file for file in files if not os.access(file, os.R_OK)), None)
    if unreadable:
        raise UserError(f"{unreadable}: cannot be read; fix its permissions or its link, or remove it")
    domain_of = folder_domain(root, files)

    def read(file: Path, where: str) -> Iterator[Document]:
        return readers.get(file.suffix.lower(), read_plain)(file, where, fields, domain_of(file))

    def measure(file: Path) -> int:
        return parquet_bytes(file, fields.text) if file.suffix.lower() == ".parquet" else file.stat().st_size

    return FileSource(f"text:{path.resolve().name}", by_relative_path(root, files), read, measure, fields.blank)


def folder_domain(root: Path, files: Sequence[Path]) -> Callable[[Path], str]:
    """Return a function from a file to its domain: the first folder below ``root`` that contains it.

    Files directly in ``root`` belong to the domain ``.``; without any folders, all belong to one unnamed domain.
    """
    if not any(file.parent != root for file in files):
        return lambda file: ""
    return lambda file: file.relative_to(root).parts[0] if file.parent != root else "."


def _open_hub(rest: str, fields: Fields, split: str) -> Source:
    path, _, config = rest.partition(":")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"hf:{rest}: no such folder; relative paths start at {Path.cwd()}")
        return HubSource(f"hf:{rest}", path, config or None, fields, split, None)
    name = f"hf:{folder.resolve().name}" + (f":{config}" if config else "")
    source = HubSource(name, str(folder), config or None, fields, split, folder)
    source.load()
    return source


_SCHEMES: dict[str, Callable[[str, Fields, str], Source]] = {
    "stdlib": _open_stdlib,
    "python": _open_python,
    "text": _open_text,
    "hf": _open_hub,
}
_BUILT_IN = ("stdlib", "python")  # schemes without a path


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


def _hash_files(files: Mapping[str, Path]) -> str:
    pairs = []
    sizes = [path.stat().st_size for path in files.values()]
    with progress.track("hash the source", sum(sizes)) as task, ThreadPoolExecutor(_HASH_THREADS) as pool:
        for name, size, digest in zip(files, sizes, pool.map(sha256_file, files.values()), strict=True):
            pairs.append([name, digest])
            task.advance(size)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
