"""Ctrl-C, and checkpoints by the clock: nothing of a run is lost, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import hf, tiny_llama, token_corpus
from processes import Processes, run_all
from secateur import distributed
from secateur.training.batches import Slice
from secateur.training.loop import RunOptions, train_loop
from secateur.training.parallel import TrainModule
from secateur.training.recipe import Recipe
from secateur.training.watchdog import stop_on_signals

WAIT = 200.0


def torchrun(folder: Path, *command: object) -> subprocess.Popen[str]:
    """Start a command in two processes, by torchrun itself."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateur"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, command)],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` ignores it
    )


def start(folder: Path, *command: object) -> Processes:
    return Processes(folder, run_all, [[str(word) for word in command]], environment={"CUDA_VISIBLE_DEVICES": ""})


def wait_until(ready: Callable[[], bool], alive: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not ready() and alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert alive(), "the run ended by itself"


def test_the_first_interrupt_stops_and_the_second_ends(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        assert "finishing the step and saving; Ctrl-C again stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    """As in the workers of a study, whose own process handles it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpus(tmp_path_factory.mktemp("corpus"), tokens=200_000, vocabulary=61)


def job(out: Path, model: Path, corpus: Path, tokens: int, *options: object) -> list[object]:
    recipe = ["--set", "sequence=32", "--set", "tokens_per_step=64", "--set", "peak_rate=1e-3", "--points", "1"]
    data = ["--data", f"shards:{corpus}", "--tokens", tokens, "--heldout-windows", "2"]
    return ["train", out, "--init", model, *data, *recipe, *options]


def steps(work: Path) -> int:
    """Number of steps that the metrics of a run list."""
    metrics = work / "metrics.jsonl"
    return metrics.read_text().count('"learning_rate"') if metrics.exists() else 0


def check_saved(work: Path, errors: str) -> int:
    """Check that an interrupted run has saved its last step; return the number of that step."""
    saved, done = max((work / "checkpoints").glob("step-*")), steps(work)
    assert saved.name == f"step-{done:08}"
    assert errors.count(f"stopped by a signal, saved {saved}; run the same command to resume") == 1
    assert "interrupted: finishing the step and saving" in errors
    return done


def test_ctrl_c_saves_and_the_same_command_goes_on(corpus: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial" / "work"
    command = job(out, tiny_llama(tmp_path), corpus, 120_000, "--save-every", 100_000)
    done = 0
    for _ in range(2):
        process = start(tmp_path, *command)
        wait_until(lambda: steps(work) > done, lambda: process.alive)  # noqa: B023
        process.send(signal.SIGINT)
        assert process.join() == [75], process.errors
        assert "Traceback" not in process.errors
        before, done = done, check_saved(work, process.errors)
        assert done > before


@pytest.mark.slow
def test_ctrl_c_for_torchrun_saves_as_well(corpus: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial" / "work"
    command = job(out, tiny_llama(tmp_path), corpus, 120_000, "--save-every", 100_000)
    process = torchrun(tmp_path, *command)
    wait_until(lambda: steps(work) > 0, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=WAIT)[1]
    assert process.returncode == 1, errors
    done = check_saved(work, errors)
    pair = Processes(tmp_path, run_all, [[str(word) for word in command]], count=2)
    wait_until(lambda: steps(work) > done, lambda: pair.alive)
    pair.send(signal.SIGINT)
    assert pair.join() == [75, 75], pair.errors
    assert check_saved(work, pair.errors) > done


STUDY = """
name: interrupted
corpus: {source: "text:TEXT", holdout: 0.2, vocabulary: 280}
parent: {tokens: 20k, hidden: 16, ffn: 48, layers: 4, heads: 4, kv_heads: 2}
methods: [magnitude]
ratios: [0.5]
settings: []
retrain: {tokens: 1024, peak_rate: 2e-3}
recipe: {sequence: 32, tokens_per_step: 64, peak_rate: 3e-3}
evaluation: {windows: 8, points: 1}
"""


def test_ctrl_c_in_a_study_saves_what_is_trained(tmp_path: Path) -> None:
    folder, out = tmp_path / "text", tmp_path / "out"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(f"word{(number * 7 + i * i) % 97}" for i in range(600)))
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("TEXT", str(folder)))
    command = ["study", "run", file, "--out", out, "--jobs", 1]
    parent = "stages/train-parent-*.partial-*"

    process = start(tmp_path, *command)
    wait_until(lambda: bool(list(out.glob(f"{parent}/progress.json"))), lambda: process.alive)
    process.send(signal.SIGINT)
    assert process.join() == [75], process.errors
    stderr = process.errors
    assert "interrupted: training runs finish their steps and save" in stderr
    assert "stopped by a signal" in stderr and "run the same command to resume" in stderr and "Traceback" not in stderr
    saved = [
        int(state.parent.name.removeprefix("step-")) for state in out.glob(f"{parent}/checkpoints/step-*/state.json")
    ]
    assert saved and 0 < max(saved) < 312
    assert not list(out.glob("stages/prune-*"))
    process = start(tmp_path, *command, "--only", "parent")
    assert process.join() == [0], process.errors
    (runtime,) = out.glob("stages/train-parent-*/runtime.json")
    assert json.loads(runtime.read_text())["attempts"] == 2


def run(folder: Path, model: Any, **settings: Any) -> list[str]:
    """Train ten steps; return the checkpoints that stay."""
    ids = torch.randint(2, 61, (320,), generator=torch.Generator().manual_seed(1)).numpy()

    class Store:
        def targets(self, split: str, start: int, stop: int) -> None:
            return None

        def read(self, split: str, start: int, stop: int) -> Any:
            return ids[start:stop]

    data = Slice(Store(), 0, 320, Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-2))  # type: ignore[arg-type]
    options = RunOptions(folder, "run", save_every=4, keep=20, **settings)
    train_loop(TrainModule(model), data, masks={}, measure=lambda _: None, points=1, options=options)
    return [path.name for path in sorted(folder.glob("step-*"))]


def names(*numbers: int) -> list[str]:
    return [f"step-{number:08}" for number in numbers]


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path)
    assert run(tmp_path / "steps", hf(model)) == names(4, 8, 10)
    assert run(tmp_path / "minutes", hf(model), save_minutes=1e-9) == names(*range(1, 11))

    def all_reduce(values: Tensor) -> Tensor:  # as if the clock of another process had run out
        values[-1] += values.dtype == torch.float64  # the hashes of a checkpoint are summed as well
        return values

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    assert run(tmp_path / "together", hf(model)) == names(*range(1, 11))
