"""Warnings about loss spikes and stalled steps, and stopping on a signal."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from secateur import distributed
from secateur.formatting import fixed
from secateur.progress import clock_time, notify

__all__ = ["StopSignal", "Watchdog", "stop_on_signals"]


class StopSignal:
    """Whether a stop signal arrived."""

    is_set = False


@contextmanager
def stop_on_signals(task: str = "finishing the step and saving") -> Iterator[StopSignal]:
    """Set the stop signal on Ctrl-C, and on SIGTERM and SIGUSR1, which schedulers send before they end a job.

    A second Ctrl-C raises ``KeyboardInterrupt``, a third one ends the process. Works in the main thread only; in other
    threads signal handlers stay as they are. Where Ctrl-C is ignored, it stays so: another process handles it then.

    Args:
        task: what happens after the first Ctrl-C, for the line that says so.
    """
    stop, before = StopSignal(), {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, interrupt_again)
        stop.is_set = True
        if distributed.is_main():
            # Written at once and past every lock: the signal may have come while a progress bar was drawn.
            text = f"\ninterrupted: {task}; Ctrl-C again stops at once\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    def interrupt_again(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        handlers: dict[int, Callable[[int, FrameType | None], None]]
        handlers = {signal.SIGTERM: handle, signal.SIGUSR1: handle}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            handlers[signal.SIGINT] = interrupt
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Warns of loss spikes, and of steps that take far longer than earlier ones.

    Args:
        memory: steps back that means and medians cover.
        least: a step shorter than this many seconds is never stalled.
        report: receives each event as plain values, besides the warning.
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
        self._start = time.monotonic()
        self._step = 0
        self._stalled = False
        self._quiet_until = 0
        self._finished = threading.Event()

    def __enter__(self) -> Watchdog:
        self._start = time.monotonic()
        threading.Thread(target=self._watch_steps, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()

    def step(self, step: int, loss: float | None) -> float:
        """Record a finished step and return its seconds; ``loss`` is None for one without targets.

        A loss is a spike if it lies six deviations, and 5%, above the mean of the last steps.
        """
        end = time.monotonic()
        seconds = end - self._start
        if loss is not None and len(self._losses) >= 8 and step >= self._quiet_until:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + max(6 * deviation, 0.05 * abs(mean)):
                self._warn(
                    step, "spike", f"the loss leapt to {fixed(loss, 3)}, from {fixed(mean, 3)} on average", loss=loss
                )
                self._quiet_until = step + self._losses.maxlen  # type: ignore[operator]
        if loss is not None:
            self._losses.append(loss)
        self._seconds.append(seconds)
        self._start, self._step, self._stalled = end, step + 1, False
        return seconds

    def pause(self) -> None:
        """Leave the time until the next step, such as an evaluation or a save, out of that step."""
        self._start = time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds after which a step counts as stalled: ten times the median."""
        return max(self.least, 10 * statistics.median(self._seconds)) if self._seconds else math.inf

    def _watch_steps(self) -> None:
        while not self._finished.wait(min(1.0, self.least / 4)):
            waited = time.monotonic() - self._start
            if not self._stalled and waited > self.patience:
                self._stalled = True
                usual = statistics.median(self._seconds)
                text = f"no end of this step for {clock_time(waited)}; steps took {usual:.3g} s before"
                self._warn(self._step, "stall", text, seconds=waited)

    def _warn(self, step: int, event: str, text: str, **facts: float) -> None:
        notify(f"{self.label}: step {step}: {text}")
        self.report({"event": event, "step": step, **facts})
