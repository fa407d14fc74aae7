"""Claims: one holder at a time, the dead are noticed, and who has lost a claim cannot publish."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from secateur.study.runner.lease import Lease, LeaseLost, Leases
from secateur.study.stage import Stage
from secateur.study.store import Store

KEY = "stage"


def claims(folder: Path, machine: str = "here") -> Leases:
    return Leases(folder, beat=0.05, stale=0.5, machine=machine)


def take(found: Leases) -> Lease | None:
    look = found.state(KEY)
    return found.acquire(KEY, look.number) if look.free else None


def held(found: Lease | None) -> Lease:
    assert found is not None
    return found


def test_of_many_that_see_it_free_one_gets_it(tmp_path: Path) -> None:
    """Threads stand for processes: what decides is a hard link, and not what they share."""
    for number in range(0, 20, 2):
        got: list[Lease | None] = []
        together = threading.Barrier(8)

        def reach(after: int, together: threading.Barrier = together, got: list[Lease | None] = got) -> None:
            together.wait()
            got.append(claims(tmp_path).acquire(KEY, after))

        threads = [threading.Thread(target=reach, args=(number,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (won,) = [claim for claim in got if claim]
        assert won.number == number + 1
        won.release()
    assert sorted(path.suffix for path in (tmp_path / KEY).iterdir()) == [".json"], "what is over is tidied away"


def test_a_holder_that_beats_keeps_it_and_one_that_is_silent_loses_it(tmp_path: Path) -> None:
    """Seen from another machine, which knows nothing but the heartbeat."""
    mine, other = claims(tmp_path, "here"), claims(tmp_path, "there")
    lost = threading.Event()
    claim = held(mine.acquire(KEY, 0, lost.set))
    over = time.monotonic() + 1.5
    while time.monotonic() < over:
        assert not other.state(KEY).free
        time.sleep(0.02)
    claim.leases = Leases(tmp_path, beat=60.0, stale=0.5, machine="here")  # as a process that was stopped
    silent = claims(tmp_path, "there")
    assert not silent.state(KEY).free, "one look tells nothing of a heartbeat"
    started = time.monotonic()
    while not silent.state(KEY).free:
        time.sleep(0.02)
    assert time.monotonic() - started > 0.4
    second = held(silent.acquire(KEY, silent.state(KEY).number))
    assert not claim.valid and second.valid
    with pytest.raises(LeaseLost, match="taken this stage over"):
        claim.check()
    second.release()


def test_a_holder_notices_that_it_was_taken_over(tmp_path: Path) -> None:
    lost = threading.Event()
    claim = held(claims(tmp_path).acquire(KEY, 0, lost.set))
    second = held(claims(tmp_path, "there").acquire(KEY, claim.number))
    assert lost.wait(5)
    claim.release()
    assert second.valid, "a claim that was lost is not given back"
    second.release()
    assert claims(tmp_path).state(KEY).free


HOLD = """
import sys, time
from pathlib import Path
from secateur.study.runner.lease import Leases
assert Leases(Path(sys.argv[1])).acquire(sys.argv[2], 0)
print("held", flush=True)
time.sleep(60)
"""


def test_death_on_this_machine_is_noticed_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        here = Leases(tmp_path)
        assert not here.state(KEY).free
        holder.kill()
        holder.wait()
        assert here.state(KEY).free
        assert not Leases(tmp_path, machine="there").state(KEY).free, "another machine cannot know yet"


def test_waiting_ends_when_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    first = held(take(claims(tmp_path)))
    told: list[str] = []
    assert claims(tmp_path).wait(KEY, lambda: told.append("waits"), cancelled=lambda: len(told) > 0) is None
    threading.Timer(0.2, first.release).start()
    second = claims(tmp_path).wait(KEY, lambda: told.append("waits again"))
    assert told == ["waits", "waits again"] and held(second).number == first.number + 2
    held(second).release()


@pytest.mark.parametrize("checks", [0, 1, 2])
def test_who_has_lost_a_claim_cannot_publish(checks: int, tmp_path: Path) -> None:
    """Whenever it is taken over, the last moment after it has looked at its claim included."""
    store, stage = Store(tmp_path), Stage("evaluate", "x", {"a": 1})
    first = held(store.leases.acquire("x", 0))
    store.begin(stage, first)
    work, check, others = store.work_folder(stage, first.number), first.check, []
    (work / "checkpoint").write_text("half")

    def take_over() -> None:  # as if the first one had been silent
        others.append(held(store.leases.acquire("x", first.number)))
        store.begin(stage, others[0])

    def checked() -> None:
        nonlocal checks
        check()
        checks -= 1
        if checks == 0:
            take_over()

    if checks == 0:
        take_over()
    first.check = checked  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        store.finish(stage, work, first, {"loss": 0.0}, {})
    assert not store.done(stage)
    (second,) = others
    mine = store.work_folder(stage, second.number)
    assert (mine / "checkpoint").read_text() == "half", "it goes on with what was there"
    store.finish(stage, mine, second, {"loss": 1.0}, {"seconds": 1.0})
    first.check = lambda: None  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):  # what is there is not replaced
        store.finish(stage, work, first, {"loss": 2.0}, {})
    assert store.record(stage) == {"loss": 1.0} and store.damage(stage) is None
    for claim in (first, second):
        claim.release()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "a" / "data").write_bytes(b"0123456788"), "a/data is damaged"),
        (lambda folder: (folder / "a" / "data").write_bytes(b"012345678"), "a/data is damaged"),
        (lambda folder: (folder / "a" / "data").unlink(), "a/data is missing"),
        (lambda folder: (folder / "record.json").write_text("{}\n"), "record.json is damaged"),
        (lambda folder: (folder / "files.json").write_text("[1"), "files.json is missing or damaged"),
        (lambda folder: (folder / "files.json").unlink(), "files.json is missing or damaged"),
        (lambda folder: (folder / "runtime.json").write_text("[1"), None),  # nothing rests on it
    ],
)
def test_damage_to_a_finished_stage_is_noticed(damage: object, told: str | None, tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Stage("evaluate", "x", {"a": 1})
    with held(store.leases.acquire("x", 0)) as claim:
        store.begin(stage, claim)
        work = store.work_folder(stage, claim.number)
        (work / "a").mkdir()
        (work / "a" / "data").write_bytes(b"0123456789")
        (work / "a" / ".data.half").write_bytes(b"0")
        store.finish(stage, work, claim, {}, {"seconds": 1.0})
    assert store.damage(stage) is None and not list(tmp_path.rglob(".data*"))
    damage(store.folder(stage))  # type: ignore[operator]
    assert store.damage(stage) == told
    if told is None:
        assert store.runtime(stage) == {}
