"""Throughput: tokens a second, and model FLOPs utilisation (MFU, arXiv:2204.02311)."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

from secateur.runtime import BFLOAT16_PEAKS

__all__ = ["Meter", "Peak", "peak_of"]


@dataclass(frozen=True)
class Peak:
    """Peak FLOPs a second of one process's device, and its source."""

    flops: float
    source: str


def peak_of(device: str, dtype: str) -> Peak:
    """Peak FLOPs of a device: from its data sheet, else measured with a product of two matrices."""
    if device.startswith("cuda") and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for model, flops in BFLOAT16_PEAKS.items():
            if model in name:
                return Peak(flops, f"{model}, {dtype}")
    return Peak(_measure_flops(device, getattr(torch, dtype)), f"measured, {dtype}")


def _measure_flops(device: str, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    a = torch.randn(size, size, dtype=dtype, device=device)
    best, start = 0.0, time.monotonic()
    while time.monotonic() - start < seconds or not best:
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # item() waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


class Meter:
    """Tokens a second over the last steps, of all processes, as a number and as a share of the peak.

    Args:
        flops_per_token: FLOPs of training on a token.
        peak: FLOPs a second of all processes together; None to compute no share.
        memory: number of last steps.
    """

    def __init__(self, flops_per_token: float = 0.0, peak: float | None = None, memory: int = 16) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak
        self._steps: deque[tuple[int, float]] = deque(maxlen=memory)
        self.tokens, self.seconds = 0, 0.0  #: of all steps

    def step(self, tokens: int, seconds: float) -> None:
        """Record a step."""
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
