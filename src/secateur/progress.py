"""Progress with an ETA, on standard error: bars on a terminal, occasional lines elsewhere, messages from workers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.errors import spell

__all__ = [
    "LineListener",
    "Listener",
    "ProgressTask",
    "SilentListener",
    "clock_time",
    "close",
    "listener",
    "notify",
    "set_listener",
    "set_spelling",
    "track",
]

_spelling: Callable[[str], str | None] = lambda _: None  # noqa: E731 - replaced by the command line
console = Console(stderr=True, highlight=False, soft_wrap=True)


def clock_time(seconds: float) -> str:
    """``75`` as ``1:15``; hours appear when there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Listener(Protocol):
    """What shows progress. ``key`` tells one running task from another; a ``total`` of 0 is one that nobody knows."""

    def update(self, key: str, done: float, total: float, note: str) -> None: ...

    def finish(self, key: str) -> None: ...

    def message(self, text: str) -> None: ...


class Bars:
    """Live bars for a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def update(self, key: str, done: float, total: float, note: str) -> None:
        if key not in self.tasks:
            if not self.tasks:
                self.progress.start()
            self.tasks[key] = self.progress.add_task(key, total=total or None, note=note)
        self.progress.update(self.tasks[key], completed=done, total=total or None, note=note)

    def finish(self, key: str) -> None:
        found = self.tasks.pop(key, None)
        if found is not None:
            self.progress.remove_task(found)
        if not self.tasks:
            self.progress.stop()

    def message(self, text: str) -> None:
        console.print(text, markup=False)


class LineListener:
    """One line for each task every ``interval`` seconds, on standard error or where ``write`` puts it."""

    def __init__(self, interval: float = 15.0, write: Callable[[str], object] | None = None) -> None:
        self.interval = interval
        self.write = write or (lambda text: print(text, file=sys.stderr, flush=True))
        self.seen: dict[str, tuple[float, float, float]] = {}  # key -> (start, done at start, last print)

    def update(self, key: str, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        start, first, last = self.seen.setdefault(key, (now, done, now))
        if now - last >= self.interval and not total:
            self.seen[key] = (start, first, now)
            self.message(f"{key}: {note}")
        elif now - last >= self.interval and done > first:
            eta = (now - start) * (total - done) / (done - first)
            self.seen[key] = (start, first, now)
            self.message(f"{key}: {100 * done / max(total, 1e-9):.0f}%  {note}  ETA {clock_time(eta)}")

    def finish(self, key: str) -> None:
        self.seen.pop(key, None)

    def message(self, text: str) -> None:
        self.write(text)


class SilentListener:
    """Shows nothing."""

    def update(self, key: str, done: float, total: float, note: str) -> None:
        pass

    def finish(self, key: str) -> None:
        pass

    def message(self, text: str) -> None:
        pass


_listener: Listener | None = None


def listener() -> Listener:
    """What shows progress at present."""
    global _listener
    if _listener is None:
        _listener = Bars() if console.is_terminal else LineListener()
    return _listener


def set_listener(new: Listener) -> None:
    """Send progress elsewhere from now on, as a worker process does."""
    global _listener
    _listener = new


def close() -> None:
    """Take down what is still shown, e.g. the bars of tasks that were interrupted."""
    global _listener
    if isinstance(_listener, Bars):
        _listener.progress.stop()
    _listener = None


def notify(text: str) -> None:
    """Print one message on standard error; fields in backticks are spelled as in errors (``secateur.errors.spell``)."""
    listener().message(spell(text, _spelling))


def set_spelling(spelling: Callable[[str], str | None]) -> None:
    """Spell the fields that messages name in backticks by ``spelling``, as the command line does."""
    global _spelling
    _spelling = spelling


class ProgressTask:
    """One piece of work under way."""

    def __init__(self, key: str, total: float) -> None:
        self.key, self.total, self.done = key, total, 0.0

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count ``amount`` more as done; ``note`` is shown beside the bar."""
        self.done += amount
        listener().update(self.key, self.done, self.total, note)


@contextlib.contextmanager
def track(key: str, total: float) -> Iterator[ProgressTask]:
    """Show progress named ``key`` until the block ends; ``total`` is 0 where nobody knows it."""
    listener().update(key, 0.0, total, "")
    try:
        yield ProgressTask(key, total)
    finally:
        listener().finish(key)
