"""Scores that do not depend on the ratio: found once in a study, found again, waited for, and found anew if damaged."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from test_study import study_file

from secateur import progress
from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.journal import Journal
from secateur.study.planner import stages_of
from secateur.study.resolve import resolve
from secateur.study.runner.scheduler import run_stages
from secateur.study.runner.worker import run_stage_attempt
from secateur.study.spec import load_study
from secateur.study.stage import Stage
from secateur.study.store import Store

RATIOS = (0.25, 0.5, 0.75)
LAYERS = 8


def work(stage: Stage, out: Path) -> str | None:
    """Do a stage in this process; say what went wrong."""
    ended = run_stage_attempt(stage, Store(out))
    return None if ended.state == "done" else f"{ended.state}: {ended.text}"


class World:
    """A store in which the corpus and the parent are done."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.folder = folder
        self.alone = cache(self._alone)
        shape = {"hidden": 16, "ffn": 48, "layers": LAYERS, "heads": 8, "kv_heads": 4}
        changes = {"parent": {"tokens": 600, **shape}, "calibration": {"windows": 6}, "retrain": {"tokens": 100}}
        every = ["shortgpt", "minitron-depth", "shortened-llama", "shortened-llama-ppl", "random-depth", "wanda"]
        every += ["llm-pruner", "minitron-width", "wanda-sp", "flap"]
        path = study_file(folder, text, ratios=list(RATIOS), methods=every, **changes)
        study = load_study(path)
        self.stages = stages_of(study, resolve(study))
        for stage in self.stages[:2]:
            assert work(stage, folder / "base") is None

    def stage(self, method: str, ratio: float) -> Stage:
        return next(s for s in self.stages if s.kind == "prune" and s.name == f"{method}-{ratio:g}")

    def copy(self, out: Path) -> Path:
        return shutil.copytree(self.folder / "base", out)

    def _alone(self, method: str, ratio: float) -> dict[str, str]:
        """What a stage writes where no other has run; computed once."""
        out = self.copy(self.folder / f"{method}-{ratio}")
        assert work(self.stage(method, ratio), out) is None
        return written(out, self.stage(method, ratio))


@pytest.fixture(scope="module")
def world(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tmp_path_factory.mktemp("world"), text)
    torch.set_num_threads(threads)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is told while a stage runs."""
    lines: list[str] = []
    listener = progress.LineListener()
    listener.message = lines.append  # type: ignore[method-assign]
    progress.set_listener(listener)
    yield lines
    progress.close()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each walk that sends calibration text into the model."""
    seen: list[int] = []
    start = BlockWalk.start
    monkeypatch.setattr(BlockWalk, "start", lambda self, *a: (seen.append(1), start(self, *a))[1])
    return seen


def written(out: Path, stage: Stage) -> dict[str, str]:
    """Every file of a stage that must not depend on how it was run."""
    folder = Store(out).folder(stage)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "runtime.json"
    }


def scores(out: Path) -> dict[str, tuple[int, int]]:
    """The files that hold scores; a new one in the place of an old one has another inode or time."""
    found = sorted(out.glob("scores/*/*/step-*"))
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize(
    ("method", "walks"),
    [
        ("shortgpt", [1, 0, 0]),
        ("shortened-llama", [1, 0, 0]),
        ("shortened-llama-ppl", [1, 0, 0]),
        ("llm-pruner", [1, 0, 0]),
        ("minitron-width", [1, 0, 0]),
        ("flap", [1, 0, 0]),
        ("minitron-depth", [1, 1, 1]),  # candidates as long as what is to go
        ("wanda-sp", [1, 1, 1]),  # each block is scored behind those cut before it
        ("wanda", [1, 1, 1]),
    ],
)
def test_a_method_scores_once_for_all_ratios(
    method: str, walks: list[int], world: World, tmp_path: Path, starts: list[int]
) -> None:
    out = world.copy(tmp_path / "out")
    counted = []
    for ratio in RATIOS:
        before, kept = len(starts), scores(out)
        assert work(world.stage(method, ratio), out) is None
        counted.append(len(starts) - before)
        assert kept.items() <= scores(out).items()
    assert counted == walks
    assert len(list(out.glob("scores/*/scores.json"))) == (0 if method == "wanda" else sum(walks))
    assert not list(out.glob("stages/**/checkpoints"))
    for ratio in RATIOS:
        assert written(out, world.stage(method, ratio)) == world.alone(method, ratio)


