"""Run stages on this machine: a worker for each core or GPU, and torchrun for stages of several processes."""

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
from secateur.formatting import plural
from secateur.runtime import configure_threads, core_count, quiet_libraries, without_main
from secateur.study.runner.torchrun import outcome_of_exit, processes_of, torchrun_command
from secateur.study.stage import Stage
from secateur.study.store import StageOutcome, Store

__all__ = ["LocalLauncher", "default_slots", "exit_with_parent"]

#: How workers start. They must not inherit this process's state. On CPUs, one server imports the libraries, which takes
#: seconds, and each worker is a fork of it. A GPU's driver does not survive a fork: there each worker imports them.
START = {"cpu": "forkserver", "cuda": "spawn"}
_LEASE_LOST = 77  # exit code of a worker whose stage another process has taken over


def default_slots(device: str) -> list[str]:
    """One slot for each core of this process, or the numbers of its GPUs."""
    if device != "cuda":
        return [""] * core_count()
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


class LocalLauncher:
    """Runs stages in processes of this machine.

    Args:
        jobs: stages at once; None for one for each core, or GPU.
        file: the study file; stages of several processes need it.
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
        """Check that the machine has enough slots for every stage.

        Raises:
            UserError: if one needs more processes than there are GPUs, or more than one and there is no study file.
        """
        for stage in stages:
            if self.device == "cuda" and processes_of(stage) > self.slots:
                raise UserError(
                    f"{stage.name}: needs {plural(processes_of(stage), 'GPU')}, one for each process, and may use "
                    f"{self.slots}; lower compute.processes, allow more jobs, or run it on a machine with more GPUs"
                )
            if processes_of(stage) > 1 and self.file is None:
                raise UserError(f"{stage.name}: {processes_of(stage)} processes need a study file")

    def room(self, stage: Stage) -> bool:
        """Whether a core or GPU is free for each of the stage's processes, or all of them if it has more processes.

        A stage that measures times on a CPU runs alone.
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
        slots, self.free = self.free[: self._needs(stage)], self.free[self._needs(stage) :]
        if processes_of(stage) > 1:
            assert self.file is not None
            self.groups.append(Group(stage, self.out, self.file, self.device, slots))
            return
        idle = (worker for worker in self.workers if worker.stage is None and worker.slot == slots[0])
        worker = next(idle, None)
        if worker is None:
            worker = Worker(self.out, self.device, slots[0])
            self.workers.append(worker)
        worker.start(stage, after)

    def wait(self, seconds: float) -> list[tuple[Stage, StageOutcome]]:
        """Pass on the progress of stages until one ends, for ``seconds`` at most; return those that ended."""
        deadline, outcomes = time.monotonic() + seconds, []
        while not outcomes and (remaining := deadline - time.monotonic()) > 0:
            busy = {worker.connection: worker for worker in self.workers if worker.stage}
            if not busy:
                time.sleep(min(remaining, 0.2))
            for ready in wait(list(busy), min(remaining, 0.2 if self.groups else remaining)) if busy else ():
                worker = busy[ready]  # type: ignore[index]
                stage, outcome = worker.stage, worker.receive()
                if outcome and stage:
                    self.free.append(worker.slot)
                    outcomes.append((stage, outcome))
            self.workers = [worker for worker in self.workers if worker.alive]
            for group in list(self.groups):
                outcome = group.poll()
                if outcome:
                    self.free += group.slots
                    self.groups.remove(group)
                    outcomes.append((group.stage, outcome))
        return outcomes

    def stop(self) -> None:
        """Have stages that train save and end, and others end at once: these resume or start over."""
        for worker in self.workers:
            worker.stop()
        for group in self.groups:
            group.stop()

    def close(self, *, kill: bool) -> None:
        """End the workers, at once if ``kill``: a killed stage resumes from its checkpoint."""
        for worker in self.workers:
            worker.close(kill)
        for group in self.groups:
            group.close(kill)


