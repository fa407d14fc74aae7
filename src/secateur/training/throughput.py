"""How fast a run is: tokens a second, and the share of what the device could do at most (MFU, arXiv:2204.02311)."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

__all__ = ["Meter", "Peak", "peak_of"]

#: dense bfloat16 products, without sparsity, as the makers state them: part of a device's name -> FLOPs a second
_BFLOAT16 = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Peak:
    """FLOPs a second of one process's device, and where the figure comes from."""

    flops: float
    source: str


def peak_of(device: str, dtype: str) -> Peak:
    """The most that a device can do: as its maker states it, else as a product of two large matrices shows."""
    if device.startswith("cuda") and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for known, flops in _BFLOAT16.items():
            if known in name:
                return Peak(flops, f"{known}, {dtype}")
    return Peak(_measured(device, getattr(torch, dtype)), f"measured, {dtype}")


def _measured(device: str, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    a = torch.randn(size, size, dtype=dtype, device=device)
    best, start = 0.0, time.monotonic()
    while time.monotonic() - start < seconds or not best:
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


class Meter:
    """Tokens a second over the last steps, of all processes, and what share of the peak that is.

    Args:
        flops_per_token: of training.
        peak: of all processes together, FLOPs a second; None where no share is asked for.
        memory: over how many steps.
    """

    def __init__(self, flops_per_token: float = 0.0, peak: float | None = None, memory: int = 16) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak
        self._steps: deque[tuple[int, float]] = deque(maxlen=memory)
        self.tokens, self.seconds = 0, 0.0  #: of all steps

    def step(self, tokens: int, seconds: float) -> None:
        """Take note of a step."""
        self._steps.append((tokens, seconds))
        self.tokens += tokens
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Tokens a second."""
        seconds = sum(s for _, s in self._steps)
        return sum(t for t, _ in self._steps) / seconds if seconds else 0.0

    @property
    def utilization(self) -> float | None:
        """MFU, a share."""
        return self.rate * self.flops_per_token / self.peak if self.peak else None
