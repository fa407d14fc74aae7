"""Pruning in several processes, on the CPU, against one process: every method, after a kill, and with errors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import files, tiny_llama, windows
from processes import Processes, run_all
from secateur import distributed
from secateur.calibration import statistics
from secateur.calibration.block_walk import Block
from secateur.calibration.journal import Journal
from secateur.cli import main
from secateur.errors import UserError
from secateur.runtime import pick_device

#: method -> what it is asked for besides
METHODS = {
    "wanda": [],
    "sparsegpt": [],
    "magnitude": [],
    "minitron-width": ["--axes", "hidden,ffn,kv"],
    "flap": ["--allocation", "global"],
    "wanda-sp": ["--states", "disk"],
    "llm-pruner": ["--option", "order=mixed", "--axes", "hidden,ffn,kv"],
    "shortgpt": ["--states", "disk"],
    "minitron-depth": [],
    "shortened-llama": [],
}


def check_statistics(count: int) -> None:
    """Statistics of the windows of each process, joined, are those of all windows."""
    torch.manual_seed(0)
    x, gradients = 3 + torch.randn(count, 6, 8), torch.randn(count, 5, 4)
    states = [(x[i : i + 1], x[i : i + 1] + torch.randn(1, 6, 8)) for i in range(count)]
    mine = distributed.shard(torch.arange(count)).tolist()
    activations = [(x[i : i + 1],) for i in range(count)]
    kinds = (statistics.Mean, statistics.MeanSquare, statistics.Variance, statistics.Gram, statistics.WindowMagnitude)
    cases: list[tuple[Any, tuple[int, ...], list[Any]]] = [(kind, (2,), activations) for kind in kinds]
    cases += [
        (kind, (), [(g,) for g in gradients]) for kind in (statistics.MeanGradient, statistics.MeanSquareGradient)
    ]
    for kind, arguments, samples in [*cases, (statistics.MeanCosine, (), states)]:
        whole, part = kind(*arguments), kind(*arguments)
        for sample in samples:
            whole.update(*sample)
        for number in mine:
            part.update(*samples[number])
        statistics.join([part], "cpu")
        torch.testing.assert_close(part.value(), whole.value(), rtol=1e-5, atol=1e-6, msg=lambda m, k=kind: f"{k}: {m}")


def kill_the_first(self: Journal, step: int, real: Any = Journal.finish) -> None:
    real(self, step)
    if step == 1 and distributed.is_main():
        os.kill(os.getpid(), signal.SIGKILL)


def fail_in_the_second(self: Any, *arguments: Any, real: Any = Block.run, **options: Any) -> Any:
    if distributed.rank() == 1 and self.index == 2:
        raise UserError("these windows alone")
    return real(self, *arguments, **options)


def drive(jobs: list[list[str]], fault: str, last: list[str]) -> int:
    """Merge statistics, prune one job after the other, and then do what is to go wrong."""
    with distributed.process_group():
        check_statistics(7)
        check_statistics(2)
        assert run_all(jobs) == 0
        if fault == "kill":
            Journal.finish = kill_the_first
        if fault == "fail":
            Block.run = fail_in_the_second
        return main(last)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tiny_llama(tmp_path, num_hidden_layers=4).rename(tmp_path / "model")
    for count in (2, 5):
        np.save(tmp_path / f"ids-{count}.npy", windows(count).numpy())
    return tmp_path


def line(world: Path, out: str, method: str, count: int = 5, *more: str) -> list[str]:
    calibration = ["--calibration", f"tokens:{world / f'ids-{count}.npy'}", "--batch", "2", "--json"]
    return ["prune", str(world / "model"), str(world / out), "--method", method, "--ratio", "0.5", *calibration, *more]


def assert_alike(found: Path, wanted: Path) -> None:
    """The same selection, and scores to 1e-4."""
    plan, expected = load_file(found / "plan.safetensors"), load_file(wanted / "plan.safetensors")
    assert plan.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith(("score.", "bias.")):
            assert torch.allclose(plan[name], tensor, rtol=1e-4, atol=1e-6), f"{found}: {name}"
        else:
            assert torch.equal(plan[name], tensor), f"{found}: {name}"
    ours, theirs = load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), f"{found}: {name}"


@pytest.mark.slow
def test_three_processes_prune_as_one_does(world: Path, capfd: pytest.CaptureFixture) -> None:
    """Five windows give the last process one, two windows give it none. After a kill the same three go on."""
    few = ("wanda", "llm-pruner", "minitron-depth")  # statistics of activations, gradients, losses
    cases = {f"{method}-5": (method, 5) for method in METHODS} | {f"{method}-2": (method, 2) for method in few}
    lines = {name: line(world, f"one/{name}", m, c, *METHODS[m]) for name, (m, c) in cases.items()}
    assert all(main(each) == 0 for each in lines.values())
    jobs = [line(world, f"three/{name}", m, c, *METHODS[m]) for name, (m, c) in cases.items()]
    killed = line(world, "out", "wanda", 5, "--states", "disk")
    three = Processes(world, drive, jobs, "kill", killed, count=3)
    codes = three.join()
    assert codes[0] == -signal.SIGKILL and all(codes), three.errors
    answers = [json.loads(each) for each in three.output.splitlines()]
    assert [Path(each["out"]).name for each in answers] == list(cases)  # each once
    for name in cases:
        assert_alike(world / "three" / name, world / "one" / name)

    assert {p.name for p in (world / "out.partial" / "work" / "states").glob("*/*")} == {"0", "1", "2"}
    capfd.readouterr()
    assert main([*killed, "--resume"]) == 2
    assert "another number of processes" in capfd.readouterr().err
    last = line(world, "failed", "flap", 5)
    three = Processes(world, drive, [[*killed, "--resume"]], "fail", last, count=3)
    assert all(three.join())
    assert files(world / "out") == files(world / "three" / "wanda-5") and not (world / "out.partial").exists()
    errors = [each for each in three.errors.splitlines() if each.startswith("secateur: ")]
    assert errors == ["secateur: error: these windows alone"]
    assert not (world / "failed").exists()


@pytest.mark.slow
def test_two_processes_prune_and_complain_once(world: Path) -> None:
    two = line(world, "two", "minitron-width", 5, "--states", "disk")
    two[two.index("0.5")] = "0.25,0.5"
    assert main([str(each).replace(str(world / "two"), str(world / "one")) for each in two]) == 0
    processes = Processes(world, drive, [two], "", line(world, "bad", "no-such-method"), count=2)
    assert processes.join() == [2, 2]
    for ratio in ("0.25", "0.5"):
        assert_alike(world / "two" / f"ratio-{ratio}", world / "one" / f"ratio-{ratio}")
    errors = [each for each in processes.errors.splitlines() if each.startswith("secateur: ")]
    assert len(errors) == 1 and "no-such-method" in errors[0] and not (world / "bad.partial").exists()


def be(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "_group", distributed._Group(rank, world, None))
    monkeypatch.setenv("LOCAL_RANK", str(rank))


@pytest.mark.parametrize(("count", "sizes"), [(7, [3, 2, 2]), (3, [1, 1, 1]), (2, [1, 1, 0]), (1, [1, 0, 0])])
def test_windows_are_shared_out(count: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(3):
        be(monkeypatch, rank, 3)
        parts.append(distributed.shard(windows(count)))
    assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(parts), windows(count))


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, 1, 2)
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert pick_device("auto") == pick_device("cuda") == "cuda:1" and pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="`device`: cuda:0 cannot be used by several processes"):
        pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1 CUDA device;"):
        pick_device("auto")
