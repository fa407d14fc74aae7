"""The workload that speed and memory are measured on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """Sizes of a timed run."""

    prompt: int = 512  #: tokens of the prompt
    new: int = 64  #: generated tokens
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 7
    warm_up: int = 2  #: runs before those that count

    def within(self, limit: int | None) -> Workload:
        """Shorten the workload to ``limit`` positions; None for no limit."""
        if limit is None or self.prompt + self.new <= limit:
            return self
        new = max(2, min(self.new, limit // 4))
        return Workload(max(1, limit - new), new, self.batches, self.repeats, self.warm_up)
