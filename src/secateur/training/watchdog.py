"""What may go wrong in a long run: numbers that are not finite, losses that leap, steps that stall, a call to stop."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from secateur.progress import clock_time, notify

__all__ = ["StopSignal", "Watchdog", "stop_on_signals"]


class StopSignal:
    """Whether the run was told to stop."""

    is_set = False


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Let SIGTERM and SIGUSR1, by which schedulers announce an end, ask the run to save and stop.

    Within the main thread only; elsewhere nothing is changed.
    """
    stop, before = StopSignal(), {}

    def tell(number: int, frame: FrameType | None) -> None:
        stop.is_set = True

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Notices leaps of the loss, and steps that take far longer than those before.

    Args:
        label: of the run.
        memory: how many steps back the usual is reckoned from.
        least: seconds below which no step counts as stalled.
        report: is given an event, as plain values, besides its being said.
    """

    def __init__(
        self,
        label: str,
        *,
        memory: int = 64,
        least: float = 60.0,
        report: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.label, self.least, self.report = label, least, report
        self._losses: deque[float] = deque(maxlen=memory)
        self._seconds: deque[float] = deque(maxlen=memory)
        self._began = time.monotonic()
        self._step = 0
        self._stalled = False
        self._quiet_until = 0
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        self._began = time.monotonic()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def step(self, step: int, loss: float) -> float:
        """Take note of a finished step; return its seconds.

        A loss leaps if it lies six deviations, and 5%, above the mean of the last steps.
        """
        now = time.monotonic()
        seconds = now - self._began
        if len(self._losses) >= 8 and step >= self._quiet_until:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + max(6 * deviation, 0.05 * abs(mean)):
                self._tell(step, "spike", f"the loss leapt to {loss:.3f}, from {mean:.3f} on average", loss=loss)
                self._quiet_until = step + self._losses.maxlen  # type: ignore[operator]
        self._losses.append(loss)
        self._seconds.append(seconds)
        self._began, self._step, self._stalled = now, step + 1, False
        return seconds

    def pause(self) -> None:
        """Do not count what comes before the next step, such as an evaluation or a save."""
        self._began = time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds after which a step counts as stalled: ten times the usual."""
        return max(self.least, 10 * statistics.median(self._seconds)) if self._seconds else math.inf

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self.least / 4)):
            waited = time.monotonic() - self._began
            if not self._stalled and waited > self.patience:
                self._stalled = True
                usual = statistics.median(self._seconds)
                text = f"no end of this step for {clock_time(waited)}; steps took {usual:.3g} s before"
                self._tell(self._step, "stall", text, seconds=waited)

    def _tell(self, step: int, event: str, text: str, **facts: float) -> None:
        notify(f"{self.label}: step {step}: {text}")
        self.report({"event": event, "step": step, **facts})
