"""A fault drill: a study whose processes are killed at random, on a disk that fills up and spoils files.

Run as ``python drill.py FILE OUT SEED KILLS``. Processes are forked from this one, which has imported everything, so
that a new runner costs no seconds; apart from that they run as in ``secateur study run``, two at once on one folder.
Prints what happened as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from secateur.study.planner import stages_of
from secateur.study.resolve import resolve
from secateur.study.runner import local
from secateur.study.runner.scheduler import run_stages
from secateur.study.spec import load_study

local.START["cpu"] = "fork"

FILE, OUT, SEED, KILLS = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
STAGES = OUT / "stages"
STUDY = load_study(FILE)
STUDY_STAGES = stages_of(STUDY, resolve(STUDY))


def runner(says: Path, *, largest: int | None = None) -> int:
    """Start a runner, which can write no file larger than so many bytes; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        handle = os.open(says, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        code = int(bool(run_stages(STUDY_STAGES, OUT, jobs=1).failed))
    os._exit(code)


def children(of: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in Path(f"/proc/{of}/task/{of}/children").read_text().split()]
    return []


def ended(child: int, *, wait: bool = False) -> int | None:
    found, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def gains() -> frozenset[str]:
    """What a kill cannot take away: finished stages, and checkpoints of others."""
    stages = [path.name for path in STAGES.glob("*") if ".partial" not in path.name]
    return frozenset([*stages, *(str(path)[-90:] for path in STAGES.glob("*/checkpoints/step-*"))])


def kill_some(draw: random.Random, kills: int, says: Path) -> int:
    """Keep two runners at it and kill one of their processes again and again; return how often."""
    runners: list[int] = []
    done = 0
    while done < kills:
        runners = [child for child in runners if ended(child) is None]
        if not runners and done and all_done():
            break
        while len(runners) < 2:
            runners.append(runner(says))
        before, wanted, over = gains(), draw.choice((0, 0, 1, 1)), time.monotonic() + 20
        while len(gains() - before) < wanted and time.monotonic() < over:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.4)
        victims = sorted(process for child in runners for process in [child, *children(child)])
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(victims), signal.SIGKILL)
            done += 1
    for child in runners:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
            ended(child, wait=True)
    return done


def all_done() -> bool:
    return not list(STAGES.glob("*.partial-*")) and len(list(STAGES.glob("*/record.json"))) > 1


def truncate_a_checkpoint(says: Path) -> str:
    """Kill a runner when it has a checkpoint, and cut a file of it short; return which checkpoint."""
    found: list[Path] = []
    child = runner(says)
    while not found and ended(child) is None:
        time.sleep(0.005)
        found = sorted(STAGES.glob("train-*.partial-*/checkpoints/step-*/*.safetensors"))
    os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        ended(child, wait=True)
    time.sleep(0.1)
    (shard,) = sorted(STAGES.glob("train-*.partial-*/checkpoints/step-*/*.safetensors"))[-1:]
    with shard.open("rb+") as file:
        file.truncate(shard.stat().st_size - 5)
    return shard.parent.name


def flip_a_byte(draw: random.Random) -> str:
    """Change one bit of a file of a finished stage; return which stage."""
    files = [path for path in sorted(STAGES.glob("*/model/model.safetensors")) if ".partial" not in str(path)]
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path.parents[1].name


def drill() -> dict[str, object]:
    draw, says = random.Random(SEED), OUT.with_name("said.txt")
    truncated = truncate_a_checkpoint(says)
    first = kill_some(draw, KILLS // 2, says)
    full = ended(runner(OUT.with_name("full.txt"), largest=40_000), wait=True)
    second = kill_some(draw, KILLS - first, says)
    whole = ended(runner(says), wait=True)
    flipped = flip_a_byte(draw)
    last = ended(runner(OUT.with_name("last.txt")), wait=True)
    return {
        "kills": first + second,
        "truncated": truncated,
        "full": full,
        "whole": whole,
        "flipped": flipped,
        "last": last,
    }


if __name__ == "__main__":
    print(json.dumps(drill()))
