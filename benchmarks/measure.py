"""Runs a command and says what it took: CPU-seconds, wall seconds, and peaks of memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "run"]

INTERVAL = 0.02  #: seconds between looks at a child's memory

#: around a Python command on a GPU, which alone can tell what it had allocated there
_TELL_DEVICE = """
import atexit, json, runpy, sys
report, kind, name = sys.argv[1:4]
def tell():
    torch = sys.modules.get("torch")
    peak = torch.cuda.max_memory_reserved() if torch and torch.cuda.is_available() else 0
    open(report, "w").write(json.dumps({"device": peak}))
atexit.register(tell)
sys.argv = [name, *sys.argv[4:]]
if kind == "-m":
    runpy.run_module(name, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(name, run_name="__main__")
"""


@dataclass
class Measured:
    """What a command took. Memory is in bytes."""

    cpu: float  #: user and system seconds of the process and its children
    wall: float
    anonymous: int  #: peak of RssAnon and RssShmem, looked at every fiftieth of a second: what cannot be reread
    resident: int  #: VmHWM, by the kernel: mapped files count as far as they happen to be in memory
    device: int | None  #: peak that torch reserved on the GPU
    failure: str | None  #: the last line of what it said, if it failed


def run(
    command: Sequence[str], environment: Mapping[str, str], *, device: str = "cpu", limit: int | None = None
) -> Measured:
    """Run a Python command ``[interpreter, -m MODULE or FILE, ...]``.

    Args:
        command: what to run.
        environment: its whole environment.
        device: cpu, or cuda for peaks on the GPU as well.
        limit: bytes of RLIMIT_DATA, i.e. of writable private memory.
    """

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        if device != "cpu":
            python, *rest = command
            module = rest[:2] if rest[0] == "-m" else ["file", rest[0]]
            command = [python, "-P", "-c", _TELL_DEVICE, str(report), *module, *rest[2 if rest[0] == "-m" else 1 :]]
        with (Path(scratch) / "said.txt").open("w+b") as said:
            started = time.perf_counter()
            child = subprocess.Popen(command, stdout=said, stderr=said, env=environment, preexec_fn=confine)
            anonymous = resident = 0
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                found = _memory(child.pid)
                anonymous = max(anonymous, found.get("RssAnon", 0) + found.get("RssShmem", 0))
                resident = max(resident, found.get("VmHWM", 0))
                time.sleep(INTERVAL)
            wall = time.perf_counter() - started
            child.returncode = code = os.waitstatus_to_exitcode(status)
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
        seen = json.loads(report.read_text())["device"] if report.exists() else None
    lines = [line for line in lines if "%|" not in line] or lines  # a bar that was left standing tells nothing
    failure = (lines[-1][:200] if lines else f"exit code {code}") if code else None
    return Measured(usage.ru_utime + usage.ru_stime, wall, anonymous, resident, seen, failure)


def _memory(pid: int) -> dict[str, int]:
    """Sizes in bytes from the kernel's status of a process; empty once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    rows = (line.partition(":") for line in text.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in rows}


if sys.platform != "linux":
    raise SystemExit("the benchmark reads /proc, which Linux alone has")
