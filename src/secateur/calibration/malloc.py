"""How freed memory goes back to the system, which the C library would rather keep. glibc alone is told anything."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator

__all__ = ["map_tensors", "release_memory", "reserve_heap"]


def release_memory() -> None:
    """Give freed memory back to the system; glibc keeps it otherwise and a long walk would creep upwards."""
    gc.collect(1)  # what became garbage since the last block; all objects would take seconds in a short walk
    _libc("malloc_trim", 0)


def map_tensors(larger_than: int = 2**17) -> None:
    """Have glibc take the memory of tensors of more bytes from the system, one by one, and give it back at once.

    It would raise the size from which it does so with each tensor that is freed, and then carve weights out of one
    heap, which grows around small objects to a multiple of what is in use.
    """
    _libc("mallopt", _M_MMAP_THRESHOLD, larger_than + 1)
    _libc("mallopt", _M_TRIM_THRESHOLD, 16 * larger_than)


@contextlib.contextmanager
def reserve_heap(activation: int) -> Iterator[None]:
    """Let activations of so many bytes lie in the heap, which keeps their room from one batch to the next.

    Each page that is given back must be zeroed when it is taken again: a fifth of the time of a small model's walk.
    Not where the process has a limit (``ulimit -d``, ``-v``): what outlives a block lies between its activations, so
    that the next block's larger ones find no hole and the heap grows, and a limit counts the holes, though they are
    given back.
    """
    if activation <= _HEAP and not _limited():
        map_tensors(max(activation, 2**17))
    try:
        yield
    finally:
        map_tensors()


_HEAP = 2**23  #: bytes of a tensor that may lie in the heap; pages matter little to products as large as its
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _limited() -> bool:
    """Whether the system counts what the process has reserved, used or not."""
    limits = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


def _libc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
