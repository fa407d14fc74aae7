"""Writing behind the computation, forced on the CPU: the same bytes, after a kill -9 at any moment too."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import files, tiny_llama, windows
from processes import Processes
from secateur.calibration import journal as journals
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.journal import Journal, StateStore, Workspace
from secateur.cli import main
from secateur.pruning import job
from secateur.pruning.memory_estimate import MemoryEstimate

METHODS = [
    *("shortgpt", "minitron-depth", "shortened-llama"),
    *("minitron-width", "wanda-sp"),
    *("magnitude", "wanda", "sparsegpt"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_llama(folder).rename(folder / "model")
    np.save(folder / "ids.npy", windows(6).numpy())
    return folder


def line(world: Path, out: Path, method: str, *more: str) -> list[str]:
    text = [] if method == "magnitude" else ["--calibration", f"tokens:{world / 'ids.npy'}", "--batch", "2"]
    return ["prune", str(world / "model"), str(out), "--method", method, "--ratio", "0.5", *text, *more]


def slowed(monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], None] = lambda _: None) -> list[str]:
    """Have the thread write, as on a GPU, and late; return the names of the threads that write, as they do."""
    names, write = [], journals.write_tensors

    def late(path: Path, *arguments: Any) -> None:
        time.sleep(0.02)
        names.append(threading.current_thread().name)
        then(path)
        write(path, *arguments)

    monkeypatch.setattr(journals, "is_worthwhile", lambda device: True)
    monkeypatch.setattr(journals, "write_tensors", late)
    return names


@pytest.mark.parametrize("states", ["ram", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_behind_are_the_same_bytes(
    method: str, states: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(line(world, tmp_path / "at-once", method)) == 0
    names = slowed(monkeypatch)
    assert main(line(world, tmp_path / "behind", method, "--states", states)) == 0
    assert names and all(name.startswith("async-writer") for name in names)
    assert files(tmp_path / "behind") == files(tmp_path / "at-once")
    assert not any(thread.name.startswith("async-writer") for thread in threading.enumerate())


def test_one_step_waits_at_most_and_whoever_asks_for_it_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, order = threading.Semaphore(0), []
    slowed(monkeypatch, lambda path: (gate.acquire(timeout=10), order.append(path.name))[0])
    journal = Journal(tmp_path)
    with journal.async_writes("cpu"):
        journal.put(0, {"a": torch.ones(3)})
        journal.finish(0)
        assert list(journal) == ["a"] and journal.finished_steps == 1 and list(tmp_path.iterdir()) == []
        second = threading.Thread(target=lambda: (journal.put(1, {"b": torch.zeros(2)}), order.append("put")))
        second.start()
        second.join(0.1)
        assert second.is_alive() and order == []
        gate.release()
        second.join(10)
        assert not second.is_alive() and order == ["step-00000.new", "put"]
        assert (tmp_path / "finished").read_text() == "1" and Journal(tmp_path).finished_steps == 1
        assert torch.equal(journal["a"], torch.ones(3))
        threading.Timer(0.05, gate.release).start()
        assert torch.equal(journal["b"], torch.zeros(2)) and order[-1] == "step-00001.new"
    assert set(journal) == {"a", "b"} and (tmp_path / "finished").read_text() == "1"


def full(path: Path) -> None:
    if path.name == "step-00002.new":
        raise OSError("4096 requested and 0 written")  # as numpy tells it


@pytest.mark.parametrize("method", ["wanda", "minitron-width"])
def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_later(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(line(world, tmp_path / "whole", method)) == 0
    told = {}
    for way in ("at once", "behind"):
        with monkeypatch.context() as patch:
            slowed(patch, full)
            if way == "at once":
                patch.setattr(journals, "is_worthwhile", lambda device: False)
            capsys.readouterr()
            assert main(line(world, tmp_path / way, method)) == 1
            told[way] = capsys.readouterr().err.splitlines()[-1]
            time.sleep(0.05)
        assert (tmp_path / f"{way}.partial" / "asked.json").exists()
        assert next((tmp_path / f"{way}.partial" / "work").glob("*/finished")).read_text() == "2"
        assert main(line(world, tmp_path / way, method, "--resume")) == 0
        assert files(tmp_path / way) == files(tmp_path / "whole")
    assert told["behind"] == told["at once"]
    assert told["behind"].startswith("secateur: error: the disk is full; ")


def test_what_is_refused_on_the_way_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from secateur.errors import UserError

    slowed(monkeypatch)
    monkeypatch.setattr(Journal, "finish", lambda self, step: (_ for _ in ()).throw(UserError("no further")))
    assert main(line(world, tmp_path / "out", "wanda")) == 2  # while a file is being written
    assert capsys.readouterr().err.endswith("secateur: error: no further\n")
    assert list(tmp_path.iterdir()) == []


def prune_until(line: list[str], last: int | None) -> int:
    """Fork a run that kills itself at point ``last`` of its thread, or never; return what ``waitpid`` does."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    passed = 0

    def point() -> None:
        nonlocal passed
        if passed == last:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def watched(write: Any) -> Any:
        def watched_write(*arguments: Any) -> None:
            time.sleep(0.01)  # the computation gets as far ahead as it may
            point()
            write(*arguments)
            point()

        return watched_write

    journals.is_worthwhile = lambda device: True
    journals.write_tensors, journals.write_text = watched(journals.write_tensors), watched(journals.write_text)
    os._exit(main(line))


