"""Bytes of text files: compressed or not, without a byte order mark."""

from __future__ import annotations

import codecs
import contextlib
import io
import lzma
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import UserError

__all__ = ["BOM", "COMPRESSIONS", "open_bytes", "split_suffix"]

BOM = codecs.BOM_UTF8

#: suffix -> codec of pyarrow, which has all but xz
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".xz": None}

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def split_suffix(path: Path) -> tuple[str, str]:
    """Return the suffix of a file's format and that of its compression, in lower case; empty for none.

    >>> split_suffix(Path("c4-train.00000-of-01024.JSON.gz"))
    ('.json', '.gz')
    """
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSIONS else (suffix, "")


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader | lzma.LZMAFile]:
    """Open a text file for reading behind its byte order mark, decompressed.

    Raises:
        UserError: if the file cannot be read or is UTF-16.
    """
    _, compression = split_suffix(path)
    try:
        with _open(path, compression) as file:
            head = file.peek(len(BOM))[: len(BOM)]
            if head[:2] in _UTF16:
                raise UserError(f"{path}: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
            if head == BOM:
                file.read(len(BOM))
            yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        kind = f"{compression} file" if compression else "file"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable {kind}: {reason}; restore it") from None


def _open(path: Path, compression: str) -> io.BufferedReader | lzma.LZMAFile:
    if not compression:
        return path.open("rb")
    codec = COMPRESSIONS[compression]
    if codec is None:
        return lzma.open(path)
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=codec))  # type: ignore[arg-type]
