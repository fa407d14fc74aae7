"""What a job of SLURM does: one stage. Without PyTorch, since the process that computes is another."""

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

_PORT = 29511  # where the nodes of one job meet, and the numbers after it


@dataclass
class Job:
    """What a job does: one stage, in a process of its own or under torchrun, and on to the next node."""

    stage: Stage
    file: Path
    out: Path
    device: str
    nodes: int
    grace: int
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> str:
        """Run the stage; raise what keeps dependents from starting if it fails."""
        import submitit

        where = submitit.JobEnvironment()
        address = f"{where.hostnames[0]}:{_PORT + int(where.job_id.partition('_')[0]) % 1000}"
        told = torchrun_command(
            self.stage, self.file, self.out, self.device, nodes=self.nodes, node=where.node, address=address
        )
        self.process = subprocess.Popen(told, preexec_fn=_ignore_warning)
        code = self.process.wait()
        ended = outcome_of_exit(self.stage, Store(self.out), code)
        if ended.how == "stopped":  # by a signal that went to all processes of the job
            _requeue(where)
        if ended.how not in ("done", "elsewhere"):
            raise RuntimeError(ended.text)
        return ended.how

    def checkpoint(self) -> Any:
        """Let the stage save and stop, as the scheduler has warned that it will end the job; go on in the next one."""
        import submitit

        if self.process:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(5, self.grace - 20))
        return submitit.helpers.DelayedSubmission(replace(self))


def _ignore_warning() -> None:
    """The scheduler's warning goes to every process of a job, and is submitit's to handle."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _requeue(where: Any) -> None:
    """Queue the job again, if that has not been done; this one's end is the scheduler's to bring about."""
    if where.global_rank == 0:
        subprocess.run(["scontrol", "requeue", where.job_id], capture_output=True, check=False)
    time.sleep(60)
