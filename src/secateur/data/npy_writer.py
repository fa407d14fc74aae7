"""Write a ``.npy`` file piece by piece; its header is completed at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from secateur.files import sha256_file

__all__ = ["ColumnWriter"]


class ColumnWriter:
    """Writes a one-dimensional array to ``path``; nothing stays in memory.

    numpy pads headers so that their size does not depend on the length; the file equals that of ``numpy.save``.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype).newbyteorder("<"), 0
        self._file = path.open("wb")
        self._write_header()
        self._header = self._file.tell()

    def write(self, values: ArrayLike) -> None:
        """Append ``values``, of shape [values]; they must fit the dtype (not checked)."""
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data)
        self.length += len(array)

    def close(self) -> str:
        """Complete the file and return its SHA-256 in hexadecimal."""
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
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
