"""Run one stage under a lease, with its own log and a progress file that other processes read."""

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
from secateur.errors import REQUEUE, RunError, UserError, disk_full, first_line, out_of_memory, spell
from secateur.files import write_json
from secateur.runtime import environment
from secateur.study.runner.lease import Lease, LeaseLost
from secateur.study.stage import Stage
from secateur.study.stages.execute import run_stage
from secateur.study.store import PROGRESS, StageOutcome, Store, key_of

__all__ = ["ProgressRecorder", "on_device", "record_progress", "run_stage_attempt"]

_NOTE_EVERY = 10.0  # seconds between updates of the progress file


def on_device(stage: Stage, device: str) -> Stage:
    """Return the stage with another device."""
    return dataclasses.replace(stage, runtime={**stage.runtime, "device": device})


def run_stage_attempt(
    stage: Stage, store: Store, *, after: int | None = None, on_loss: Callable[[], object] = lambda: None
) -> StageOutcome:
    """Run a stage, unless another process is running it. Of several ranks, rank 0 holds the lease and publishes.

    Args:
        stage: with finished inputs.
        after: the number of its last lease, whose state was free; None to look it up.
        on_loss: called in a thread if another process takes the stage over.
    """
    if not distributed.is_main():
        return _run_rank(stage, store)
    if after is None:
        state = store.leases.state(key_of(stage))
        after = state.number if state.free else None
    lease = None if after is None else store.leases.acquire(key_of(stage), after, on_loss)
    if lease is None:
        distributed.sum_count(0)
        return StageOutcome("elsewhere", "another process is running it")
    with lease:
        if store.done(stage) and store.damage(stage) is None:  # another process finished it meanwhile
            distributed.sum_count(0)
            return StageOutcome("done")
        return _attempt(stage, store, lease)


def _run_rank(stage: Stage, store: Store) -> StageOutcome:
    """Run the part of a rank other than 0, after rank 0 has sent the number of its lease; 0 if there is none."""
    number = distributed.sum_count(0)
    if number:
        run_stage(stage, store, store.work_folder(stage, number))
    return StageOutcome("done" if number else "elsewhere")


def _attempt(stage: Stage, store: Store, lease: Lease) -> StageOutcome:
    started = time.monotonic()
    work = store.work_folder(stage, lease.number)
    try:
        if store.done(stage):
            store.discard(stage)
        attempts = store.begin(stage, lease)
        with record_progress(stage, store, work) as write:
            write(f"attempt {attempts}, in {work.name}, by process {os.getpid()} on {socket.gethostname()}")
            distributed.sum_count(lease.number)  # the other ranks wait for the folder
            result = run_stage(stage, store, work)
            seconds = time.monotonic() - started
            runtime: dict[str, Any] = {"seconds": seconds, "attempts": attempts, "threads": torch.get_num_threads()}
            runtime |= {"device": stage.runtime.get("device", "cpu"), "processes": distributed.world_size()}
            store.finish(stage, work, lease, result, {**runtime, "environment": environment()})
            write(f"finished after {progress.clock_time(seconds)}")
        return StageOutcome("done")
    except Exception as error:
        outcome = _outcome_of(error, store.log(stage))
        if outcome.state == "failed":
            store.note(work, error=outcome.text)
        elif outcome.state == "stopped":
            store.note(work, stopped=True)
        else:  # no other process uses this folder
            shutil.rmtree(work, ignore_errors=True)
        return outcome


def _outcome_of(error: Exception, log: Path) -> StageOutcome:
    """The outcome of an attempt that an error ended."""
    if isinstance(error, LeaseLost):
        return StageOutcome("elsewhere", str(error))
    if isinstance(error, RunError) and error.code == REQUEUE:
        return StageOutcome("stopped", str(error))
    if isinstance(error, UserError | RunError):
        return StageOutcome("failed", spell(str(error), str))
    line = first_line(error)
    if disk_full(error):
        return StageOutcome("failed", f"the disk is full; free some space, then run the same command again ({line})")
    if out_of_memory(error):
        return StageOutcome(
            "failed", f"out of memory; lower recipe.micro_batch or the number of jobs, then run again ({line})"
        )
    return StageOutcome("failed", f"{type(error).__name__}: {line} (see {log})")


@contextlib.contextmanager
def record_progress(stage: Stage, store: Store, work: Path) -> Iterator[Callable[[str], None]]:
    """Send messages and progress to the stage's log and its progress file; yield a function that writes to the log."""
    log = store.log(stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:

        def write(text: str) -> None:
            for line in text.splitlines():
                with contextlib.suppress(OSError):  # a full disk is reported where results are written
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

        listener = progress.listener()
        progress.set_listener(ProgressRecorder(progress.LineListener(write=write), work / PROGRESS, listener))
        try:
            yield write
        except Exception as error:
            write(str(error) if isinstance(error, UserError | RunError) else traceback.format_exc())
            raise
        finally:
            progress.set_listener(listener)


class ProgressRecorder:
    """Writes progress to a log and, a few times a minute, to a file; passes it on to the previous listener."""

    def __init__(self, log: progress.Listener, file: Path, listener: progress.Listener) -> None:
        self.log, self.file, self.listener = log, file, listener
        self.first: dict[str, tuple[float, float]] = {}  # key -> time and progress of its first update
        self.last = -_NOTE_EVERY  # time of the last write

    def update(self, key: str, done: float, total: float, note: str, seconds_left: float | None = None) -> None:
        self.log.update(key, done, total, note, seconds_left)
        self.listener.update(key, done, total, note, seconds_left)
        time_now = time.monotonic()
        since, start = self.first.setdefault(key, (time_now, done))
        if time_now - self.last < _NOTE_EVERY:
            return
        self.last = time_now
        if seconds_left is None and total and done > start:
            seconds_left = (time_now - since) * (total - done) / (done - start)
        share = done / total if total else None
        with contextlib.suppress(OSError):  # another process has taken the folder over, or the disk is full
            if self.file.parent.is_dir():
                write_json(self.file, {"task": key, "share": share, "note": note, "seconds_left": seconds_left})

    def finish(self, key: str) -> None:
        self.first.pop(key, None)
        self.log.finish(key)
        self.listener.finish(key)

    def message(self, text: str) -> None:
        self.log.message(text)
        self.listener.message(text)
