"""The sweeps of learning rates in a study's stages: which run is which trial, what each cost, what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from secateur.comparison.records import Cost, Sweep
from secateur.study.stage import Stage

__all__ = ["choice_of", "is_run", "sweep_cost", "sweep_records", "trial_of"]

Records = Mapping[str, dict[str, Any] | None]  #: fingerprint of a stage -> its result; None if it is not finished


def choice_of(stage: Stage) -> Stage | None:
    """The choice of a run's rate: the run itself if it is the best trial; None without a sweep."""
    return stage if stage.kind == "select" else stage.facts.get("choice")


def is_run(choice: Stage) -> bool:
    """Whether the best trial of a choice is a run of the study."""
    return "path" in choice.facts


def trial_of(choice: Stage, records: Records) -> Stage | None:
    """The best trial; None if it is not chosen yet."""
    record = records[choice.fingerprint]
    return choice.facts["trials"][str(record["peak_rate"])] if record else None


def sweep_cost(choice: Stage, records: Records, cost: Callable[[Iterable[Stage]], Cost]) -> Cost:
    """The cost of the trials, without one that is the run: each trial counts once."""
    trials = list(choice.facts["trials"].values())
    if not is_run(choice):
        return cost(trials)
    best = trial_of(choice, records)
    rest = cost(trial for trial in trials if trial is not (best or trials[0]))
    return rest if best else replace(rest, seconds=None)  # all trials have the same tokens and FLOPs


def sweep_records(
    stages: Iterable[Stage], records: Records, cost: Callable[[Iterable[Stage]], Cost]
) -> tuple[Sweep, ...]:
    """One sweep for each run whose rate was chosen by trials; seeds of a run share one.

    Args:
        stages: runs, and parents.
        cost: sums up the cost of stages.
    """
    sweeps: dict[tuple[Any, ...], Sweep] = {}
    for stage in stages:
        choice, facts = choice_of(stage), stage.facts
        if choice is None:
            continue
        record = records[choice.fingerprint] or {}
        trials: Mapping[str, Stage] = choice.facts["trials"]
        sweep = Sweep(
            name=facts.get("name", "parent"),
            parent=facts["parent"],
            **{key: facts.get(key, "") for key in ("method", "target", "objective")},
            retrain_tokens=facts.get("retrain_tokens", 0),
            seed=choice.facts["sweep_seed"],
            tokens=next(iter(trials.values())).tokens,
            whole=is_run(choice),
            rates=tuple(map(float, trials)),
            losses=tuple(record.get("losses", {}).get(rate) for rate in trials),
            rate=record.get("peak_rate"),
            at_edge=record.get("at_edge"),
            cost=sweep_cost(choice, records, cost),
            stage=choice.fingerprint,
        )
        key = (sweep.name, sweep.parent, sweep.method, sweep.target, sweep.objective, sweep.retrain_tokens)
        sweeps.setdefault(key, sweep)
    return tuple(sweeps.values())
