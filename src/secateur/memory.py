"""The memory and time that a run uses, and the memory that is free."""

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
    """What a run took."""

    seconds: float = 0.0
    memory: int | None = None  #: bytes of anonymous memory at the peak; None where the system does not tell
    device: int | None = None  #: bytes allocated on the GPU at the peak; None without one


@contextlib.contextmanager
def track_resources(device: str, interval: float = 0.05) -> Iterator[ResourceUse]:
    """Watch this process while the block runs; the figures are there when it ends.

    Memory is what the process alone holds (``RssAnon``): mapped files, such as the checkpoint, can be dropped and read
    again at any time, and do not count. It is sampled, so that a peak shorter than ``interval`` seconds may be missed.
    """
    use, start, over = ResourceUse(), time.monotonic(), threading.Event()

    def sample() -> None:
        while True:
            held = _anonymous()
            if held is not None:
                use.memory = max(use.memory or 0, held)
            if over.wait(interval):
                return

    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield use
    finally:
        over.set()
        thread.join()
        use.seconds = time.monotonic() - start
        if device.startswith("cuda"):
            import torch

            use.device = torch.cuda.max_memory_allocated(device)


def _anonymous() -> int | None:
    return _field(_STATUS, "RssAnon:")


def free_memory() -> int | None:
    """Bytes that the system could give; None where it does not tell."""
    return _field(Path("/proc/meminfo"), "MemAvailable:")


def free_device_memory(device: str) -> int:
    """Bytes that a GPU could give."""
    import torch

    return torch.cuda.mem_get_info(device)[0]


def _field(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None
