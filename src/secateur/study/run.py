"""Running a study: stages whose inputs are ready go to worker processes, one thread each, side by side."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur import progress
from secateur.errors import RunError, UserError
from secateur.runtime import calm_environment, environment, quiet
from secateur.study.execute import run_stage
from secateur.study.stages import Stage, unique
from secateur.study.store import Store

__all__ = ["Outcome", "default_jobs", "run_stages"]


@dataclass
class Outcome:
    """What a run came to."""

    already: int = 0  #: stages found done
    ran: int = 0
    failed: dict[str, str] = field(default_factory=dict)  #: stage name -> one line
    skipped: list[str] = field(default_factory=list)  #: names of stages whose inputs failed


def default_jobs() -> int:
    """As many workers as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_stages(stages: list[Stage], out: Path, *, jobs: int) -> Outcome:
    """Run what is not done yet; stages that are done are not touched.

    Raises:
        UserError: if a worker process was killed; running again goes on from there.
    """
    store = Store(out)
    stages = unique(stages)
    outcome = Outcome()
    waiting = {stage.fingerprint: stage for stage in stages if not store.done(stage)}
    outcome.already = len(stages) - len(waiting)
    if not waiting:
        return outcome
    urgency = _critical_paths(stages)
    calm_environment(threads=1)
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    work = sum(stage.flops for stage in waiting.values())
    with _relaying(messages), progress.task("whole study", work) as whole, _pool(jobs, context, messages) as pool:
        running: dict[Future[str | None], Stage] = {}
        while waiting or running:
            for stage in sorted(waiting.values(), key=lambda s: -urgency[s.fingerprint]):
                lost = [used.name for used in stage.inputs.values() if used.name in _lost(outcome)]
                if lost:
                    outcome.skipped.append(stage.name)
                    del waiting[stage.fingerprint]
                elif len(running) < jobs and all(store.done(used) for used in stage.inputs.values()):
                    del waiting[stage.fingerprint]
                    number = outcome.already + outcome.ran + len(running) + 1
                    progress.say(f"[{number}/{len(stages)}] {stage.kind} {stage.name}")
                    running[pool.submit(_work, stage, out)] = stage
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    error = future.result()
                except BrokenProcessPool:
                    raise UserError(
                        f"stage {stage.name}: its process was killed (out of memory?); run again to go on"
                    ) from None
                outcome.ran += 1
                whole.advance(stage.flops, f"{outcome.already + outcome.ran} of {len(stages)} stages done")
                if error:
                    outcome.failed[stage.name] = error
                    progress.say(f"FAILED {stage.kind} {stage.name}: {error}")
    return outcome


def _lost(outcome: Outcome) -> set[str]:
    return {*outcome.failed, *outcome.skipped}


@contextlib.contextmanager
def _pool(jobs: int, context: Any, messages: Any) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(messages, os.getpid()))
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # an interrupt must not wait for a stage of hours; it resumes from its checkpoint
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _critical_paths(stages: list[Stage]) -> dict[str, float]:
    """FLOPs of the longest chain that begins with each stage: what should start first."""
    below: dict[str, float] = {}
    for stage in reversed(stages):
        below[stage.fingerprint] = below.get(stage.fingerprint, 0.0) + stage.flops + 1.0
        for used in stage.inputs.values():
            below[used.fingerprint] = max(below.get(used.fingerprint, 0.0), below[stage.fingerprint])
    return below


def _work(stage: Stage, out: Path) -> str | None:
    """Run one stage in a worker; return an error's one line, or None."""
    store = Store(out)
    with store.lock(stage):
        if store.done(stage):  # finished meanwhile by a process that an earlier, killed run had left behind
            return None
        work = store.partial(stage)
        attempts = store.begin(stage)
        started = time.monotonic()
        try:
            result = run_stage(stage, store, work)
        except (UserError, RunError) as error:
            store.fail(stage, str(error))
            return str(error)
        except Exception as error:
            (work / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
            text = f"{type(error).__name__}: {error} (see {work / 'traceback.txt'})"
            store.fail(stage, text)
            return text
        runtime = {
            "seconds": time.monotonic() - started,
            "attempts": attempts,
            "threads": 1,
            "device": "cpu",
            "environment": environment(),
        }
        store.finish(stage, result, runtime)
    return None


def _start_worker(messages: Any, parent: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the study's process's to handle
    torch.set_num_threads(1)
    quiet()
    progress.set_listener(_Sender(messages))
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """End this worker when the study's process is gone, so that a killed run leaves nothing behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Sender:
    """Progress in a worker: a few messages a second to the study's process."""

    def __init__(self, messages: Any) -> None:
        self.messages = messages
        self.last: dict[str, float] = {}

    def update(self, key: str, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if now - self.last.get(key, 0.0) > 0.3:
            self.last[key] = now
            self.messages.put(("update", key, done, total, note))

    def finish(self, key: str) -> None:
        self.last.pop(key, None)
        self.messages.put(("finish", key))

    def message(self, text: str) -> None:
        self.messages.put(("message", text))


@contextlib.contextmanager
def _relaying(messages: Any) -> Iterator[None]:
    """Show what workers send, for as long as the block lasts."""
    stop = threading.Event()

    def relay() -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Empty, EOFError, OSError):
                name, *arguments = messages.get(timeout=0.2)
                getattr(progress.listener(), name)(*arguments)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=2)
        messages.cancel_join_thread()
        progress.close()
