"""Several processes together, without the seconds that each of torchrun's own takes to import what it needs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from secateur import distributed
from secateur.cli import main


def together(processes: int, jobs: list[list[str]], folder: Path) -> None:
    """Run command lines one after the other in as many processes, which are told what torchrun would tell them.

    Each is a fork of a server that has imported everything and does nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["secateur.study.runner.worker"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told = folder / "told.txt"
    each = [context.Process(target=_do, args=(jobs, told, rank, group)) for rank in range(processes)]
    for process in each:
        process.start()
    over = time.monotonic() + 400
    while any(process.exitcode is None for process in each) and not any(process.exitcode for process in each):
        assert time.monotonic() < over, told.read_text()[-3000:]
        wait([process.sentinel for process in each if process.exitcode is None], 1.0)
    codes = [process.exitcode for process in each]
    for process in each:
        process.kill()
        process.join()
    if any(codes):
        pytest.fail(f"exit codes {codes}: {told.read_text()[-3000:]}")


def _do(jobs: list[list[str]], told: Path, rank: int, group: dict[str, object]) -> None:
    os.environ.update({key: str(value) for key, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()})
    with told.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    with distributed.process_group():
        for job in jobs:
            assert main(job) == 0, job
