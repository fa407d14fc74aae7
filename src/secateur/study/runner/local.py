"""Stages on this machine: worker processes, each with a core or a GPU, and torchrun for stages of several processes."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from secateur import progress
from secateur.errors import UserError
from secateur.runtime import configure_threads, core_count, quiet_libraries, without_main
from secateur.study.runner.torchrun import outcome_of_exit, processes_of, torchrun_command
from secateur.study.stage import Stage
from secateur.study.store import StageOutcome, Store

__all__ = ["LocalLauncher", "default_slots", "exit_with_parent"]

#: How workers start: nothing of this process may come along. For CPUs one server imports the libraries, which takes
#: seconds, and each worker is a fork of it. A GPU's driver does not survive a fork: those workers import by themselves.
START = {"cpu": "forkserver", "cuda": "spawn"}
_LOST = 77  # exit code of a worker whose stage another process has taken over


def default_slots(device: str) -> list[str]:
    """What stages run on side by side: the cores of this process, or its GPUs by number."""
    if device != "cuda":
        return [""] * core_count()
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


class LocalLauncher:
    """Does stages in processes of this machine.

    Args:
        out: the study's directory.
        jobs: stages at once; None for as many as there are cores, or GPUs.
        device: ``cpu`` or ``cuda``.
        file: the study file, for stages of several processes.
    """

    def __init__(self, out: Path, *, jobs: int | None, device: str, file: Path | None = None) -> None:
        slots = default_slots(device)
        if device != "cuda" and jobs:
            slots = [""] * jobs
        self.out, self.device, self.file = out, device, file
        self.free = slots[:jobs]
        self.slots = len(self.free)
        self.workers: list[Worker] = []
        self.groups: list[Group] = []
        configure_threads(threads=1)

    def check(self, stages: list[Stage]) -> None:
        """Look whether every stage will find room.

        Raises:
            UserError: if one needs more processes than there are GPUs, or more than one and there is no study file.
        """
        for stage in stages:
            if self.device == "cuda" and processes_of(stage) > self.slots:
                raise UserError(
                    f"{stage.name}: wants {processes_of(stage)} processes, one for each GPU, and may use {self.slots} "
                    "here; lower processes, raise --jobs, or run it where there are more"
                )
            if processes_of(stage) > 1 and self.file is None:
                raise UserError(f"{stage.name}: wants {processes_of(stage)} processes, which need a study file")

    def room(self, stage: Stage) -> bool:
        """Whether a core or GPU is free for each of its processes; more processes than cores have them all.

        What is timed on a CPU waits until nothing else runs, and nothing else begins beside it.
        """
        idle = len(self.free) == self.slots
        if any(worker.stage and self._is_timed(worker.stage) for worker in self.workers):
            return False
        return idle if self._is_timed(stage) else len(self.free) >= self._needs(stage)

    def _is_timed(self, stage: Stage) -> bool:
        return stage.kind == "cost" and self.device != "cuda"

    def _needs(self, stage: Stage) -> int:
        return min(processes_of(stage), self.slots)

    def start(self, stage: Stage, after: int) -> None:
        """Start a stage."""
        taken, self.free = self.free[: self._needs(stage)], self.free[self._needs(stage) :]
        if processes_of(stage) > 1:
            assert self.file is not None
            self.groups.append(Group(stage, self.out, self.file, self.device, taken))
            return
        idle = (worker for worker in self.workers if worker.stage is None and worker.slot == taken[0])
        worker = next(idle, None)
        if worker is None:
            worker = Worker(self.out, self.device, taken[0])
            self.workers.append(worker)
        worker.start(stage, after)

    def wait(self, seconds: float) -> list[tuple[Stage, StageOutcome]]:
        """Show what stages say until one ends, for so long at most."""
        over, found = time.monotonic() + seconds, []
        while not found and (left := over - time.monotonic()) > 0:
            busy = {worker.connection: worker for worker in self.workers if worker.stage}
            if not busy:
                time.sleep(min(left, 0.2))
            for ready in wait(list(busy), min(left, 0.2 if self.groups else left)) if busy else ():
                worker = busy[ready]  # type: ignore[index]
                stage, ended = worker.stage, worker.receive()
                if ended and stage:
                    self.free.append(worker.slot)
                    found.append((stage, ended))
            self.workers = [worker for worker in self.workers if worker.alive]
            for group in list(self.groups):
                ended = group.poll()
                if ended:
                    self.free += group.slots
                    self.groups.remove(group)
                    found.append((group.stage, ended))
        return found

    def close(self, *, kill: bool) -> None:
        """End the workers; a stage of hours is not waited for, since it goes on from its checkpoint."""
        for worker in self.workers:
            worker.close(kill)
        for group in self.groups:
            group.close(kill)


class Worker:
    """A process that does one stage after another, on one core or GPU."""

    def __init__(self, out: Path, device: str, slot: str) -> None:
        self.slot = slot
        self.stage: Stage | None = None
        self.alive = True
        context: Any = multiprocessing.get_context(START[device])
        context.set_forkserver_preload(["secateur.study.runner.worker"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, out, device, os.getpid()))
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = slot  # torch reads it once, when it is imported
        try:
            with without_main():
                self.process.start()
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
        theirs.close()

    def start(self, stage: Stage, after: int) -> None:
        """Give it a stage."""
        self.stage = stage
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # of a worker that was killed; receive() tells
            self.connection.send((stage, after))

    def receive(self) -> StageOutcome | None:
        """Take what it sent; what became of its stage, if that is told."""
        try:
            name, *arguments = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.stage, self.alive = None, False
            if self.process.exitcode == _LOST:
                return StageOutcome("elsewhere")
            return StageOutcome("failed", "its process was killed (out of memory?); run again to go on")
        if name == "ended":
            self.stage = None
            return arguments[0]
        getattr(progress.listener(), name)(*arguments)
        return None

    def close(self, kill: bool) -> None:
        """End it."""
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self.connection.send(None)
        self.process.join()
        self.connection.close()


class Group:
    """A stage of several processes, under torchrun."""

    def __init__(self, stage: Stage, out: Path, file: Path, device: str, slots: list[str]) -> None:
        self.stage, self.slots, self.store = stage, slots, Store(out)
        log = self.store.log(stage)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(slots) if device == "cuda" else ""}
        with log.open("a") as file_log:
            self.process = subprocess.Popen(
                [*torchrun_command(stage, file, out, device), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=file_log,
                stderr=file_log,
                env=environment,
                start_new_session=True,  # an interrupt is for the study's process to handle
            )

    def poll(self) -> StageOutcome | None:
        """Show how far the stage says that it is; say what became of it, once it has ended."""
        code = self.process.poll()
        if code is None:
            told = self.store.progress(self.stage)
            if told.get("share") is not None:
                progress.listener().update(self.stage.name, told["share"], 1.0, told["note"])
            return None
        progress.listener().finish(self.stage.name)
        return outcome_of_exit(self.stage, self.store, code)

    def close(self, kill: bool) -> None:
        """End it."""
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _serve(connection: Connection, out: Path, device: str, parent: int) -> None:
    """Be a worker: do the stages that come, until no more do."""
    import torch

    from secateur.study.runner.worker import on_device, run_stage_attempt

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the study's process's to handle
    torch.set_num_threads(1)
    quiet_libraries()
    exit_with_parent(parent)
    sender = _Sender(connection)
    progress.set_listener(sender)
    store = Store(out)
    while True:
        given = connection.recv()
        if given is None:
            return
        stage, after = given
        with _into(store.log(stage)):
            ended = run_stage_attempt(on_device(stage, device), store, after=after, lost=lambda: os._exit(_LOST))
        sender.send("ended", ended)


@contextlib.contextmanager
def _into(log: Path) -> Any:
    """Send what libraries print, and a crash's last words, to the stage's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with log.open("a") as file:
        for stream, _ in kept:
            os.dup2(file.fileno(), stream)
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)


def exit_with_parent(process: int) -> None:
    """End this process when another one is gone, so that a killed run leaves nothing behind."""
    parent = multiprocessing.parent_process()  # of a worker; a pipe tells, even while nobody has looked at the dead one

    def there() -> bool:
        if parent and parent.pid == process:
            return parent.is_alive()
        with contextlib.suppress(PermissionError):
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return False
        return True

    def look() -> None:
        while there():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


class _Sender:
    """Progress in a worker: a few messages a second to the study's process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.lock = threading.Lock()
        self.last: dict[str, float] = {}

    def send(self, *message: Any) -> None:
        with self.lock, contextlib.suppress(BrokenPipeError, ConnectionError):
            self.connection.send(message)

    def update(self, key: str, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if now - self.last.get(key, 0.0) > 0.3:
            self.last[key] = now
            self.send("update", key, done, total, note)

    def finish(self, key: str) -> None:
        self.last.pop(key, None)
        self.send("finish", key)

    def message(self, text: str) -> None:
        self.send("message", text)
