"""Documents that come as token ids: ``arrow:PATH[:column]`` and ``array_record:PATH[:feature]``.

A row, or a record, is one document. ``arrow:`` reads what ``datasets`` wrote with ``save_to_disk``, or any Arrow files;
``array_record:`` reads records that are serialised ``tf.train.Example`` messages, which takes the package of that name
and no TensorFlow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.readers import Document, text_of
from secateur.data.sources import FileSource, Source, by_relative_path, folder_domain, walk
from secateur.data.tf_example import int64_features
from secateur.errors import UserError
from secateur.files import read_json

__all__ = ["TOKEN_SOURCE_FORMS", "is_tokenized", "open_tokenized"]

TOKEN_SOURCE_FORMS = ("arrow:PATH", "array_record:PATH")  #: how such sources are named

_COLUMN = "input_ids"
_RECORDS = 1024  # read at once


def is_tokenized(source: str) -> bool:
    """Whether a source is named as one of ids."""
    return any(source.startswith(form.partition("PATH")[0]) for form in TOKEN_SOURCE_FORMS)


def open_tokenized(source: str, *, split: str = "train", domain: str | None = None) -> Source:
    """Open a source of ids.

    Args:
        source: ``arrow:PATH[:column]`` (a folder that ``datasets`` saved, or Arrow files; the column is ``input_ids``
            unless named) or ``array_record:PATH[:feature]`` (a file or a folder; the feature is the only one of whole
            numbers unless named).
        split: of a saved ``DatasetDict``.
        domain: the column of an Arrow file that names a document's domain; else its first subfolder does.

    Raises:
        UserError: for a missing path, a folder without such files, or a package that is not installed.
    """
    scheme, _, rest = source.partition(":")
    path, name = _path_and_name(source, rest)
    if scheme == "arrow":
        if (path / "dataset_dict.json").is_file():
            path = _split_of(path, split)
        _check_saved(path)
        return _source(source, path, (".arrow",), lambda f, at, d: _read_arrow(f, at, name or _COLUMN, domain, d))
    if domain is not None:
        raise UserError(f"--domain {domain}: records of array_record are not asked for it; lay them in folders instead")
    module = _array_record()
    return _source(
        source, path, (".array_record", ".arrayrecord"), lambda f, at, d: _read_records(module, f, at, name, d)
    )


def _path_and_name(source: str, rest: str) -> tuple[Path, str]:
    """The path, and what stands behind a colon, unless the colon belongs to the path."""
    path, name = Path(rest).expanduser(), ""
    if not path.exists() and ":" in rest:
        before, _, name = rest.rpartition(":")
        path = Path(before).expanduser()
    if not rest or not path.exists():
        raise UserError(f"{source}: no such file or folder; relative paths start at {Path.cwd()}")
    return path, name


def _source(
    source: str, path: Path, extensions: tuple[str, ...], read: Callable[[Path, str, str], Iterator[Document]]
) -> Source:
    root = path if path.is_dir() else path.parent
    files = walk(path, extensions) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{source}: the folder has no {' or '.join(extensions)} file; name a folder with one")
    domain_of = folder_domain(root, files)
    name = f"{source.partition(':')[0]}:{path.resolve().name}"
    return FileSource(name, by_relative_path(root, files), lambda file, where: read(file, where, domain_of(file)))


def _split_of(path: Path, split: str) -> Path:
    if not (path / split).is_dir():
        known = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise UserError(f"arrow:{path}: no split {split!r}; name one of {known} with --split")
    return path / split


def _check_saved(path: Path) -> None:
    """Refuse a dataset whose rows are chosen by a file of indices, which older versions of ``datasets`` could save."""
    state = path / "state.json"
    if state.is_file() and read_json(state).get("_indices_data_files"):
        raise UserError(f"arrow:{path}: its rows are chosen by indices; call flatten_indices() and save it again")


def _read_arrow(path: Path, where: str, column: str, domain: str | None, folder: str) -> Iterator[Document]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path):
            for name in (column, *([domain] if domain else [])):
                if name not in batch.schema.names:
                    raise UserError(f"{path}: no column {name!r}; the columns are {', '.join(batch.schema.names)}")
            names = batch.column(domain).to_pylist() if domain else None
            for i, ids in enumerate(_lists(batch.column(column), f"{path}: column {column!r}")):
                own = text_of({domain: names[i]}, domain, f"{path}: row {number}") if names and domain else folder
                yield Document(f"{where}: row {number}", "", own, ids)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Arrow file: {str(error).splitlines()[0]}") from None


def _batches(path: Path) -> Iterator[Any]:
    """The record batches of a file, which may be of either kind that Arrow knows: a stream, or a file with an index."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            file.seek(0)
            with pa.ipc.open_file(file) as reader:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            return
        file.seek(0)
        with pa.ipc.open_stream(file) as reader:
            yield from reader


def _lists(column: Any, where: str) -> Iterator[NDArray[np.integer]]:
    """The rows of a column of lists of whole numbers."""
    import pyarrow as pa

    kind = column.type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not listed or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{where} is {kind}, not lists of whole numbers; name a column of token ids")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise UserError(f"{where} has missing values; remove those rows")
    numbers = values.to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(kind):
        ends = np.arange(1, len(column) + 1) * kind.list_size
    else:
        ends = column.offsets.to_numpy()[1:] - column.offsets[0].as_py()
    start = 0
    for end in ends.tolist():
        yield numbers[start:end]
        start = end


def _array_record() -> Any:
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError:
        raise UserError("array_record: the package array_record is not installed; pip install array_record") from None


def _read_records(module: Any, path: Path, where: str, feature: str, domain: str) -> Iterator[Document]:
    reader = module.ArrayRecordReader(str(path))
    if not reader.ok():
        raise UserError(f"{path}: not a readable array_record file; restore it")
    try:
        total = reader.num_records()
        for start in range(0, total, _RECORDS):
            for number, record in enumerate(reader.read(start, min(start + _RECORDS, total)), start):
                at = f"{path}: record {number}"
                yield Document(f"{where}: record {number}", "", domain, _chosen(record, feature, at))
    finally:
        reader.close()


def _chosen(record: bytes, feature: str, at: str) -> NDArray[np.int64]:
    """The ids in a record."""
    try:
        found = int64_features(record)
    except ValueError as error:
        raise UserError(f"{at}: not a tf.train.Example ({error}); the records must be serialised examples") from None
    if feature in found:
        return found[feature]
    known = ", ".join(sorted(found)) or "none"
    if feature:
        raise UserError(f"{at}: no feature {feature!r} of whole numbers; there are {known}")
    if len(found) != 1:
        raise UserError(f"{at}: features of whole numbers are {known}; name one: array_record:PATH:FEATURE")
    return next(iter(found.values()))
