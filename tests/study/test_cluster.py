from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import UserError
from secateur.runtime import BFLOAT16_PEAKS
from secateur.study.cluster import ClusterRequest, simulate
from secateur.study.runner.scheduler import Run
from secateur.study.session import Study
from secateur.study.stage import Stage, unique
from secateur.study.store import StageOutcome, Store


class OneSlot:
    """A launcher whose stages end at once, one after the other."""

    slots = 1

    def __init__(self) -> None:
        self.order: list[Stage] = []
        self.running: list[Stage] = []

    def room(self, stage: Stage) -> bool:
        return not self.running

    def start(self, stage: Stage, after: int) -> None:
        self.order.append(stage)
        self.running.append(stage)

    def wait(self, seconds: float) -> list[tuple[Stage, StageOutcome]]:
        ended, self.running = self.running, []
        return [(stage, StageOutcome("done")) for stage in ended]

    def stop(self) -> None: ...

    def close(self, *, kill: bool) -> None: ...


@pytest.fixture(scope="module")
def smoke() -> list[Stage]:
    return unique(Study.load("smoke").stages)


def test_one_device_runs_a_study_in_the_order_of_the_scheduler(smoke: list[Stage], tmp_path: Path):
    launcher = OneSlot()
    Run(smoke, Store(tmp_path), keep_going=False).execute(launcher)
    request = ClusterRequest(cluster="1xH100", mfu=0.5)
    schedule = simulate("smoke", smoke, request)
    assert [row.stage.name for row in schedule.stages] == [stage.name for stage in launcher.order]
    flops = sum(stage.flops for stage in smoke)
    assert schedule.seconds == pytest.approx(flops / (0.5 * BFLOAT16_PEAKS["H100"]))
    assert schedule.utilisation == pytest.approx(1.0)


def test_devices_are_never_more_than_the_cluster_has_and_inputs_end_first(smoke: list[Stage]):
    schedule = simulate("smoke", smoke, ClusterRequest(cluster="3xA100"))
    ends = {row.stage.fingerprint: row.end for row in schedule.stages}
    assert len(ends) == len(smoke)
    for row in schedule.stages:
        assert all(ends[used.fingerprint] <= row.start for used in row.stage.inputs.values())
        assert sum(r.devices for r in schedule.stages if r.start <= row.start < r.end) <= 3
    path = schedule.as_dict()["critical_path_hours"] * 3600
    assert 0 < path <= schedule.seconds * (1 + 1e-9)


def chain(*flops: float) -> list[Stage]:
    """A first stage with two stages after it, each on at most four devices."""
    facts = {"recipe": {"tokens_per_step": 64, "sequence": 16}}
    first = Stage("train", "first", {"id": 0, **facts}, flops=flops[0])
    others = [Stage("train", f"next-{i}", {"id": i, **facts}, {"parent": first}, flops=f) for i, f in enumerate(flops)]
    return [first, *others[1:]]


def test_a_stage_takes_more_devices_where_its_chain_needs_them():
    speed = ClusterRequest(cluster="8xH100").speed
    schedule = simulate("chain", chain(4 * speed, 4 * speed, 4 * speed), ClusterRequest(cluster="8xH100", price=3600.0))
    assert {row.devices for row in schedule.stages} == {4}
    assert schedule.seconds == pytest.approx(2.0)
    content = schedule.as_dict()
    assert content["cost"] == pytest.approx(2 * 8) and content["utilisation"] == pytest.approx(12 / 16)
    assert content["critical_path"][0] == "first" and content["critical_path_hours"] * 3600 == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cluster": "H100"}, "number and a model"),
        ({"cluster": "8xPotato"}, "number and a model"),
        ({"cluster": "8xH100", "mfu": 1.5}, "`mfu`: must be above 0"),
        ({"cluster": "8xH100", "price": -1.0}, "`price`"),
    ],
)
def test_impossible_clusters_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        ClusterRequest(**fields)  # type: ignore[arg-type]


def test_a_stage_that_needs_more_devices_is_refused():
    wide = Stage("train", "wide", {}, flops=1.0, runtime={"processes": 8})
    with pytest.raises(UserError, match="wide needs 8 devices"):
        simulate("wide", [wide], ClusterRequest(cluster="4xH100"))
