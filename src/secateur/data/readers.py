"""Readers of documents from files: plain text, JSON lines, parquet.

A reader takes the path of a file and the name for its documents. It raises a UserError with file and line or row at the
first record that is not text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UserError

__all__ = [
    "TEXT_EXTENSIONS",
    "Document",
    "Fields",
    "parquet_bytes",
    "read_jsonl",
    "read_lossy",
    "read_parquet",
    "read_plain",
    "text_of",
]

TEXT_EXTENSIONS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """A text, or token ids."""

    id: str  #: position in the source: file, file and line, or row
    text: str  #: empty for a document of ids
    domain: str = ""
    ids: NDArray[np.integer] | None = None  #: [tokens]


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields."""

    text: str = "text"
    domain: str | None = None  #: None if records do not name their domain
    blank: bool = False  #: whether to include texts of white space only

    def document(self, row: object, where: str, at: str, domain: str) -> Document:
        """Make a document of a record.

        Args:
            at: position of the record, for errors.
            domain: of the document, unless the record has a field for it.

        Raises:
            UserError: if a field is missing or not text.
        """
        if self.domain is not None:
            domain = text_of(row, self.domain, at)
        return Document(where, text_of(row, self.text, at), domain)


def read_lossy(path: Path, where: str) -> Iterator[Document]:
    """Read the whole file; bytes that are not UTF-8 become U+FFFD."""
    yield Document(where, path.read_bytes().decode("utf-8", errors="replace"))


def read_plain(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document]:
    """Read the whole file, which must be UTF-8 text without NUL."""
    data = path.read_bytes()
    formats = " or ".join(TEXT_EXTENSIONS[1:])
    expected = f"UTF-8 text, {formats}"
    if b"\0" in data:
        raise UserError(f"{path}: a binary file; name {expected}")
    if fields.domain is not None:
        raise UserError(f"{path}: plain text has no field {fields.domain!r} for a domain; name {formats} files")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file, or name {expected}") from None
    yield Document(where, text, domain)


def read_jsonl(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document]:
    """Read one JSON object per line; empty lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not UTF-8; convert the file") from None
            except (ValueError, RecursionError) as error:  # ValueError: also a number of over 4300 digits
                reason = getattr(error, "msg", error)
                raise UserError(f"{path}:{number}: not valid JSON: {reason}; fix or remove the line") from None
            yield fields.document(row, f"{where}:{number}", f"{path}:{number}", domain)


def read_parquet(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document]:
    """Read the text and domain columns row by row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [fields.text, *([fields.domain] if fields.domain else [])]
    try:
        with pq.ParquetFile(path) as file:
            for field in columns:
                if field not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names)
                    raise UserError(f"{path}: no column {field!r}; the columns are {names}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    yield fields.document(row, f"{where}:{number}", f"{path}: row {number}", domain)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


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
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def text_of(row: object, field: str, where: str) -> str:
    """Return the text in ``field`` of a record; lone surrogates, valid in JSON but not in UTF-8, become U+FFFD."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the field {field!r}, got {type(row).__name__}")
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where}: no field {field!r}; the fields are {fields}: name one of them")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is {type(text).__name__}, not text; name a field of strings")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
