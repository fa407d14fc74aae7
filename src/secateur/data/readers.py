"""Readers of documents from files: plain text, JSON, CSV and parquet, compressed or not.

A reader takes the path of a file and the name for its documents. It yields a ``BadRow`` for a record that is not text,
and raises a UserError where it cannot read on.

These are not the readers of ``datasets``: those guess the types of columns ("007" becomes 7, "NA" nothing) and name no
line in errors.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from secateur.data.documents import INVALID_UTF8, MALFORMED, BadRow, Document, Fields
from secateur.data.text_files import BOM, COMPRESSIONS, open_bytes, split_suffix
from secateur.errors import UserError
from secateur.files import refuse_pointer
from secateur.formatting import plural

__all__ = [
    "FORMATS",
    "TEXT_EXTENSIONS",
    "Reader",
    "has_fields",
    "is_metadata",
    "parquet_bytes",
    "read_lossy",
    "reader_of",
    "text_bytes",
]

Reader = Callable[[Path, str, Fields, str], Iterator[Document | BadRow]]

FORMATS = ".txt, .jsonl, .json, .csv, .tsv or .parquet"  #: for messages

_METADATA_BYTES = 1 << 20  # of a file that is parsed to see whether it is a description of data
_CELL = 2**31 - 1  # letters in a cell of a CSV file, at most
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, by the error handler "surrogateescape"
_JSON_START = re.compile(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')


def read_lossy(path: Path, where: str) -> Iterator[Document | BadRow]:
    """Read the whole file; bytes that are not UTF-8 become U+FFFD."""
    yield Document(where, path.read_bytes().decode("utf-8", errors="replace"))


def read_plain(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document | BadRow]:
    """Read the whole file, which must be UTF-8 text without NUL."""
    with open_bytes(path) as file:
        data = file.read()
    if b"\0" in data:
        raise UserError(f"{path}: a binary file; name UTF-8 text, {FORMATS.removeprefix('.txt, ')}")
    if fields.format != "text":
        raise UserError(f"{path}: plain text has no {fields.format}; name files with fields, such as .jsonl")
    if fields.domain is not None:
        raise UserError(f"{path}: plain text has no field {fields.domain!r} for a domain; name files with fields")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadRow(INVALID_UTF8, f"{path}: byte {error.start} is not UTF-8; convert the file, or name UTF-8 text")
        return
    if split_suffix(path)[0] != ".txt" and _JSON_START.match(text):
        raise UserError(f"{path}: JSON without a suffix that says so; rename it to .jsonl or .json to read its fields")
    yield Document(where, text, domain)


def read_json_lines(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document | BadRow]:
    """Read one JSON object per line; empty lines are skipped."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM)  # files with a mark may have been joined
            if not line.strip():
                continue
            at = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield BadRow(INVALID_UTF8, f"{at}: not UTF-8; convert the file")
            except (ValueError, RecursionError) as error:  # ValueError: also a number of over 4300 digits
                yield BadRow(MALFORMED, f"{at}: not valid JSON: {_reason(error)}; fix or remove the line")
            else:
                yield fields.document(row, f"{where}:{number}", at, domain)


def read_json(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document | BadRow]:
    """Read an array of objects, one object over several lines, or one object per line.

    An array is held in memory whole.
    """
    if _is_lines(path):
        yield from read_json_lines(path, where, fields, domain)
        return
    with open_bytes(path) as file:
        text = file.read().decode("utf-8", "surrogateescape")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "[":
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{path}{line}: not a valid JSON array: {_reason(error)}; fix the file") from None
        yield from read_json_lines(path, where, fields, domain)
        return
    del text
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        at = f"{path}: row {number}"
        document = fields.document(row, f"{where}:{number}", at, domain)
        yield _checked(row, fields, at) or document


def _is_lines(path: Path) -> bool:
    """Whether the first line with text is a JSON value of its own, and no array."""
    with open_bytes(path) as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        return not isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return False


def is_metadata(path: Path, field: str) -> bool:
    """Whether a file describes data instead of holding it: a small .json file of one object without the text field."""
    if split_suffix(path) != (".json", "") or path.stat().st_size > _METADATA_BYTES:
        return False
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and field not in value


def read_csv(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document | BadRow]:
    """Read one record per row, under a header with the names of columns; cells are text as they stand."""
    csv.field_size_limit(_CELL)
    delimiter = "\t" if split_suffix(path)[0] == ".tsv" else ","
    with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if header:
                fields.require(header, str(path), "column")
            line = rows.line_num + 1
            for cells in rows:
                at, name, line = f"{path}:{line}", f"{where}:{line}", rows.line_num + 1
                if not cells:  # an empty line
                    continue
                if len(cells) != len(header):
                    message = (
                        f"{at}: {plural(len(cells), 'cell')} under a header of {len(header)}; fix or remove the row"
                    )
                    yield BadRow(MALFORMED, message)
                    continue
                row = dict(zip(header, cells, strict=True))
                yield _checked(row, fields, at) or fields.document(row, name, at, domain)
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not valid CSV: {error}; fix the quotes of the row") from None


def _checked(row: object, fields: Fields, at: str) -> BadRow | None:
    """A record with bytes that are not UTF-8, as "surrogateescape" decodes them."""
    values = [row.get(name) for name in fields.columns(row)] if isinstance(row, dict) else []
    texts = (json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in values)
    if any(isinstance(text, str) and _UNDECODED.search(text) for text in texts):
        return BadRow(INVALID_UTF8, f"{at}: not UTF-8; convert the file")
    return None


def read_parquet(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document | BadRow]:
    """Read the text and domain columns row by row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if split_suffix(path)[1]:
        raise UserError(f"{path}: a compressed parquet file cannot be read; decompress it")
    try:
        refuse_pointer(path)
        with pq.ParquetFile(path) as file:
            fields.require(file.schema_arrow.names, str(path), "column")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=fields.columns(file.schema_arrow.names)):
                for row in _rows(batch):
                    at = f"{path}: row {number}"
                    if row is None:
                        yield BadRow(INVALID_UTF8, f"{at}: not UTF-8; write the file again from valid text")
                    else:
                        yield fields.document(row, f"{where}:{number}", at, domain)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one with bytes that are not UTF-8, which writers of parquet do not check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                row = batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                row = None
            yield row


def parquet_bytes(path: Path, column: str) -> int:
    """Approximate bytes of text in a column, from the file's metadata; 0 without such a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        return 0  # reading the file raises the error
    chunks = (group.column(c) for group in groups for c in range(group.num_columns))
    # Columns of lists and objects have their parts below them.
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def text_bytes(path: Path, column: str) -> int | None:
    """Approximate bytes of text in a file; None if it is compressed."""
    suffix, compression = split_suffix(path)
    if compression:
        return None
    return parquet_bytes(path, column) if suffix == ".parquet" else path.stat().st_size


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error)


_READERS: dict[str, Reader] = {
    ".txt": read_plain,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
    ".json": read_json,
    ".ndjson": read_json_lines,
    ".jsonlines": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
}

#: of the files that a folder of text is searched for
TEXT_EXTENSIONS = (
    *_READERS,
    *(suffix + compression for suffix in _READERS if suffix != ".parquet" for compression in COMPRESSIONS),
)


def reader_of(path: Path) -> Reader:
    """The reader for a file, by its suffix; plain text for an unknown one."""
    return _READERS.get(split_suffix(path)[0], read_plain)


def has_fields(path: Path) -> bool:
    """Whether the records of a file have fields with names."""
    return reader_of(path) is not read_plain