def kill_and_resume(jobs: list[tuple[list[str], int]]) -> int:
    """Run each job until it kills itself at its point, and then to its end."""
    for line, last in jobs:
        status = prune_until(line, last)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (line, last, status)
        more = ["--resume"] if list(Path(line[2] + ".partial").glob("work/*/finished")) else []
        assert prune_until([*line, *more], None) == 0, (line, last)
    return 0


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(world: Path, tmp_path: Path) -> None:
    """Each block has four points: before and after its file is written, before and after it is noted as finished."""
    cases = [("wanda", "disk", range(1, 20, 5)), ("minitron-width", "disk", range(2, 20, 7)),
             ("sparsegpt", "ram", range(4, 14, 5)), ("shortgpt", "disk", range(3, 20, 9))]  # fmt: skip
    jobs, wanted = [], {}
    for method, states, points in cases:
        assert main(line(world, tmp_path / method, method)) == 0
        for point in points:
            out = tmp_path / f"{method}-{point}"
            wanted[out] = files(tmp_path / method)
            jobs.append((line(world, out, method, "--states", states), point))
    process = Processes(tmp_path, kill_and_resume, jobs)
    assert process.join() == [0], process.errors[-2000:]
    for out, content in wanted.items():
        assert files(out) == content, out


@pytest.mark.parametrize("method", ["shortgpt", "wanda"])
@pytest.mark.parametrize("stops", [(1, "ram", 2), (2, "ram", 4), (2, "disk", 4), (1, "ram", 3)])
def test_states_of_an_earlier_run_are_not_taken_for_later_ones(
    stops: tuple[int, str, int], method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with states on disk is killed, so is one with states elsewhere, and the third has them on disk again."""
    assert main(line(world, tmp_path / "whole", method)) == 0
    real = Journal.finish
    for step, states in ((stops[0], "disk"), (stops[2], stops[1])):

        def killed(self: Journal, finished: int, last: int = step) -> None:
            real(self, finished)
            if finished + 1 == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "finish", killed)
            resume = ["--resume"] if (tmp_path / "out.partial").exists() else []
            assert main(line(world, tmp_path / "out", method, "--states", states, *resume)) == 130
    assert main(line(world, tmp_path / "out", method, "--states", "disk", "--resume")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_rerun_that_is_killed_leaves_no_states_to_go_on_with(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks run again where their states were in memory; what leaves them is not what a run goes on with."""
    assert main(line(world, tmp_path / "whole", "wanda")) == 0
    real, blocks = Journal.finish, BlockWalk.blocks

    def killed(self: Journal, step: int) -> None:
        real(self, step)
        if step == 3:
            raise KeyboardInterrupt

    def killed_again(self: BlockWalk, **options: Any) -> Any:
        for block in blocks(self, **options):
            yield block
            if block.index == 2:
                raise KeyboardInterrupt

    for owner, name, patched, more in (
        (Journal, "finish", killed, ["ram"]),
        (BlockWalk, "blocks", killed_again, ["disk", "--resume"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, patched)
            assert main(line(world, tmp_path / "out", "wanda", "--states", *more)) == 130
    assert main(line(world, tmp_path / "out", "wanda", "--states", "disk", "--resume")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_where_states_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(states: float, device: str, free: float, host: int | None = 10**11) -> str:
        monkeypatch.setattr(job, "free_device_memory", lambda _: int(free))
        monkeypatch.setattr(job, "free_memory", lambda: host)
        needs = MemoryEstimate(block=10**9, coming=10**9, leaving=10**9, states=int(states), journal=1, output=1)
        return job._place_states(needs, device)

    assert [place(s, "cuda", 80e9) for s in (2.1e9, 5e9, 5.1e9)] == ["device", "device", "ram"]
    assert [place(s, "cuda:1", 12e9) for s in (3e9, 3.1e9)] == ["device", "ram"]
    assert place(2e9, "cpu", 80e9) == place(2e9, "cpu", 80e9, host=None) == "ram"
    assert place(6e9, "cuda", 80e9, host=8 * 10**9) == place(6e9, "cpu", 0, host=8 * 10**9) == "disk"
    states = torch.randn(1, 2, 3)
    assert Workspace(tmp_path, "device").store("x").save(states, "name") is states
    assert StateStore(on_device=True).load("name", states.shape, states.dtype) is None


def test_states_on_the_device_want_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(line(world, tmp_path / "out", "wanda", "--states", "device", "--device", "cpu")) == 2
    assert capsys.readouterr().err.startswith("secateur: error: --states: device: blocks are computed on the CPU here")
