"""The schedule of a study on a cluster: a simulation of its stages, by their FLOPs."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.config import spec
from secateur.errors import UserError
from secateur.formatting import count, duration, percent, plural
from secateur.runtime import BFLOAT16_PEAKS
from secateur.study.stage import Stage, critical_paths, with_inputs

__all__ = ["ClusterRequest", "ClusterSchedule", "ScheduledStage", "simulate"]

_ASSUMPTIONS = (
    "Assumed: a stage that trains splits over any number of devices up to the sequences of one step, with no loss of "
    "speed; the others use compute.processes. Stages start in the order of their longest chain, on as many devices as "
    "that chain needs to end in time, with free ones shared where that is faster. Evaluation and other work without "
    "FLOPs in the plan, queues and failures take no time."
)

_SLACKS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)  # wall times to aim at, over that of a full cluster


@spec
class ClusterRequest:
    """A cluster to simulate.

    Attributes:
        cluster: number and model of the devices, as in ``64xH100``.
        mfu: share of the bfloat16 peak that training reaches.
        price: of a device-hour, in any currency; None for no cost.
    """

    cluster: str
    mfu: float = 0.4
    price: float | None = None

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)x(.+)", self.cluster)
        models = ", ".join(name for name in BFLOAT16_PEAKS if " " not in name)
        if not match or int(match[1]) < 1 or match[2] not in BFLOAT16_PEAKS:
            raise UserError(
                f"`cluster`: must be a number and a model such as 64xH100, got {self.cluster}; has {models}"
            )
        if not 0 < self.mfu <= 1:
            raise UserError(f"`mfu`: must be above 0 and at most 1, got {self.mfu:g}")
        if self.price is not None and self.price < 0:
            raise UserError(f"`price`: must not be negative, got {self.price:g}")

    @property
    def devices(self) -> int:
        """The number of devices."""
        return int(self.cluster.partition("x")[0])

    @property
    def speed(self) -> float:
        """FLOPs a second of one device in training."""
        return self.mfu * BFLOAT16_PEAKS[self.cluster.partition("x")[2]]


@dataclass(frozen=True)
class ScheduledStage:
    """When a stage runs, in seconds from the start, and on how many devices."""

    stage: Stage
    start: float
    end: float
    devices: int


@dataclass(frozen=True)
class ClusterSchedule:
    """A simulated run; ``str()`` gives the text of ``secateur study plan --cluster``."""

    study: str
    request: ClusterRequest
    stages: tuple[ScheduledStage, ...]  #: in the order of their start

    @property
    def seconds(self) -> float:
        """Wall time."""
        return max((row.end for row in self.stages), default=0.0)

    @property
    def device_seconds(self) -> float:
        """Time of devices that work, summed over devices."""
        return sum((row.end - row.start) * row.devices for row in self.stages)

    @property
    def utilisation(self) -> float:
        """Share of the cluster's time in which devices work."""
        return self.device_seconds / (self.seconds * self.request.devices) if self.seconds else 0.0

    @property
    def critical(self) -> tuple[ScheduledStage, ...]:
        """The longest chain of stages by their times; stages that take no time are left out."""
        chains: dict[str, tuple[float, tuple[ScheduledStage, ...]]] = {}
        for row in self.stages:  # each after its inputs
            inputs = [chains[used.fingerprint] for used in row.stage.inputs.values()]
            seconds, rows = max(inputs, key=lambda chain: chain[0], default=(0.0, ()))
            chains[row.stage.fingerprint] = (seconds + row.end - row.start, (*rows, row))
        _, rows = max(chains.values(), key=lambda chain: chain[0], default=(0.0, ()))
        return tuple(row for row in rows if row.end > row.start)

    def as_dict(self) -> dict[str, Any]:
        """The schedule as plain values, as ``--json`` prints it."""
        hours = self.device_seconds / 3600
        occupied = self.seconds * self.request.devices / 3600
        price = self.request.price
        return {
            "study": self.study,
            **asdict(self.request),
            "flops_per_second": self.request.speed,
            "wall_hours": self.seconds / 3600,
            "critical_path": [row.stage.name for row in self.critical],
            "critical_path_hours": sum(row.end - row.start for row in self.critical) / 3600,
            "utilisation": self.utilisation,
            "device_hours_working": hours,
            "device_hours": occupied,
            "cost": None if price is None else price * occupied,
            "stages": [
                {"kind": r.stage.kind, "name": r.stage.name, "start": r.start, "end": r.end, "devices": r.devices}
                for r in self.stages
            ],
            "assumptions": _ASSUMPTIONS,
        }

    def __str__(self) -> str:
        request, content = self.request, self.as_dict()
        path = sum(row.end - row.start for row in self.critical)
        cost = "" if content["cost"] is None else f", which cost {count(round(content['cost']))}"
        width = max((len(row.stage.name) for row in self.critical), default=0)
        lines = [
            f"{self.study} on {request.cluster} at {percent(request.mfu)} of the bfloat16 peak",
            "",
            f"Wall time {duration(self.seconds)}; devices work {percent(self.utilisation)} of it.",
            f"{count(round(content['device_hours']))} device-hours{cost}; "
            f"{count(round(content['device_hours_working']))} of them working.",
            f"Critical path: {duration(path)} in {plural(len(self.critical), 'stage')}:",
            *(
                f"  {row.stage.name:{width}}  {plural(row.devices, 'device')}, {duration(row.end - row.start)}"
                for row in self.critical
            ),
            "",
            _ASSUMPTIONS,
        ]
        return "\n".join(lines).replace("\u00a0", " ")


