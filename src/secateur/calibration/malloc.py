"""Returning freed memory to the system. Only affects glibc, which would keep it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator

__all__ = ["map_tensors", "release_memory", "reserve_heap"]


def release_memory() -> None:
    """Return freed memory to the system; otherwise the memory of a long walk grows."""
    gc.collect(1)  # young objects only; a full collection takes seconds in a short walk
    _libc("malloc_trim", 0)


def map_tensors(larger_than: int = 2**17) -> None:
    """Make glibc map tensors of more than ``larger_than`` bytes one by one, and unmap them when they are freed.

    By default glibc raises this threshold whenever a tensor is freed. Weights then come from one heap, which fragments
    and grows to a multiple of the memory in use.
    """
    _libc("mallopt", _M_MMAP_THRESHOLD, larger_than + 1)
    _libc("mallopt", _M_TRIM_THRESHOLD, 16 * larger_than)


@contextlib.contextmanager
def reserve_heap(activation: int) -> Iterator[None]:
    """Allocate activations of ``activation`` bytes in the heap, which keeps their memory from batch to batch.

    Mapped pages are zeroed each time: a fifth of the time of a small model's walk. The heap is not used if the process
    has a memory limit (``ulimit -d``, ``-v``): it fragments, and a limit counts the holes although they are returned.
    """
    if activation <= _HEAP and not _has_memory_limit():
        map_tensors(max(activation, 2**17))
    try:
        yield
    finally:
        map_tensors()


_HEAP = 2**23  #: largest tensor in the heap; for larger ones the cost of zeroing pages is small
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _has_memory_limit() -> bool:
    """Whether the system limits the memory that the process reserves, used or not."""
    limits = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


def _libc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
