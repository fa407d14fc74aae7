"""Serving cost beside loss: the rows of the table, and the points of the Pareto figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.comparison.index import PRUNED, Index, Model
from secateur.comparison.naming import model_name
from secateur.comparison.records import Running
from secateur.comparison.twins import SCRATCH

__all__ = ["AXES", "CostAxis", "ServingCost", "front", "running_rows", "serving_costs"]

CostAxis = Literal["time", "memory"]
AXES: tuple[CostAxis, ...] = ("time", "memory")


_STEADY = 0.2  #: of a median: what its quartiles may be apart on a device that does nothing else


@dataclass(frozen=True)
class ServingCost:
    """Loss and serving cost of one trained model."""

    model: Model | None  #: None: the parent
    run: str  #: "P-R" or the name of a from-scratch run; "parent"
    execution: str  #: "dense", or the kernels that skip zeros
    loss: float  #: held out, nats per token; a mean over seeds
    cost: float  #: ms for each token that is written, or bytes
    low: float
    high: float  #: quartiles of what was repeated


def running_rows(index: Index) -> list[dict[str, Any]]:
    """What each parent and each pruned model costs to run; empty where nothing was measured."""
    single = len(index.parents) == 1
    runs = [("the parent" if single else name, parent.running) for name, parent in index.parents.items()]
    runs += [(model_name(model, list(index.pruned)), pruned.running) for model, pruned in index.pruned.items()]
    return [row for name, running in runs if running for row in _rows(name, running)]


def _rows(name: str, running: Running) -> list[dict[str, Any]]:
    executions = dict.fromkeys(figure["execution"] for figure in running.figures)
    about: dict[str, Any] = {"name": name, "device": running.device, "dtype": running.dtype, "note": running.note}
    about["scatters"] = scatters(running)
    rows = []
    for execution in executions:
        batches = dict.fromkeys(f.get("batch") for f in running.figures if f["execution"] == execution and "batch" in f)
        for batch in batches:
            figures = {
                figure["name"]: figure
                for figure in running.figures
                if figure["execution"] in (execution, "dense") and figure.get("batch") in (batch, None)
            }
            rows.append({**about, "execution": execution, "batch": batch, "figures": figures})
    return rows


def scatters(running: Running) -> bool:
    """Whether a speed differs so much between repeats that something else must have run on the device."""
    speeds = [figure for figure in running.figures if "low" in figure and "high" in figure]
    return any(figure["high"] - figure["low"] > _STEADY * figure["value"] for figure in speeds)


def serving_costs(index: Index, axis: CostAxis) -> tuple[list[ServingCost], str]:
    """Every model with a loss and a cost, and what the cost was measured on.

    A run of a ladder counts at its largest budget, under the language-model loss. Costs of different
    devices share no axis: where there are several, those of the device that has the most are taken.
    """
    every = [p.running for p in (*index.parents.values(), *index.pruned.values()) if p.running]
    if not every:
        return [], ""
    (device, dtype), _ = Counter((running.device, running.dtype) for running in every).most_common(1)[0]
    points: list[ServingCost] = []

    def add(model: Model | None, run: str, running: Running | None, losses: Sequence[float]) -> None:
        if running is None or not losses or (running.device, running.dtype) != (device, dtype):
            return
        for execution in dict.fromkeys(figure["execution"] for figure in running.figures):
            cost = _cost(running, axis, execution)
            if cost:
                points.append(ServingCost(model, run, execution, sum(losses) / len(losses), *cost))

    for name, parent in index.parents.items():
        losses = [p.evaluation.loss for p in index.results.parents if p.name == name and p.evaluation]
        add(None, "parent", parent.running, losses)
    for (model, run), losses in _last(index).items():
        pruned = index.pruned.get(model)
        add(model, run, pruned.running if pruned else None, losses)
    return points, f"{device}, {dtype}"


def _last(index: Index) -> dict[tuple[Model, str], list[float]]:
    """Of each pruned model and run, the losses of all seeds at the largest budget that has one."""
    losses_by_run: dict[tuple[Model, str], list[float]] = {}
    for group in sorted(index.pools, key=lambda group: group.retrain_tokens):
        for run in (PRUNED, *SCRATCH.values()):
            cells = index.over_seeds(group, run)
            losses = [cell.evaluation.loss for cell in cells if cell and cell.evaluation]
            if losses and not group.objective:
                losses_by_run[group.model, run] = losses
    return losses_by_run


def _cost(running: Running, axis: CostAxis, execution: str) -> tuple[float, float, float] | None:
    """A cost with its quartiles: ms a written token, one sequence at a time; or bytes.

    The memory is the peak on a GPU. On a CPU that of the whole process would hide small models behind libraries, so
    that it is that of the weights.
    """
    if axis == "time":
        figure = running.figure("decode", execution)
        return _ms(figure) if figure else None
    name = "weights in memory" if running.device == "cpu" else "peak memory"
    figure = running.figure(name, execution)
    return (figure["value"],) * 3 if figure else None


def _ms(speed: Mapping[str, Any]) -> tuple[float, float, float]:
    each = [1e3 * speed.get("batch", 1) / speed[key] for key in ("value", "high", "low") if key in speed]
    return (each * 3)[0], (each * 3)[1], (each * 3)[2]


def front(points: Sequence[ServingCost]) -> list[ServingCost]:
    """The models that none beats: of lower loss than all that cost as little, cheapest first."""
    best: list[ServingCost] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best
