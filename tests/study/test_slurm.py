"""Studies through a real SLURM of one node, which is started for these tests where it is installed."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_study import command, records, run, study_file

from secateur.errors import UserError
from secateur.study.runner.slurm import Slurm, parse_slurm

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
_there = importlib.util.find_spec("submitit") and all(map(shutil.which, PROGRAMS))
needs_slurm = pytest.mark.skipif(not _there, reason="needs submitit, munge and SLURM")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,requeue_delay=1
ReturnToService=2
SlurmdTimeout=300
KillWait=5
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONFIG.format(folder=folder, ports=free_ports(2), user=getpass.getuser()))
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "GLOO_SOCKET_IFNAME")}
    os.environ.update(SLURM_CONF=str(conf), GLOO_SOCKET_IFNAME="lo")
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
    daemons = []
    with (folder / "daemons.log").open("w") as log:
        for daemon in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            daemons.append(subprocess.Popen(daemon, stdout=log, stderr=log))
            time.sleep(0.5)
        try:
            over = time.monotonic() + 30
            while "idle" not in queued("sinfo", "-h", "-o", "%T") and time.monotonic() < over:
                time.sleep(0.2)
            if "idle" not in queued("sinfo", "-h", "-o", "%T"):
                pytest.skip(f"SLURM does not start here: {(folder / 'daemons.log').read_text()[-300:]}")
            yield folder
        finally:
            queued("scancel", "--me")
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def queued(*told: str) -> str:
    return subprocess.run(told, capture_output=True, text=True, check=False).stdout


def study(folder: Path, text: Path, **changes: Any) -> Path:
    shape = {"hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    settings = {
        "methods": ["shortgpt"],
        "settings": ["equal_training_tokens"],
        "evaluation": {"windows": 8, "points": 1},
    }
    return study_file(
        folder, text, **{"parent": {"tokens": 6000, **shape}, "retrain": {"tokens": 600}, **settings, **changes}
    )


def test_options_are_strict() -> None:
    assert parse_slurm(["time=5", "mem=4G", "partition=1"]) == Slurm(time=5, mem="4G", partition="1")
    for pairs, want in {
        "tme=5": "`slurm` tme: is not known; did you mean 'time'?",
        "time": "is not KEY=VALUE",
        "time=soon": "time: should be",
        "mem=much": "mem: should",
    }.items():
        with pytest.raises(UserError, match=want.replace("?", r"\?")):
            parse_slurm([pairs])


@needs_slurm
@pytest.mark.slow
def test_a_study_of_jobs_has_the_records_of_a_local_one(slurm: Path, text: Path, tmp_path: Path) -> None:
    """The parent and its twin are an array that waits for the corpus; the job of the parent is queued again."""
    file, out = (
        study(
            tmp_path, text, parent={"tokens": 24_000, "hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
        ),
        tmp_path / "jobs",
    )
    only = ("--only", "parent", "--only", "shortgpt-0.5/S_R")
    options = ("--launcher", "slurm", "--slurm", "time=10", "--slurm", "grace=30", "--device", "cpu")
    told = [*command("study", "run", file, "--out", out, *only, *options, "--json")]
    with subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as runner:
        again = None
        over = time.monotonic() + 500
        while runner.poll() is None and time.monotonic() < over:
            saved = next(out.glob("stages/train-parent-*.partial-*/checkpoints/step-*/state.json"), None)
            if saved and again is None:
                again = json.loads(
                    next(out.glob(f"jobs/{saved.parents[2].name.split('.')[0][-12:]}.json")).read_text()
                )["job"]
                queued("scancel", "--signal=USR2", again)  # as before the end of its time
            time.sleep(0.05)
        stdout, stderr = runner.communicate(timeout=300)
    assert runner.returncode == 0, stderr
    assert json.loads(stdout)["failed"] == {} and again
    local = tmp_path / "local"
    run("study", "run", file, "--out", local, *only, "--device", "cpu", "--jobs", 1)
    assert records(out) == records(local)
    log = next(out.glob("logs/train-parent-*.log")).read_text()
    assert "stopped by a signal, saved" in log and "attempt 2" in log
    assert again.count("_") == 1, "a task of an array"


@needs_slurm
@pytest.mark.slow
def test_a_failed_job_is_told(slurm: Path, text: Path, tmp_path: Path) -> None:
    file = study(
        tmp_path, text, parent={"tokens": "900k", "hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    )
    told = command(
        "study",
        "run",
        file,
        "--out",
        tmp_path / "out",
        "--only",
        "parent",
        "--launcher",
        "slurm",
        "--json",
        "--device",
        "cpu",
    )
    done = subprocess.run(told, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert "give more text, or lower parent.tokens" in answer["failed"]["parent"]
    assert answer["skipped"] == ["parent"], "its evaluation"
    assert sys.executable in told[0] and not queued("squeue", "-h", "--me").strip()
