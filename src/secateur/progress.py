"""Progress with an ETA, on standard error: bars on a terminal, occasional lines elsewhere, messages from workers."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

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
    "notify_once",
    "set_listener",
    "set_spelling",
    "track",
]

_spelling: Callable[[str], str | None] = lambda _: None  # noqa: E731 - replaced by the command line
console = Console(stderr=True, highlight=False, soft_wrap=True)


def clock_time(seconds: float) -> str:
    """Format seconds, e.g. 75 as ``1:15`` and 3675 as ``1:01:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Listener(Protocol):
    """Displays progress. ``key`` identifies a running task; a ``total`` of 0 means unknown.

    ``seconds_left`` is an estimate of the task's own; None for one by the rate of its progress.
    """

    def update(self, key: str, done: float, total: float, note: str, seconds_left: float | None = None) -> None: ...

    def finish(self, key: str) -> None: ...

    def message(self, text: str) -> None: ...


class _TimeLeftColumn(TimeRemainingColumn):
    """The task's own estimate of the time left; without one, an estimate by the rate of its progress."""

    def render(self, task: Task) -> Text:
        seconds = task.fields.get("seconds_left")
        return super().render(task) if seconds is None else Text(clock_time(seconds), style="progress.remaining")


class _ShortenedColumn(TextColumn):
    """Text that a narrow terminal cuts short, so that the columns of times keep their place."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False, table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class BarListener:
    """Live bars for a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            _ShortenedColumn("{task.description}"),
            BarColumn(24 if console.width >= 110 else 8, table_column=Column(no_wrap=True)),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("ETA"),
            _TimeLeftColumn(compact=True, table_column=Column(no_wrap=True)),
            _ShortenedColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def update(self, key: str, done: float, total: float, note: str, seconds_left: float | None = None) -> None:
        fields = {"note": note, "seconds_left": seconds_left}
        if key not in self.tasks:
            if not self.tasks:
                self.progress.start()
            self.tasks[key] = self.progress.add_task(key, total=total or None, **fields)
        self.progress.update(self.tasks[key], completed=done, total=total or None, **fields)

    def finish(self, key: str) -> None:
        task = self.tasks.pop(key, None)
        if task is not None:
            self.progress.remove_task(task)
        if not self.tasks:
            self.progress.stop()

    def message(self, text: str) -> None:
        console.print(text, markup=False)


class LineListener:
    """Writes a line for each task every ``interval`` seconds, by default to standard error."""

    def __init__(self, interval: float = 15.0, write: Callable[[str], object] | None = None) -> None:
        self.interval = interval
        self.write = write or (lambda text: print(text, file=sys.stderr, flush=True))
        self.timings: dict[str, tuple[float, float, float]] = {}  # key -> (start, done at start, last print)

    def update(self, key: str, done: float, total: float, note: str, seconds_left: float | None = None) -> None:
        time_now = time.monotonic()
        start, first, last = self.timings.setdefault(key, (time_now, done, time_now))
        if time_now - last >= self.interval and not total:
            self.timings[key] = (start, first, time_now)
            self.message(f"{key}: {note}")
        elif time_now - last >= self.interval and (done > first or seconds_left is not None):
            by_rate = (time_now - start) * (total - done) / (done - first) if done > first else 0.0
            eta = by_rate if seconds_left is None else seconds_left
            self.timings[key] = (start, first, time_now)
            self.message(f"{key}: {100 * done / max(total, 1e-9):.0f}%  {note}  ETA {clock_time(eta)}")

    def finish(self, key: str) -> None:
        self.timings.pop(key, None)

    def message(self, text: str) -> None:
        self.write(text)


class SilentListener(LineListener):
    """Displays nothing."""

    def message(self, text: str) -> None:
        pass


_listener: Listener | None = None


def listener() -> Listener:
    """Return the current listener; by default bars on a terminal, else lines."""
    global _listener
    if _listener is None:
        _listener = BarListener() if console.is_terminal else LineListener()
    return _listener


def set_listener(new: Listener) -> None:
    """Replace the listener, e.g. in a worker process."""
    global _listener
    _listener = new


def close() -> None:
    """Remove bars that are still displayed, e.g. after an interruption."""
    global _listener
    if isinstance(_listener, BarListener):
        _listener.progress.stop()
    _listener = None


def notify(text: str) -> None:
    """Print one message on standard error; fields in backticks are spelled as in errors (``secateur.errors.spell``)."""
    listener().message(spell(text, _spelling))


@functools.cache
def notify_once(text: str) -> None:
    """Print a message as :func:`notify` does, once in a process."""
    notify(text)


def set_spelling(spelling: Callable[[str], str | None]) -> None:
    """Spell the fields that messages name in backticks by ``spelling``, as the command line does."""
    global _spelling
    _spelling = spelling


class ProgressTask:
    """A running task with a progress display."""

    def __init__(self, key: str, total: float) -> None:
        self.key, self.total, self.done = key, total, 0.0

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Add ``amount`` to the progress; ``note`` appears beside the bar."""
        self.done += amount
        listener().update(self.key, self.done, self.total, note)

    def set(self, done: float, note: str, seconds_left: float | None) -> None:
        """Set the progress, with an estimate of the time left; None for none."""
        self.done = done
        listener().update(self.key, done, self.total, note, seconds_left=seconds_left)


@contextlib.contextmanager
def track(key: str, total: float) -> Iterator[ProgressTask]:
    """Display progress under the name ``key`` until the block ends; a ``total`` of 0 means unknown."""
    listener().update(key, 0.0, total, "")
    try:
        yield ProgressTask(key, total)
    finally:
        listener().finish(key)