class Worker:
    """A process that runs one stage after another, on one core or GPU."""

    def __init__(self, out: Path, device: str, slot: str) -> None:
        self.slot = slot
        self.stage: Stage | None = None
        self.alive = True
        self.stopping = False
        context: Any = multiprocessing.get_context(START[device])
        context.set_forkserver_preload(["secateur.study.runner.worker"])
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(worker_end, out, device, os.getpid()))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = slot  # the worker's torch reads it once, when it is imported
        try:
            with without_main():
                self.process.start()
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
        worker_end.close()

    def start(self, stage: Stage, after: int) -> None:
        """Send the worker a stage."""
        self.stage = stage
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # the worker was killed; receive() detects it
            self.connection.send((stage, after))

    def receive(self) -> StageOutcome | None:
        """Read one message; pass progress on, and return the outcome if the stage has ended."""
        try:
            name, *arguments = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.stage, self.alive = None, False
            if self.process.exitcode == _LEASE_LOST:
                return StageOutcome("elsewhere")
            if self.stopping:
                return StageOutcome("stopped")
            return StageOutcome("failed", "its process was killed (out of memory?); run the study again to resume")
        if name == "ended":
            self.stage = None
            return arguments[0]
        getattr(progress.listener(), name)(*arguments)
        return None

    def stop(self) -> None:
        """Send the signal to stop; a stage that saves its state catches it."""
        if self.stage is not None and self.process.is_alive():
            self.stopping = True
            self.process.terminate()

    def close(self, kill: bool) -> None:
        """End the process."""
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self.connection.send(None)
        self.process.join()
        self.connection.close()


class Group:
    """A stage of several processes, under torchrun."""

    def __init__(self, stage: Stage, out: Path, file: Path, device: str, slots: list[str]) -> None:
        self.stage, self.slots, self.store, self.stopping = stage, slots, Store(out), False
        log = self.store.log(stage)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(slots) if device == "cuda" else ""}
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*torchrun_command(stage, file, out, device), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # the study's process alone handles an interrupt
            )

    def poll(self) -> StageOutcome | None:
        """Pass on the stage's progress; return its outcome once it has ended."""
        code = self.process.poll()
        if code is None:
            note = self.store.progress(self.stage)
            if note.get("share") is not None:
                progress.listener().update(self.stage.name, note["share"], 1.0, note["note"])
            return None
        progress.listener().finish(self.stage.name)
        outcome = outcome_of_exit(self.stage, self.store, code)
        return StageOutcome("stopped") if self.stopping and outcome.state == "failed" else outcome

    def stop(self) -> None:
        """Send torchrun the signal to stop, which it passes on to its processes."""
        self.stopping = True
        self.process.terminate()

    def close(self, kill: bool) -> None:
        """End the processes."""
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _serve(connection: Connection, out: Path, device: str, parent: int) -> None:
    """Run a worker's loop: run each stage that arrives, until None does."""
    import torch

    from secateur.study.runner.worker import on_device, run_stage_attempt

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study's process alone handles an interrupt
    torch.set_num_threads(1)
    quiet_libraries()
    exit_with_parent(parent)
    sender = _Sender(connection)
    progress.set_listener(sender)
    store = Store(out)
    while True:
        message = connection.recv()
        if message is None:
            return
        stage, after = message
        with _redirect_output(store.log(stage)):
            outcome = run_stage_attempt(
                on_device(stage, device), store, after=after, on_loss=lambda: os._exit(_LEASE_LOST)
            )
        sender.send("ended", outcome)


@contextlib.contextmanager
def _redirect_output(log: Path) -> Any:
    """Send the output of libraries, and the traceback of a crash, to the stage's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    copies = [(stream, os.dup(stream)) for stream in (1, 2)]
    with log.open("a") as file:
        for stream, _ in copies:
            os.dup2(file.fileno(), stream)
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in copies:
                os.dup2(copy, stream)
                os.close(copy)


def exit_with_parent(process: int) -> None:
    """End this process when process ``process`` ends, so that a killed run leaves no workers behind."""
    parent = multiprocessing.parent_process()  # in a worker; its pipe detects the death even of a zombie

    def is_alive() -> bool:
        if parent and parent.pid == process:
            return parent.is_alive()
        with contextlib.suppress(PermissionError):
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return False
        return True

    def exit_when_dead() -> None:
        while is_alive():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=exit_when_dead, daemon=True).start()


class _Sender:
    """A progress listener that sends a few messages a second to the study's process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.lock = threading.Lock()
        self.last: dict[str, float] = {}

    def send(self, *message: Any) -> None:
        with self.lock, contextlib.suppress(BrokenPipeError, ConnectionError):
            self.connection.send(message)

    def update(self, key: str, done: float, total: float, note: str, seconds_left: float | None = None) -> None:
        time_now = time.monotonic()
        if time_now - self.last.get(key, 0.0) > 0.3:
            self.last[key] = time_now
            self.send("update", key, done, total, note, seconds_left)

    def finish(self, key: str) -> None:
        self.last.pop(key, None)
        self.send("finish", key)

    def message(self, text: str) -> None:
        self.send("message", text)
