"""Progress and time left by FLOPs at the measured speed: several jobs, resumed stages, and nothing measured yet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_plan import named, planned, study

from secateur import progress
from secateur.files import write_json
from secateur.study.pace import measure_pace, study_progress
from secateur.study.plan import plan_study
from secateur.study.runner.scheduler import Run
from secateur.study.stage import Stage
from secateur.study.status import study_status
from secateur.study.store import Store

SPEED = 1e6  # FLOPs a second


class Folder:
    """The folder of a study with stages that seem to have run at ``SPEED``."""

    def __init__(self, out: Path, stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
        self.stages, self.store, self.done, self.running = stages, Store(out), set[str](), set[str]()
        monkeypatch.setattr(Store, "is_running", lambda _, stage: stage.fingerprint in self.running)

    def finish(self, stage: Stage, seconds: float | None = None, **runtime: Any) -> None:
        folder = self.store.folder(stage)
        folder.mkdir(parents=True)
        write_json(folder / "record.json", {"result": {}})
        seconds = stage.flops / SPEED if seconds is None else seconds
        write_json(folder / "runtime.json", {"seconds": seconds, "attempts": 1, "device": "cpu", **runtime})
        self.done.add(stage.fingerprint)

    def begin(self, stage: Stage, share: float, seconds_left: float | None) -> None:
        work = self.store.work_folder(stage, 1)
        work.mkdir(parents=True)
        note = {"task": stage.name, "share": share, "note": "", "seconds_left": seconds_left}
        write_json(work / "progress.json", note)
        self.running.add(stage.fingerprint)

    def progress(self, jobs: int = 1, since: float = 0.0) -> Any:
        return study_progress(self.stages, self.store, self.done, jobs, since)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(tmp_path / "out", planned(study(tmp_path, methods=["minitron-depth", "wanda"])), monkeypatch)


def test_time_left_follows_the_flops_and_not_the_number_of_stages(folder: Folder) -> None:
    corpus, parent = named(folder.stages, "corpus", "corpus"), named(folder.stages, "parent")
    folder.finish(corpus, seconds=500.0)  # reads and encodes: says nothing of training
    folder.finish(parent)
    total = sum(stage.flops for stage in folder.stages)
    state = folder.progress()
    assert state.done == 2 and not state.rough
    assert state.share == pytest.approx(parent.flops / total)
    assert state.seconds_left == pytest.approx((total - parent.flops) / SPEED)


def test_jobs_share_the_work_but_no_stage_is_faster_than_its_chain(folder: Folder) -> None:
    parent = named(folder.stages, "parent")
    folder.finish(parent)
    alone, pair, many = (folder.progress(jobs).seconds_left for jobs in (1, 2, 100))
    assert pair == pytest.approx(alone / 2)
    longest = max(stage.flops for stage in folder.stages if stage.kind == "train" and stage is not parent)
    assert many == pytest.approx(longest / SPEED, rel=0.05)  # after its pruning


def test_a_running_stage_counts_by_its_share_and_by_the_speed_since_it_resumed(folder: Folder) -> None:
    parent = named(folder.stages, "parent")
    folder.begin(parent, share=0.75, seconds_left=0.25 * parent.flops / SPEED)
    state = folder.progress()
    total = sum(stage.flops for stage in folder.stages)
    assert state.share == pytest.approx(0.75 * parent.flops / total) and not state.rough
    assert state.seconds_left == pytest.approx((total - 0.75 * parent.flops) / SPEED)


def test_the_last_attempt_of_an_interrupted_stage_is_no_measure_of_speed(folder: Folder) -> None:
    folder.finish(named(folder.stages, "parent"), seconds=1e-3, attempts=2)
    assert measure_pace(folder.stages, folder.store, folder.done).speed is None


def test_the_speed_is_that_of_this_run_where_there_is_one(folder: Folder) -> None:
    parent, run = named(folder.stages, "parent"), named(folder.stages, "wanda-0.5/P-R")
    folder.finish(parent, seconds=10 * parent.flops / SPEED)
    os.utime(folder.store.folder(parent) / "runtime.json", (1000, 1000))
    slow = measure_pace(folder.stages, folder.store, folder.done, since=2000)
    assert slow.speed == pytest.approx(SPEED / 10)  # nothing newer
    folder.finish(run)
    assert measure_pace(folder.stages, folder.store, folder.done, since=2000).speed == pytest.approx(SPEED)


def test_without_a_measured_training_stages_are_counted_and_called_rough(folder: Folder) -> None:
    assert folder.progress().seconds_left is None and folder.progress().rough
    folder.finish(named(folder.stages, "corpus", "corpus"), seconds=4.0)
    state = folder.progress(jobs=2)
    assert state.rough and state.seconds_left == pytest.approx(4.0 * (len(folder.stages) - 1) / 2)
    assert "rough" in str(state)


def test_nothing_is_left_of_a_finished_study(folder: Folder) -> None:
    for stage in folder.stages:
        folder.finish(stage)
    assert (folder.progress().share, folder.progress().seconds_left) == (1.0, 0.0)


def test_status_and_plan_give_the_measured_time(folder: Folder) -> None:
    parent = named(folder.stages, "parent")
    folder.finish(named(folder.stages, "corpus", "corpus"))
    folder.finish(parent)
    run = named(folder.stages, "wanda-0.5/P-R")
    folder.begin(run, 0.5, 0.5 * run.flops / SPEED)
    status = study_status("micro", folder.stages, folder.store)
    assert f"; {status.progress.share:.0%} of the FLOPs, ETA " in status.title and "1 running" in status.title
    assert status.as_dict()["seconds_left"] == pytest.approx(folder.progress().seconds_left)
    pace = measure_pace(folder.stages, folder.store, folder.done)
    text = str(plan_study("micro", folder.stages, pace=pace))
    assert "On the CPU: about" in text and "measured in 2 training stages" in text


def test_the_run_shows_share_and_time_left(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.finish(named(folder.stages, "corpus", "corpus"))
    folder.finish(named(folder.stages, "parent"))
    monkeypatch.setattr(Store, "damage", lambda *_: None)
    lines: list[str] = []
    listener = progress.LineListener(interval=0.0, write=lines.append)
    monkeypatch.setattr(progress, "_listener", listener)
    run = Run(folder.stages, folder.store, keep_going=False)
    with progress.track("whole study", 1.0) as task:
        run.report_progress(task, 2)
    left = folder.progress(2)
    assert lines[-1] == (
        f"whole study: {100 * left.share:.0f}%  2 of {len(folder.stages)} stages done  "
        f"ETA {progress.clock_time(left.seconds_left)}"
    )
