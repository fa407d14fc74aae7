"""Sources of token ids: ``arrow:PATH[:column]`` and ``array_record:PATH[:feature]``.

A row or record is one document. ``arrow:`` reads folders that ``datasets`` wrote with ``save_to_disk``, or any Arrow
files; ``array_record:`` reads serialised ``tf.train.Example`` messages with the package ``array_record``, without
TensorFlow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.documents import Document, text_of
from secateur.data.local_files import FileSource, by_relative_path, folder_domain, walk
from secateur.data.sources import Source
from secateur.data.tf_example import int64_features
from secateur.errors import UserError
from secateur.files import read_json
from secateur.runtime import install_command

__all__ = ["TOKEN_SOURCE_FORMS", "is_tokenized", "open_tokenized"]

TOKEN_SOURCE_FORMS = ("arrow:PATH", "array_record:PATH")  #: for error messages

_COLUMN = "input_ids"
_BATCH = 1024  # records


def is_tokenized(source: str) -> bool:
    """Whether ``source`` names a source of token ids."""
    return any(source.startswith(form.partition("PATH")[0]) for form in TOKEN_SOURCE_FORMS)


def open_tokenized(source: str, *, split: str = "train", domain: str | None = None) -> Source:
    """Open a source of token ids.

    Args:
        source: ``arrow:PATH[:column]`` (a folder saved by ``datasets``, or Arrow files; the default column is
            ``input_ids``) or ``array_record:PATH[:feature]`` (a file or a folder; the default feature is the only
            integer feature).
        split: of a saved ``DatasetDict``.
        domain: the column of an Arrow file that names a document's domain; None for the first subfolder.

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
        raise UserError(
            f"`domain`: {domain!r} cannot be read from array_record files; put each domain in a folder of its own"
        )
    module = _array_record()
    return _source(
        source, path, (".array_record", ".arrayrecord"), lambda f, at, d: _read_records(module, f, at, name, d)
    )


def _path_and_name(source: str, rest: str) -> tuple[Path, str]:
    """Split PATH:NAME, unless the colon belongs to the path."""
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
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise UserError(f"arrow:{path}: no split {split!r}; set `split` to one of {splits}")
    return path / split


def _check_saved(path: Path) -> None:
    """Refuse a dataset with an indices file, which older versions of ``datasets`` could save."""
    state = path / "state.json"
    if state.is_file() and read_json(state).get("_indices_data_files"):
        raise UserError(f"arrow:{path}: it has an indices file; call flatten_indices() and save it again")


def _read_arrow(path: Path, where: str, column: str, domain: str | None, folder: str) -> Iterator[Document]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path):
            for name in (column, *([domain] if domain else [])):
                if name not in batch.schema.names:
                    hint = "; text is read from hf:DIR" if name == _COLUMN else ""
                    raise UserError(
                        f"{path}: no column {name!r}; the columns are {', '.join(batch.schema.names)}{hint}"
                    )
            names = batch.column(domain).to_pylist() if domain else None
            for i, ids in enumerate(_lists(batch.column(column), f"{path}: column {column!r}")):
                label = text_of({domain: names[i]}, domain, f"{path}: row {number}") if names and domain else folder
                yield Document(f"{where}: row {number}", "", label, ids)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Arrow file: {str(error).splitlines()[0]}") from None


def _batches(path: Path) -> Iterator[Any]:
    """The record batches of an Arrow file, in either the stream or the file format."""
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
    """The rows of a column of integer lists."""
    import pyarrow as pa

    dtype = column.type
    listed = pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
    if not listed or not pa.types.is_integer(dtype.value_type):
        raise UserError(f"{where} is {dtype}, not lists of whole numbers; name a column of token ids")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise UserError(f"{where} has missing values; remove those rows")
    numbers = values.to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(dtype):
        ends = np.arange(1, len(column) + 1) * dtype.list_size
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
        command = install_command("array_record")
        raise UserError(f"array_record: the package array_record is not installed; {command}") from None


def _read_records(module: Any, path: Path, where: str, feature: str, domain: str) -> Iterator[Document]:
    reader = module.ArrayRecordReader(str(path))
    if not reader.ok():
        raise UserError(f"{path}: not a readable array_record file; restore it")
    try:
        total = reader.num_records()
        for start in range(0, total, _BATCH):
            for number, record in enumerate(reader.read(start, min(start + _BATCH, total)), start):
                at = f"{path}: record {number}"
                yield Document(f"{where}: record {number}", "", domain, _select_feature(record, feature, at))
    finally:
        reader.close()


def _select_feature(record: bytes, feature: str, at: str) -> NDArray[np.int64]:
    """Return the ids in a record."""
    try:
        features = int64_features(record)
    except ValueError as error:
        raise UserError(f"{at}: not a tf.train.Example ({error}); the records must be serialised examples") from None
    if feature in features:
        return features[feature]
    names = ", ".join(sorted(features)) or "none"
    if feature:
        raise UserError(f"{at}: no feature {feature!r} of whole numbers; there are {names}")
    if len(features) != 1:
        raise UserError(f"{at}: features of whole numbers are {names}; name one: array_record:PATH:FEATURE")
    return next(iter(features.values()))
