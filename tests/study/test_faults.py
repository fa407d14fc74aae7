"""Whatever happens to a study's processes and files, its records are those of an undisturbed run."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import records, run, study_file

from secateur.model.safetensors_io import Stored, write_tensors

KILLS = 6

#: A study's process and its worker; both hold the pipe that is read here.
HELD = """
import multiprocessing, os, sys, time
from secateur.study.runner import local

def hold(study):
    local.exit_with_parent(study)
    print("held", flush=True)
    time.sleep(300)

if __name__ == "__main__":
    multiprocessing.get_context(local.START[sys.argv[1]]).Process(target=hold, args=(os.getpid(),)).start()
    time.sleep(300)
"""


def drill(file: Path, out: Path, kills: int) -> dict[str, Any]:
    """Run ``drill.py``; what it says."""
    command = [sys.executable, str(Path(__file__).with_name("drill.py")), str(file), str(out), "7", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kills_a_full_disk_and_spoilt_files_change_nothing(text: Path, tmp_path: Path) -> None:
    recipe = {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1}
    shape = {"hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    file = study_file(
        tmp_path,
        text,
        parent={"tokens": "10k", **shape},
        methods=["minitron-width", "wanda"],
        retrain={"tokens": 1100},
        evaluation={"windows": 8, "points": 1},
        recipe=recipe,
    )
    quiet, out = tmp_path / "quiet" / "out", tmp_path / "drill" / "out"
    for folder in (quiet, out):
        folder.mkdir(parents=True)
    assert not run("study", "run", file, "--out", quiet, "--device", "cpu")["failed"]
    found = drill(file, out, KILLS)
    said = {name: (out.parent / f"{name}.txt").read_text() for name in ("said", "full", "last")}
    assert (found["kills"], found["whole"], found["last"]) == (KILLS, 0, 0), said["last"]
    assert records(out) == records(quiet)
    assert not [*out.glob("stages/*.partial-*"), *out.glob("stages/*.damaged")], "nothing unfinished is left behind"
    assert found["full"] == 1 and "the disk is full; free some space" in said["full"]
    assert re.search(
        rf"checkpoints/{found['truncated']}: this checkpoint is damaged; trying the previous one",
        "".join(said.values()),
    )
    told = [line for line in said["last"].splitlines() if "damaged" in line]
    assert len(told) == 1 and told[0].endswith("model/model.safetensors is damaged; it will be run again")
    # No stage was done twice, but for the one that was spoilt, and no two processes were at one at the same time: each
    # attempt counts on from what the one before it had left.
    for log in (out / "logs").glob("*.log"):
        lines = log.read_text().splitlines()
        spoilt = log.stem == found["flipped"]
        attempts = [int(number[1]) for line in lines if (number := re.search(r"  attempt (\d+), in", line))]
        counts = Counter("finished after" in line for line in lines)
        assert counts[True] <= 1 + spoilt, log
        assert len(attempts) == len(set(attempts)) + (spoilt and attempts.count(1) - 1), log


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_worker_ends_with_its_study(device: str, tmp_path: Path) -> None:
    """Also while nobody has looked at what became of the study's process."""
    (tmp_path / "held.py").write_text(HELD)
    command = [sys.executable, str(tmp_path / "held.py"), device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None and study.stdout.readline() == "held\n"
        study.kill()
        study.communicate(timeout=60)  # until the last of them has gone


def test_a_file_that_cannot_be_written_to_its_end_is_no_file(tmp_path: Path) -> None:
    """numpy's ``tofile`` leaves a short file and says nothing, if the rest is in the C library's buffer."""
    path = tmp_path / "x.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = [Stored.of(f"{number}", torch.ones(600)) for number in range(20)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(path, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
