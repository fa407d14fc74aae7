"""Memory and time used by a run, and free memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ResourceUse", "free_device_memory", "free_memory", "track_resources"]

_STATUS = Path("/proc/self/status")


@dataclass
class ResourceUse:
    """Time and peak memory of a run."""

    seconds: float = 0.0
    memory: int | None = None  #: peak bytes of anonymous memory; None if the system does not report it
    device: int | None = None  #: peak bytes allocated on the GPU; None without one


@contextlib.contextmanager
def track_resources(device: str, interval: float = 0.05) -> Iterator[ResourceUse]:
    """Measure this process while the block runs; the values are final when it ends.

    Memory is ``RssAnon``: mapped files, such as the checkpoint, do not count because the system can drop them. It is
    sampled, so a peak shorter than ``interval`` seconds may be missed.
    """
    use, start, stop = ResourceUse(), time.monotonic(), threading.Event()

    def sample() -> None:
        while True:
            memory = _read_bytes(_STATUS, "RssAnon:")
            if memory is not None:
                use.memory = max(use.memory or 0, memory)
            if stop.wait(interval):
                return

    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield use
    finally:
        stop.set()
        thread.join()
        use.seconds = time.monotonic() - start
        if device.startswith("cuda"):
            import torch

            use.device = torch.cuda.max_memory_allocated(device)


def free_memory() -> int | None:
    """Bytes of free system memory; None if the system does not report it."""
    return _read_bytes(Path("/proc/meminfo"), "MemAvailable:")


def free_device_memory(device: str) -> int:
    """Bytes of free memory on a GPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0]


def _read_bytes(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None
