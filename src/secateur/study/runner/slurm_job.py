"""The SLURM job of one stage. It does not import PyTorch: the stage runs in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.study.runner.torchrun import outcome_of_exit, torchrun_command
from secateur.study.stage import Stage
from secateur.study.store import Store

__all__ = ["Job"]

_PORT = 29511  # first of the ports at which the nodes of a job meet


@dataclass
class Job:
    """A job that runs one stage, under torchrun if it takes several processes."""

    stage: Stage
    file: Path
    out: Path
    device: str
    nodes: int
    grace: int
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> str:
        """Run the stage. A failure raises an error, which keeps dependent jobs from starting."""
        import submitit

        environment = submitit.JobEnvironment()
        address = f"{environment.hostnames[0]}:{_PORT + int(environment.job_id.partition('_')[0]) % 1000}"
        command = torchrun_command(
            self.stage, self.file, self.out, self.device, nodes=self.nodes, node=environment.node, address=address
        )
        self.process = subprocess.Popen(command, preexec_fn=_ignore_warning)
        code = self.process.wait()
        outcome = outcome_of_exit(self.stage, Store(self.out), code)
        if outcome.state == "stopped":  # by a signal that went to all processes of the job
            _requeue(environment)
        if outcome.state not in ("done", "elsewhere"):
            raise RuntimeError(outcome.text)
        return outcome.state

    def checkpoint(self) -> Any:
        """Stop the stage after it has saved, when the scheduler warns that the job will end; resume in a new job."""
        import submitit

        if self.process:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(5, self.grace - 20))
        return submitit.helpers.DelayedSubmission(replace(self))


def _ignore_warning() -> None:
    """Ignore the scheduler's warning: it goes to every process of a job, and submitit alone handles it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _requeue(environment: Any) -> None:
    """Queue the job again and wait for the scheduler to end this one."""
    if environment.global_rank == 0:
        subprocess.run(["scontrol", "requeue", environment.job_id], capture_output=True, check=False)
    time.sleep(60)
