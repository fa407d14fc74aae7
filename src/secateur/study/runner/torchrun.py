"""The command line that runs one stage, in one process or several."""

from __future__ import annotations

import sys
from pathlib import Path

from secateur.errors import REQUEUE
from secateur.study.stage import Stage
from secateur.study.store import StageOutcome, Store

__all__ = ["outcome_of_exit", "processes_of", "torchrun_command"]


def processes_of(stage: Stage) -> int:
    """Number of processes that run the stage together."""
    return int(stage.runtime.get("processes", 1))


def torchrun_command(
    stage: Stage, file: Path, out: Path, device: str, *, nodes: int = 1, node: int = 0, address: str = ""
) -> list[str]:
    """The command line of a stage, under torchrun if it takes several processes.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        nodes: number of machines that share the processes.
        address: ``host:port`` of machine 0.
    """
    verb = ["-m", "secateur", "study", "stage", str(file), stage.fingerprint, "--out", str(out), "--device", device]
    count = processes_of(stage)
    if count == 1:
        return [sys.executable, *verb]
    host, _, port = address.partition(":")
    rendezvous = ["--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", host, "--master-port", port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count // nodes)]
    return [*torchrun, *(rendezvous if nodes > 1 else ["--standalone"]), *verb]


def outcome_of_exit(stage: Stage, store: Store, code: int) -> StageOutcome:
    """The outcome of a stage whose command ended with ``code``; torchrun replaces every code but 0."""
    runtime = store.runtime(stage)
    if store.done(stage) and code == 0:
        return StageOutcome("done")
    if code == REQUEUE or runtime.get("stopped"):
        return StageOutcome("stopped", f"{stage.name}: stopped by a signal; run the same command to resume")
    if runtime.get("error"):
        return StageOutcome("failed", str(runtime["error"]))
    if store.is_running(stage):
        return StageOutcome("elsewhere")
    return StageOutcome("failed", f"its process ended with exit code {code} (see {store.log(stage)})")