def test_another_model_or_calibration_has_other_scores(world: World, tmp_path: Path) -> None:
    out = world.copy(tmp_path / "out")
    stage = world.stage("shortgpt", 0.5)
    seeded = {**stage.identity, "calibration": {**stage.identity["calibration"], "seed": 1}}
    other = Stage(stage.kind, stage.name, seeded, stage.inputs, runtime=stage.runtime)
    assert work(stage, out) is None and work(other, out) is None
    assert len(list((out / "scores").iterdir())) == 2


@pytest.mark.parametrize("method", ["shortgpt", "minitron-width", "wanda", "random-depth"])
def test_a_killed_pruning_goes_on_at_the_last_finished_block(
    method: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stage = world.copy(tmp_path / "out"), world.stage(method, 0.5)
    finish = Journal.finish

    def killed(self: Journal, step: int) -> None:
        finish(self, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", killed)
        work(stage, out)
    large = list(out.glob("stages/prune-*.partial-*/checkpoints/*/step-*.safetensors"))
    assert len(large) == (5 if method == "wanda" else 0)
    observed, observe = [], Block.observe
    monkeypatch.setattr(
        Block, "observe", lambda self, *a, **k: (observed.append(self.index), observe(self, *a, **k))[1]
    )
    assert work(stage, out) is None
    assert observed == ([] if method == "random-depth" else list(range(5, LAYERS)))
    assert written(out, stage) == world.alone(method, 0.5)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)


def _scrawl(path: Path) -> None:
    path.with_name("finished").write_text("many")


@pytest.mark.parametrize(
    ("damage", "sealed"),
    [(_flip, True), *[(damage, sealed) for damage in (_truncate, Path.unlink, _scrawl) for sealed in (True, False)]],
)
def test_damaged_scores_are_computed_again(
    damage: Callable[[Path], object], sealed: bool, world: World, tmp_path: Path, starts: list[int], said: list[str]
) -> None:
    out, expected = world.copy(tmp_path / "out"), world.alone("shortgpt", 0.5)
    starts.clear()
    assert work(world.stage("shortgpt", 0.25), out) is None
    if not sealed:  # as a kill in the middle leaves it: there are no hashes yet
        next(out.glob("scores/*/scores.json")).unlink()
        next(out.glob("scores/*/*/complete")).unlink()
    damage(sorted(out.glob("scores/*/*/step-*"))[3])
    said.clear()
    assert work(world.stage("shortgpt", 0.5), out) is None
    assert len(starts) == 2
    assert [line for line in said if "damaged" in line] == said and len(said) == 1
    assert written(out, world.stage("shortgpt", 0.5)) == expected
    assert work(world.stage("shortgpt", 0.75), out) is None
    assert len(starts) == 2, "none more"


def test_a_damaged_seal_is_no_reason_to_stop(world: World, tmp_path: Path, starts: list[int]) -> None:
    out = world.copy(tmp_path / "out")
    assert work(world.stage("shortgpt", 0.25), out) is None
    next(out.glob("scores/*/scores.json")).write_text("[1")
    assert work(world.stage("shortgpt", 0.5), out) is None
    assert len(starts) == 2


HOLD = """
import sys, time
from pathlib import Path
from secateur.study.runner.lease import Leases
claims = Leases(Path(sys.argv[1]))
with claims.acquire(sys.argv[2], claims.state(sys.argv[2]).number):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_stage_waits_for_another_that_scores_and_goes_on_when_it_dies(
    world: World, tmp_path: Path, said: list[str]
) -> None:
    out, stage = world.copy(tmp_path / "out"), world.stage("shortgpt", 0.5)
    assert work(world.stage("shortgpt", 0.25), out) is None
    (key,) = (path.name for path in out.glob("claims/scores-shortgpt-*"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out / "claims"), key], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        worker = threading.Thread(target=work, args=(stage, out))
        worker.start()
        while worker.is_alive() and not said:
            time.sleep(0.01)
        assert said == ["shortgpt-0.5: waits for its scores, which another stage is computing"]
        assert not Store(out).done(stage)
        holder.kill()
    worker.join(timeout=60)
    assert Store(out).done(stage)


def test_two_workers_at_once(world: World, tmp_path: Path) -> None:
    out = world.copy(tmp_path / "out")
    methods = ("minitron-width", "shortgpt")
    stages = [world.stage(method, ratio) for method in methods for ratio in RATIOS[:2]]
    outcome = run_stages(stages, out, jobs=2)
    assert outcome.ran == 4 and not outcome.failed
    assert len(list((out / "scores").iterdir())) == 2
    for method in methods:
        assert written(out, world.stage(method, 0.5)) == world.alone(method, 0.5)
