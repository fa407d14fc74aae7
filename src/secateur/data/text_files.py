"""Bytes of text files: compressed or not, without a byte order mark."""

from __future__ import annotations

import codecs
import contextlib
import io
import lzma
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import UserError
from secateur.files import refuse_pointer

__all__ = ["BOM", "COMPRESSIONS", "open_bytes", "split_suffix"]

BOM = codecs.BOM_UTF8

#: suffix -> codec of pyarrow, which has all but xz
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".xz": None}

#: the longer marks first: that of UTF-32 begins as that of UTF-16 does
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


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
        UserError: if the file cannot be read, is UTF-16 or UTF-32, or stands for one that git-lfs has not fetched.
    """
    _, compression = split_suffix(path)
    try:
        refuse_pointer(path)
        with _open(path, compression) as file:
            head = file.peek(4)
            if encoding := next((name for mark, name in _WIDE.items() if head.startswith(mark)), None):
                raise UserError(f"{path}: {encoding} text; convert it: iconv -f {encoding} -t UTF-8 {path.name}")
            if head.startswith(BOM):
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
