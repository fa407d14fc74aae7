"""Where a study stands, as any process that sees its directory can tell."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.live import Live
from rich.table import Table
from rich.text import Text

from secateur.progress import clock_time, console
from secateur.study.stage import Stage, unique
from secateur.study.store import Store

__all__ = ["StatusRow", "rows", "state_of", "summary", "watch"]

_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


@dataclass(frozen=True)
class StatusRow:
    """A stage and where it stands.

    Attributes:
        state: ``done``, ``running``, ``failed``, ``interrupted``, ``to do`` or, without its inputs, ``waiting``.
        note: how far a running stage is, or the error of a failed one.
    """

    kind: str
    name: str
    state: str
    note: str


def rows(stages: list[Stage], store: Store) -> list[StatusRow]:
    """Where each stage stands."""
    return [StatusRow(stage.kind, stage.name, *state_of(stage, store)) for stage in unique(stages)]


def state_of(stage: Stage, store: Store) -> tuple[str, str]:
    """Where a stage stands, and a note on it."""
    if store.done(stage):
        return "done", ""
    if store.held(stage):
        return "running", _how_far(stage, store)
    if error := store.runtime(stage).get("error"):
        return "failed", str(error)
    if store.partial(stage):
        return "interrupted", _how_far(stage, store)
    return "to do" if all(map(store.done, stage.inputs.values())) else "waiting", ""


def _how_far(stage: Stage, store: Store) -> str:
    told = store.progress(stage)
    parts = [] if told.get("share") is None else [f"{told['share']:.0%}"]
    parts += [told["note"]] if told.get("note") else []
    parts += [] if told.get("seconds_left") is None else [f"ETA {clock_time(told['seconds_left'])}"]
    return "  ".join(parts)


def summary(found: list[StatusRow]) -> str:
    """How many stages are in each state."""
    counts = Counter(row.state for row in found)
    return f"{counts['done']} of {len(found)} stages done" + "".join(
        f", {counts[state]} {state}" for state in ("running", "failed", "interrupted") if counts[state]
    )


def watch(look: Callable[[], list[StatusRow]], title: str, every: float = 2.0) -> list[StatusRow]:
    """Show a live table until all is done or someone interrupts; return the last look."""
    found = look()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(_table(found, title), refresh=True)
                if all(row.state == "done" for row in found):
                    break
                time.sleep(every)
                found = look()
        except KeyboardInterrupt:  # of the watching, not of what is watched
            pass
    return found


def _table(found: list[StatusRow], title: str) -> Table:
    table = Table(title=f"{title}: {summary(found)}", title_justify="left", box=None, pad_edge=False)
    for column in ("state", "kind", "stage", ""):
        table.add_column(column, no_wrap=column != "")
    for row in found:
        colour = _COLOURS.get(row.state, "dim")
        table.add_row(Text(row.state, style=colour), row.kind, row.name, Text(row.note))
    return table
