"""The state of a study's stages, as any process that can read its folder sees it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from secateur.formatting import duration, plural
from secateur.progress import clock_time, console
from secateur.study.pace import StudyProgress, study_progress
from secateur.study.stage import Stage, unique
from secateur.study.store import Store

__all__ = ["StatusRow", "StudyStatus", "state_of", "study_status", "watch"]

_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


@dataclass(frozen=True)
class StatusRow:
    """The state of one stage.

    Attributes:
        state: ``done``, ``running``, ``failed``, ``interrupted``, ``to do``, or ``waiting`` for its inputs.
        note: progress of a running stage, the error of a failed one, or a best rate at the end of its sweep.
    """

    kind: str
    name: str
    state: str
    note: str


@dataclass(frozen=True)
class StudyStatus:
    """The state of every stage of a study; ``str()`` gives the text of ``secateur study status``."""

    study: str
    out: Path
    stages: tuple[StatusRow, ...]
    progress: StudyProgress

    @property
    def done(self) -> int:
        """Number of finished stages."""
        return sum(row.state == "done" for row in self.stages)

    @property
    def title(self) -> str:
        """Study, folder, the number of stages in each state, the share of the FLOPs, and the time left."""
        counts = Counter(row.state for row in self.stages)
        parts = [f"{counts[state]} {state}" for state in ("running", "failed", "interrupted") if counts[state]]
        done = ", ".join([f"{self.done} of {plural(len(self.stages), 'stage')} done", *parts])
        return f"{self.study} in {self.out}: {done}{self._time_left(counts['running'])}"

    def _time_left(self, running: int) -> str:
        """The share of the FLOPs that is done and the time that the rest takes; empty where that is not known."""
        state = self.progress
        if not state.seconds_left:
            return ""
        rough = "roughly " if state.rough else ""
        share = f"; {state.share:.0%} of the FLOPs"
        if running:
            return f"{share}, ETA {rough}{clock_time(state.seconds_left)}"
        return f"{share}, {rough}{duration(state.seconds_left)} left for one process"

    def as_dict(self) -> dict[str, Any]:
        """The status as plain values, as ``--json`` prints it."""
        rows = [asdict(row) for row in self.stages]
        progress = {key: getattr(self.progress, key) for key in ("share", "seconds_left", "rough")}
        return {"study": self.study, "out": str(self.out), "done": self.done, **progress, "stages": rows}

    def __str__(self) -> str:
        rows = (f"{row.state:11}  {row.kind:8}  {row.name}  {row.note}".rstrip() for row in self.stages)
        return "\n".join([self.title, *rows])


def study_status(name: str, stages: list[Stage], store: Store) -> StudyStatus:
    """Look up the state of each stage of the study called ``name``."""
    stages = unique(stages)
    rows = tuple(StatusRow(stage.kind, stage.name, *state_of(stage, store)) for stage in stages)
    done = {stage.fingerprint for stage, row in zip(stages, rows, strict=True) if row.state == "done"}
    jobs = sum(row.state == "running" for row in rows)
    return StudyStatus(name, store.out, rows, study_progress(stages, store, done, max(jobs, 1)))


def state_of(stage: Stage, store: Store) -> tuple[str, str]:
    """State and note of a stage, as in :class:`StatusRow`."""
    if store.done(stage):
        return "done", _choice(stage, store)
    if store.is_running(stage):
        return "running", _progress(stage, store)
    if error := store.runtime(stage).get("error"):
        return "failed", str(error)
    if store.partial(stage):
        return "interrupted", _progress(stage, store)
    return "to do" if all(map(store.done, stage.inputs.values())) else "waiting", ""


def _choice(stage: Stage, store: Store) -> str:
    """What to know of a choice of a rate: that a better one may lie beyond those that were tried."""
    record = (store.record(stage) if stage.kind == "select" else None) or {}
    edges = {"low": "lowest", "high": "highest"}
    return f"rate {record['peak_rate']:g}, the {edges[record['at_edge']]} of the sweep" if record.get("at_edge") else ""


def _progress(stage: Stage, store: Store) -> str:
    note = store.progress(stage)
    parts = [] if note.get("share") is None else [f"{note['share']:.0%}"]
    parts += [note["note"]] if note.get("note") else []
    parts += [] if note.get("seconds_left") is None else [f"ETA {clock_time(note['seconds_left'])}"]
    return "  ".join(parts)


def watch(look: Callable[[], StudyStatus], every: float = 2.0) -> StudyStatus:
    """Show a live table until all stages are done or the user interrupts; return the last status."""
    status = look()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(_table(status), refresh=True)
                if status.done == len(status.stages):
                    break
                time.sleep(every)
                status = look()
        except KeyboardInterrupt:  # ends the watching, not the run
            pass
    return status


def _table(status: StudyStatus) -> Table:
    table = Table(title=status.title, title_justify="left", box=None, pad_edge=False)
    for column in ("state", "kind", "stage", ""):
        table.add_column(column, no_wrap=column != "")
    for row in status.stages:
        colour = _COLOURS.get(row.state, "dim")
        table.add_row(Text(row.state, style=colour), row.kind, row.name, Text(row.note))
    return table
