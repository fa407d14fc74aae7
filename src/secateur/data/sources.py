"""Sources of text: ``stdlib``, ``python``, ``text:PATH`` or ``hf:NAME[:config]``.

Every source yields documents in a fixed order and has a digest that identifies its content. Bytes are decoded as UTF-8
and not normalized: newlines stay as they are. Documents of white space only are skipped.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from secateur.data.conversations import RowFormat, field_name
from secateur.data.documents import BadRow, Document, Fields, OnBadRow
from secateur.data.hub_datasets import HubSource, SavedDataset, is_saved
from secateur.data.installed_code import FOREIGN, PACKAGES, package_source
from secateur.data.local_files import FileSource, by_relative_path, folder_domain, report_files, walk
from secateur.data.readers import FORMATS, TEXT_EXTENSIONS, has_fields, is_metadata, read_lossy, reader_of, text_bytes
from secateur.errors import UserError, did_you_mean, nearest

__all__ = ["Source", "open_source"]


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
    field: str | None = None,
    default_field: str = "text",
    format: RowFormat | None = None,
    split: str = "train",
    domain: str | None = None,
    blank: bool = False,
    on_bad_row: OnBadRow | None = None,
    besides: Sequence[str] = (),
) -> Source:
    """Open the text source named ``source``.

    Local sources must exist. A dataset of the Hub is accessed when its documents are first read.

    Args:
        source: ``stdlib`` (Python's standard library), ``python`` (the same plus the packages that secateur needs),
            ``text:PATH`` (a file, or a folder of files of ``TEXT_EXTENSIONS``) or ``hf:NAME[:config]`` (a dataset of
            the Hugging Face Hub, or a local folder of one).
        field: the key or column with the text, or with the messages, where records have keys; None for
            ``default_field``, or ``messages``.
        default_field: as ``field``, for text, and ignored where records have no keys.
        format: of the records: ``text`` (also for None), ``messages``, or ``prompt-completion``.
        domain: the key or column that names a document's domain; None for the first subfolder, see
            ``folder_domain``.
        blank: whether to include documents of white space only, e.g. the empty lines of a text.
        on_bad_row: what becomes of a record that is malformed or not text: ``error`` (also for None) or ``skip``. Null
            is skipped in both cases.
        besides: further forms that the caller accepts, e.g. ``tokens:FILE.npy``, for error messages.

    Raises:
        UserError: for an unknown scheme, a missing path, or a ``field`` or ``format`` of a source without fields.
    """
    scheme, _, rest = source.partition(":")
    if scheme not in _SCHEMES or bool(rest) == (scheme in _BUILT_IN):
        if Path(source).exists():
            suffix = Path(source).suffix
            form = next((form for form in besides if suffix and form.endswith(suffix)), "text:")
            raise UserError(f"{source}: is a path; write '{form.partition(':')[0]}:{source}' to read it")
        forms = [*_BUILT_IN, "text:PATH", "hf:NAME", *besides]
        if whole := next((form for form in forms if not rest and form.startswith(f"{scheme}:")), None):
            raise UserError(f"{source!r} names no text; write {whole}")
        if scheme == source and nearest(source, _BUILT_IN) is None:  # a name without a scheme
            hint = f"; write 'hf:{source}' for a dataset of the Hugging Face Hub"
        else:
            hint = did_you_mean(scheme, [form.partition(":")[0] for form in forms])
        raise UserError(f"{source!r} is not a source, which is {', '.join(forms[:-1])} or {forms[-1]}{hint}")
    format = format or "text"
    if format == "prompt-completion" and field not in (None, "prompt"):
        raise UserError(f"`field`: {format} reads the fields prompt and completion, not {field!r}; leave it out")
    name = field_name(format, default_field) if field is None else field
    opened = _SCHEMES[scheme](rest, Fields(name, domain, blank, on_bad_row or "error", format), split)
    if isinstance(opened, FileSource) and not any(map(has_fields, opened.files.values())):
        if format != "text":
            raise UserError(f"`format`: {source} is plain text, which has no {format}; name a .jsonl or .parquet file")
        if field not in (None, "text"):
            raise UserError(f"`field`: {source} is plain text, which has no field {field!r}; leave it out")
    return opened


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
    if not path.exists():
        raise UserError(f"text:{rest}: no such file or folder; relative paths start at {Path.cwd()}")
    if is_saved(path):
        raise UserError(f"text:{rest}: was written by `save_to_disk` of datasets; write 'hf:{rest}' to read its text")
    root = path if path.is_dir() else path.parent
    files = walk(path, TEXT_EXTENSIONS) if path.is_dir() else [path]
    unreadable = next((file for file in files if not os.access(file, os.R_OK)), None)
    if unreadable:
        raise UserError(f"{unreadable}: cannot be read; fix its permissions or its link, or remove it")
    name = f"text:{path.resolve().name}"
    if path.is_dir():
        metadata = {file for file in files if is_metadata(file, fields.text)}
        files = [file for file in files if file not in metadata]
        report_files(name, path, files, metadata)
    if not files:
        raise UserError(f"text:{rest}: the folder has no {FORMATS} file with text; name a folder with one")
    domain_of = folder_domain(root, files)

    def read(file: Path, where: str) -> Iterator[Document | BadRow]:
        return reader_of(file)(file, where, fields, domain_of(file))

    return FileSource(name, by_relative_path(root, files), read, lambda file: text_bytes(file, fields.text), fields)


def _open_hub(rest: str, fields: Fields, split: str) -> Source:
    path, _, config = rest.partition(":")
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"hf:{rest}: is a file; write 'text:{path}' to read it")
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"hf:{rest}: no such folder; relative paths start at {Path.cwd()}")
        return HubSource(f"hf:{rest}", path, config or None, fields, split, None)
    name = f"hf:{folder.resolve().name}" + (f":{config}" if config else "")
    if is_saved(folder):
        if config:
            raise UserError(f"{name}: a dataset written by `save_to_disk` has no configurations; leave out {config!r}")
        return SavedDataset.open(name, folder, fields, split)
    source = HubSource(name, str(folder), config or None, fields, split, folder)
    source.check(folder)
    return source


_SCHEMES: dict[str, Callable[[str, Fields, str], Source]] = {
    "stdlib": _open_stdlib,
    "python": _open_python,
    "text": _open_text,
    "hf": _open_hub,
}
_BUILT_IN = ("stdlib", "python")  # schemes without a path
