"""How much of a study is done, by FLOPs, and how long the rest takes at the speed that training has on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from secateur.formatting import plural, scientific
from secateur.study.stage import Stage, unique
from secateur.study.store import Store

__all__ = ["Pace", "StudyProgress", "measure_pace", "study_progress"]

_NEWEST = 8  # finished stages that a speed rests on, since the load of a machine changes


@dataclass(frozen=True)
class Pace:
    """The speed of finished and running stages.

    Attributes:
        speed: FLOPs a second of one process in training; None if no training was measured.
        stages: number of training stages that ``speed`` rests on.
        device: of them: ``cpu`` or ``cuda``; empty if unknown.
        seconds: kind of stage -> mean wall time of finished ones.
    """

    speed: float | None
    stages: int
    device: str
    seconds: Mapping[str, float]

    @property
    def device_name(self) -> str:
        """``CPU`` or ``GPU``; ``device`` if it is unknown."""
        return {"cpu": "CPU", "cuda": "GPU"}.get(self.device, "device")

    def __str__(self) -> str:
        if self.speed is None:
            return "no training has been measured"
        return f"{scientific(self.speed)} FLOPs a second, measured in {plural(self.stages, 'training stage')}"


@dataclass(frozen=True)
class StudyProgress:
    """The progress of a study.

    Attributes:
        done: number of finished stages.
        share: of the FLOPs, running stages included; of the stages in a study without FLOPs.
        seconds_left: None if nothing was measured; 0 if nothing is left.
        rough: whether stages were counted, because no training was measured.
    """

    done: int
    total: int
    share: float
    seconds_left: float | None
    rough: bool

    def __str__(self) -> str:
        note = ", rough ETA: no training measured yet" if self.rough and self.seconds_left else ""
        return f"{self.done} of {plural(self.total, 'stage')} done{note}"


def measure_pace(stages: Sequence[Stage], store: Store, done: Collection[str], since: float = 0.0) -> Pace:
    """Measure the speed of running stages and of the newest finished ones.

    A finished stage that was interrupted has the time of its last attempt alone, and is left out; a running one is
    measured from where it resumed.

    Args:
        done: fingerprints of finished stages.
        since: time from which on finished stages count, unless there are none and no running ones.
    """
    seconds: dict[str, list[tuple[float, float]]] = {}
    trained: list[tuple[float, float, float, str]] = []  # end, FLOPs, process-seconds, device
    for stage in stages:
        runtime = store.runtime(stage) if stage.fingerprint in done else {}
        if "seconds" not in runtime or runtime.get("attempts", 1) != 1:
            continue
        end = store.finish_time(stage)
        seconds.setdefault(stage.kind, []).append((end, runtime["seconds"]))
        if stage.kind == "train" and runtime["seconds"] > 0:
            trained.append((end, stage.flops, runtime["seconds"] * _processes(stage), str(runtime.get("device", ""))))
    running = [rate for stage in stages if stage.fingerprint not in done and (rate := _running(stage, store))]
    recent = [row for row in trained if row[0] >= since]
    rows = sorted(recent if recent or running else trained)[-_NEWEST:] + running
    means = {kind: mean(value for _, value in sorted(values)[-_NEWEST:]) for kind, values in seconds.items()}
    if not rows:
        return Pace(None, 0, "", means)
    speed = sum(flops for _, flops, _, _ in rows) / sum(time for _, _, time, _ in rows)
    devices = [device.partition(":")[0] for *_, device in rows if device not in ("", "auto")]
    return Pace(speed, len(rows), devices[-1] if devices else "", means)


def study_progress(
    stages: Sequence[Stage], store: Store, done: Collection[str], jobs: int = 1, since: float = 0.0
) -> StudyProgress:
    """Sum up the FLOPs that remain and the time that they take.

    The rest takes as long as its longest chain of stages, or as its work divided by ``jobs``, whichever is longer.

    Args:
        stages: each after its inputs.
        done: fingerprints of finished stages.
        jobs: processes at once.
        since: as of :func:`measure_pace`.
    """
    stages = unique(stages)
    flops = {stage.fingerprint: _flops_left(stage, store, done) for stage in stages}
    total, remainder = sum(stage.flops for stage in stages), sum(flops.values())
    finished = sum(stage.fingerprint in done for stage in stages)
    share = 1 - remainder / total if total else finished / max(len(stages), 1)
    pace = measure_pace(stages, store, done, since)
    pending = [stage for stage in stages if stage.fingerprint not in done]
    rough = bool(pending) and pace.speed is None
    if not pending:
        seconds: float | None = 0.0
    elif rough:
        means = list(pace.seconds.values())
        seconds = mean(means) * len(pending) / jobs if means else None
    else:
        seconds = _time_left(pending, flops, pace, jobs)
    return StudyProgress(finished, len(stages), share, seconds, rough)


def _time_left(pending: Sequence[Stage], flops: Mapping[str, float], pace: Pace, jobs: int) -> float:
    assert pace.speed
    work, ends = 0.0, dict[str, float]()
    for stage in pending:
        alone = flops[stage.fingerprint] / pace.speed if stage.flops else pace.seconds.get(stage.kind, 0.0)
        processes = min(_processes(stage), jobs)
        start = max((ends.get(used.fingerprint, 0.0) for used in stage.inputs.values()), default=0.0)
        ends[stage.fingerprint] = start + alone / processes
        work += alone
    return max(work / jobs, *ends.values())


def _flops_left(stage: Stage, store: Store, done: Collection[str]) -> float:
    if stage.fingerprint in done:
        return 0.0
    return stage.flops * (1 - (_training_note(stage, store).get("share") or 0.0))


def _running(stage: Stage, store: Store) -> tuple[float, float, float, str] | None:
    """The FLOPs and the process-seconds that a running training expects to need; None without an estimate."""
    note = _training_note(stage, store)
    if not note.get("seconds_left") or not store.is_running(stage):
        return None
    device = str(stage.runtime.get("device", ""))
    return 0.0, stage.flops * (1 - note["share"]), note["seconds_left"] * _processes(stage), device


def _training_note(stage: Stage, store: Store) -> Mapping[str, Any]:
    """The progress of an unfinished run; empty while it does something else, such as loading its model."""
    note = store.progress(stage) if stage.kind == "train" else {}
    return note if note.get("task") == stage.name else {}


def _processes(stage: Stage) -> int:
    return int(stage.runtime.get("processes", 1))
