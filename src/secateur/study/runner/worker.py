"""Doing one stage: under a claim, with a log of its own and a note of how far it is that other processes read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from secateur import distributed, progress
from secateur.errors import REQUEUE, RunError, UserError, disk_full, first_line, out_of_memory
from secateur.files import write_json
from secateur.runtime import environment
from secateur.study.runner.lease import Lease, LeaseLost
from secateur.study.stage import Stage
from secateur.study.stages.execute import run_stage
from secateur.study.store import PROGRESS, StageOutcome, Store, key_of

__all__ = ["on_device", "run_stage_attempt"]

_NOTE_EVERY = 10.0  # seconds between notes of how far a stage is


def on_device(stage: Stage, device: str) -> Stage:
    """The stage, to be computed there."""
    return dataclasses.replace(stage, runtime={**stage.runtime, "device": device})


def run_stage_attempt(
    stage: Stage, store: Store, *, after: int | None = None, lost: Callable[[], object] = lambda: None
) -> StageOutcome:
    """Do a stage, unless another process is at it; of several processes together the first claims and publishes.

    Args:
        stage: whose inputs are finished.
        store: where it lies.
        after: the number of its last claim, which was found free; None to look.
        lost: is called, in a thread, should another process take the stage over.
    """
    if not distributed.is_main():
        return _help(stage, store)
    if after is None:
        found = store.claims.look(key_of(stage))
        after = found.number if found.free else None
    claim = None if after is None else store.claims.take(key_of(stage), after, lost)
    if claim is None:
        distributed.sum_count(0)
        return StageOutcome("elsewhere", "another process is at it")
    with claim:
        if store.done(stage) and store.damage(stage) is None:  # finished meanwhile by another process
            distributed.sum_count(0)
            return StageOutcome("done")
        return _attempt(stage, store, claim)


def _help(stage: Stage, store: Store) -> StageOutcome:
    """Do the part of a process that is not the first."""
    number = distributed.sum_count(0)
    if number:
        run_stage(stage, store, store.working(stage, number))
    return StageOutcome("done" if number else "elsewhere")


def _attempt(stage: Stage, store: Store, claim: Lease) -> StageOutcome:
    started = time.monotonic()
    work = store.working(stage, claim.number)
    try:
        if store.done(stage):
            store.discard(stage)
        attempts = store.begin(stage, claim)
        with _told(stage, store, work) as write:
            write(f"attempt {attempts}, in {work.name}, by process {os.getpid()} on {socket.gethostname()}")
            distributed.sum_count(claim.number)  # the others have waited for the folder
            result = run_stage(stage, store, work)
            seconds = time.monotonic() - started
            store.finish(stage, work, claim, result, {"seconds": seconds, "attempts": attempts, **_how(stage)})
            write(f"finished after {progress.clock_time(seconds)}")
        return StageOutcome("done")
    except Exception as error:
        ended = _explained(error, store.log(stage))
        if ended.how == "failed":
            store.note(work, error=ended.text)
        elif ended.how == "stopped":
            store.note(work, stopped=True)
        else:  # nobody else works in it, nor will
            shutil.rmtree(work, ignore_errors=True)
        return ended


def _how(stage: Stage) -> dict[str, Any]:
    """What a run of a stage was made with."""
    return {
        "threads": torch.get_num_threads(),
        "device": stage.runtime.get("device", "cpu"),
        "processes": distributed.world_size(),
        "environment": environment(),
    }


def _expected(error: Exception) -> bool:
    """Whether an error's one line says all."""
    return isinstance(error, UserError | RunError)


def _explained(error: Exception, log: Path) -> StageOutcome:
    """What an error comes to, in one line."""
    if isinstance(error, LeaseLost):
        return StageOutcome("elsewhere", str(error))
    if isinstance(error, RunError) and error.code == REQUEUE:
        return StageOutcome("stopped", str(error))
    if _expected(error):
        return StageOutcome("failed", str(error))
    line = first_line(error)
    if disk_full(error):
        return StageOutcome("failed", f"the disk is full; make room, then run the same again ({line})")
    if out_of_memory(error):
        return StageOutcome("failed", f"out of memory; lower recipe.micro_batch or --jobs, then run again ({line})")
    return StageOutcome("failed", f"{type(error).__name__}: {line} (see {log})")


@contextlib.contextmanager
def _told(stage: Stage, store: Store, work: Path) -> Iterator[Callable[[str], None]]:
    """Write what the stage says to its log, and how far it is to its folder; yield what writes to the log alone."""
    log = store.log(stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:

        def write(text: str) -> None:
            for line in text.splitlines():
                with contextlib.suppress(OSError):  # a full disk is told by what was to be written to it
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

        before = progress.listener()
        progress.set_listener(_Told(progress.LineListener(write=write), work / PROGRESS, before))
        try:
            yield write
        except Exception as error:
            write(str(error) if _expected(error) else traceback.format_exc())
            raise
        finally:
            progress.set_listener(before)


class _Told:
    """Progress of a stage: to its log, to a small file a few times a minute, and on to who listened before."""

    def __init__(self, log: progress.Listener, note: Path, then: progress.Listener) -> None:
        self.log, self.note, self.then = log, note, then
        self.began: dict[str, tuple[float, float]] = {}  # key -> when it was first heard of, and how far it was then
        self.last = -_NOTE_EVERY

    def update(self, key: str, done: float, total: float, note: str) -> None:
        self.log.update(key, done, total, note)
        self.then.update(key, done, total, note)
        now = time.monotonic()
        since, first = self.began.setdefault(key, (now, done))
        if now - self.last < _NOTE_EVERY:
            return
        self.last = now
        left = (now - since) * (total - done) / (done - first) if total and done > first else None
        share = done / total if total else None
        with contextlib.suppress(OSError):  # of a folder that another process has taken over, or a full disk
            if self.note.parent.is_dir():
                write_json(self.note, {"task": key, "share": share, "note": note, "seconds_left": left})

    def finish(self, key: str) -> None:
        self.began.pop(key, None)
        self.log.finish(key)
        self.then.finish(key)

    def message(self, text: str) -> None:
        self.log.message(text)
        self.then.message(text)