def simulate(study: str, stages: Sequence[Stage], request: ClusterRequest) -> ClusterSchedule:
    """Simulate the run of ``stages`` and their inputs: a list schedule by the longest chain of FLOPs.

    Raises:
        UserError: if a stage needs more devices than the cluster has.
    """
    stages = with_inputs(stages)
    for stage in stages:
        if _processes(stage) > request.devices:
            raise UserError(
                f"`cluster`: {stage.name} needs {plural(_processes(stage), 'device')}, the study's compute.processes"
            )
    least = sum(stage.flops for stage in stages) / (request.speed * request.devices)
    schedules = [
        _schedule(study, stages, request, least * slack, share_free=share)
        for slack in _SLACKS
        for share in (False, True)
    ]
    return min(schedules, key=lambda schedule: schedule.seconds)


def _schedule(
    study: str, stages: list[Stage], request: ClusterRequest, goal: float, *, share_free: bool
) -> ClusterSchedule:
    """Schedule the stages, each on as many devices as its longest chain needs to end within ``goal`` seconds.

    Args:
        share_free: give stages that are ready the devices that would stay free, too.
    """
    urgency = critical_paths(stages)
    waiting = sorted(stages, key=lambda stage: -urgency[stage.fingerprint])
    rows: list[ScheduledStage] = []
    running: list[tuple[float, int, ScheduledStage]] = []
    done: set[str] = set()
    now, free = 0.0, request.devices
    while waiting or running:
        ready = [stage for stage in waiting if all(used.fingerprint in done for used in stage.inputs.values())]
        for position, stage in enumerate(ready):
            enough = math.ceil(urgency[stage.fingerprint] / (request.speed * goal)) if goal else 1
            enough = max(enough, free // (len(ready) - position)) if share_free else enough
            devices = min(_most(stage), max(_processes(stage), enough), request.devices)
            if devices > free:
                continue
            row = ScheduledStage(stage, now, now + stage.flops / (request.speed * devices), devices)
            rows.append(row)
            heapq.heappush(running, (row.end, len(rows), row))
            waiting.remove(stage)
            free -= devices
        now, _, row = heapq.heappop(running)
        free += row.devices
        done.add(row.stage.fingerprint)
    return ClusterSchedule(study, request, tuple(rows))


def _processes(stage: Stage) -> int:
    return int(stage.runtime.get("processes", 1))


def _most(stage: Stage) -> int:
    """The devices that a stage can use: for training, one for each sequence of a step."""
    recipe = stage.identity.get("recipe") if stage.kind == "train" else None
    sequences = recipe["tokens_per_step"] // recipe["sequence"] if recipe else 1
    return max(_processes(stage), sequences)
