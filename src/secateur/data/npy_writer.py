"""A column of numbers on disk, written piece by piece: a plain ``.npy`` file whose header is completed at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from secateur.files import sha256_file

__all__ = ["ColumnWriter"]


class ColumnWriter:
    """Write numbers to the one-dimensional array in ``path``; nothing written stays in memory.

    numpy leaves room in a header for the length to grow, so that the header of any length has the same size and the
    file is byte for byte what ``numpy.save`` writes.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype).newbyteorder("<"), 0
        self._file = path.open("wb")
        self._write_header()
        self._header = self._file.tell()

    def write(self, values: ArrayLike) -> None:
        """Append ``values``, of shape [values]; they must fit the dtype, which is not checked."""
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data)
        self.length += len(array)

    def close(self) -> str:
        """Complete the file; returns its SHA-256 in hexadecimal."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._header:
            raise RuntimeError(f"{self.path}: the header of {self.length} values does not fit its place")
        self._file.close()
        return sha256_file(self.path)

    def abandon(self) -> None:
        """Close the file as it is, e.g. after an error."""
        self._file.close()

    def _write_header(self) -> None:
        described = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, described)
