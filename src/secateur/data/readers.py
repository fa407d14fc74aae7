"""From files to documents: plain text, JSON lines, parquet.

A reader takes the path of a file and the name that its documents go by, and raises a UserError at the first record that
is not text, with the file and its line or row.
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
    """One text; ``id`` names its place in the source (file, file and line, or row).

    ``ids`` are those of a document that comes as ids, of shape [tokens]; its text is empty.
    """

    id: str
    text: str
    domain: str = ""
    ids: NDArray[np.integer] | None = None


@dataclass(frozen=True)
class Fields:
    """Where a record has its text, and its domain if it tells one; whether texts of white space alone are wanted."""

    text: str = "text"
    domain: str | None = None
    blank: bool = False

    def document(self, row: object, where: str, at: str, domain: str) -> Document:
        """The document of a record: named ``where``, from ``at``, of ``domain`` unless the record tells.

        Raises:
            UserError: if a field is missing or not text.
        """
        if self.domain is not None:
            domain = text_of(row, self.domain, at)
        return Document(where, text_of(row, self.text, at), domain)


def read_lossy(path: Path, where: str) -> Iterator[Document]:
    """The whole file; bytes that are not UTF-8 become U+FFFD."""
    yield Document(where, path.read_bytes().decode("utf-8", errors="replace"))


def read_plain(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document]:
    """The whole file, which must be UTF-8 text without NUL."""
    data = path.read_bytes()
    known = f"UTF-8 text, {' or '.join(TEXT_EXTENSIONS[1:])}"
    if b"\0" in data:
        raise UserError(f"{path}: a binary file; name {known}")
    if fields.domain is not None:
        raise UserError(f"{path}: plain text has no field {fields.domain!r} for a domain; name {known[12:]} files")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file, or name {known}") from None
    yield Document(where, text, domain)


def read_jsonl(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document]:
    """One JSON object a line; empty lines are passed over."""
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
                raise UserError(f"{path}:{number}: not valid JSON: {reason}; mend or remove the line") from None
            yield fields.document(row, f"{where}:{number}", f"{path}:{number}", domain)


def read_parquet(path: Path, where: str, fields: Fields, domain: str = "") -> Iterator[Document]:
    """The columns that are wanted, row by row."""
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
    """About how many bytes of text there are in a column, by the file's own account; 0 if it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        return 0  # whoever reads it will be told
    chunks = (group.column(c) for group in groups for c in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def text_of(row: object, field: str, where: str) -> str:
    """The text in ``field`` of a record; lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the field {field!r}, got {type(row).__name__}")
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise UserError(f"{where}: no field {field!r}; the fields are {fields}: name one of them")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is {type(text).__name__}, not text; name a field of strings")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
