"""safetensors files read and written tensor by tensor: none has to be in memory beside the others.

The library's own reader maps a file so that it may be written to in memory, which the system counts, in full, as
memory that the process may need; and its writer wants all tensors at once. Files are checked with the library.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.errors import UserError

__all__ = ["CONVERT", "Stored", "TensorFile", "write_order", "write_tensors"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_TYPES = {name: dtype for dtype, name in _NAMES.items()}

CONVERT = "convert the checkpoint to bfloat16, float16 or float32 first"


class TensorFile:
    """A safetensors file whose tensors are views into the mapped file, not to be written to.

    Raises:
        SafetensorError, OSError: if the file is damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="np"):  # checks the header against the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + length
        header.pop("__metadata__", None)
        self._header = header

    @property
    def bytes(self) -> Tensor:
        """The whole file, header and all."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._header)

    def size(self, name: str) -> tuple[int, ...]:
        """A tensor's size."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type.

        Raises:
            UserError: if the type is not supported, such as eight-bit floats.
        """
        stored = self._header[name]["dtype"]
        if stored not in _TYPES:
            raise UserError(f"{self._path}: {name} is stored as {stored}, which is not read here; {CONVERT}")
        return _TYPES[stored]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A tensor from index ``start`` to before ``stop`` of its first dimension."""
        size, dtype = self.size(name), self.dtype(name)
        row = torch.Size(size[1:]).numel()
        offset = self._start + self._header[name]["data_offsets"][0] + start * row * dtype.itemsize
        count = (stop - start) * row
        if not count:
            return torch.empty((stop - start, *size[1:]), dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        return flat.reshape(stop - start, *size[1:])

    def tensor(self, name: str) -> Tensor:
        """A tensor, whole."""
        size = self.size(name)
        return self.rows(name, 0, size[0]) if size else self._scalar(name)

    def _scalar(self, name: str) -> Tensor:
        offset = self._start + self._header[name]["data_offsets"][0]
        dtype = self.dtype(name)
        data = bytearray(self._map[offset : offset + dtype.itemsize])
        return torch.frombuffer(data, dtype=dtype).reshape(())


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its entry in the header, and a function that makes its values when they are needed."""

    name: str
    dtype: torch.dtype
    size: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]  #: yields the tensor, or consecutive pieces of its first dimension

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Stored:
        """Declare a tensor that is in memory."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.size).numel() * self.dtype.itemsize


def write_order(tensors: Iterable[Stored]) -> list[Stored]:
    """The widest types first, so that each tensor lies at a multiple of its type's size; names are sorted."""
    return sorted(tensors, key=lambda stored: (-stored.dtype.itemsize, stored.name))


def write_tensors(
    path: Path,
    tensors: Iterable[Stored],
    metadata: dict[str, str] | None = None,
    written: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a safetensors file; one tensor, or one part of it, is in memory at a time.

    Args:
        written: called with the size in bytes of each tensor that has been written.

    Raises:
        ValueError: if a tensor has another type or size than its declaration.
    """
    ordered = write_order(tensors)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for stored in ordered:
        stop = start + stored.bytes
        header[stored.name] = {"dtype": _NAMES[stored.dtype], "shape": stored.size, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored in ordered:
            remaining = stored.bytes
            for part in stored.parts():
                if part.dtype != stored.dtype or part.shape[1:] != stored.size[1:]:
                    raise ValueError(f"{stored.name} is {part.dtype} {tuple(part.shape)}, not {stored}")
                data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(data.numpy().data)  # numpy's tofile() does not notice a disk that is full
                remaining -= data.numel()
            if remaining:
                raise ValueError(f"{stored.name} has {stored.bytes - remaining} bytes, not {stored.bytes}")
            written(stored.bytes)
