"""Processes of the command line, without the seconds that each of its own would take to import what it needs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import distributed
from secateur.cli import main
from secateur.study.runner import local

LIMIT_S = 400.0


class Processes:
    """Forks of a server that has imported everything and does nothing else; their output goes to files.

    Args:
        folder: an existing one, for their output and temporary files.
        work: what each does, picklable; what it returns is the exit code.
        arguments: of ``work``.
        count: of processes; several have the environment that torchrun would give them.
        environment: changes to that of this process.
    """

    def __init__(
        self,
        folder: Path,
        work: Callable[..., int],
        *arguments: Any,
        count: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["secateur.study.runner.worker"])
        paths = self._output, self._errors = [folder / name for name in ("output.txt", "errors.txt")]
        for path in paths:
            path.write_text("")
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), **(environment or {})}
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
        self._processes = [
            context.Process(target=_work, args=(paths, {**shared, **rank}, work, arguments)) for rank in ranks
        ]
        for process in self._processes:
            process.start()

    @property
    def alive(self) -> bool:
        """Whether all of them run."""
        return all(process.exitcode is None for process in self._processes)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def send(self, number: int) -> None:
        """Send each of them a signal."""
        for process in self._processes:
            if process.pid and process.exitcode is None:
                os.kill(process.pid, number)

    def join(self) -> list[int]:
        """Wait until all have ended; kill the rest 5 s after one has ended with an error. Return the exit codes."""
        end = time.monotonic() + LIMIT_S
        while (running := [p for p in self._processes if p.exitcode is None]) and time.monotonic() < end:
            if len(running) < len(self._processes) and any(process.exitcode for process in self._processes):
                end = min(end, time.monotonic() + 5)
            wait([process.sentinel for process in running], 0.5)
        for process in self._processes:
            process.kill()
            process.join()
        return [process.exitcode or 0 for process in self._processes]


def _work(paths: list[Path], environment: dict[str, str], work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    for stream, path in enumerate(paths, start=1):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, stream)
        os.close(handle)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    local.START["cpu"] = "fork"  # of this process: another server would have to import everything once more
    sys.exit(work(*arguments))


def run_all(jobs: list[list[str]]) -> int:
    """Run command lines one after the other in one process group."""
    with distributed.process_group():
        for job in jobs:
            if code := main(job):
                return code
    return 0


def together(count: int, jobs: list[list[str]], folder: Path) -> None:
    """Run command lines one after the other in ``count`` processes."""
    processes = Processes(folder, run_all, jobs, count=count)
    if any(codes := processes.join()):
        pytest.fail(f"exit codes {codes}: {processes.errors[-3000:]}")
