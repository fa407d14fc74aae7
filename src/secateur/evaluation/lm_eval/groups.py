"""What the names on a list of tasks stand for: single tasks, groups, tags, and patterns of names.

A group is what lm-evaluation-harness calls by one name and averages; it may change how its tasks are asked. A tag is
several tasks without an average. Both may hold groups and tags in their turn.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateur.config import fingerprint
from secateur.errors import UserError, did_you_mean
from secateur.evaluation.lm_eval.harness import import_harness, index, is_mentioned, is_task, near_tasks
from secateur.evaluation.lm_eval.tasks import METRICS, Task
from secateur.evaluation.results import Measurement, MeasurementKind

__all__ = ["Member", "TaskGroup", "TaskList", "check_groups", "expand", "measure_groups"]


@dataclass(frozen=True)
class Member:
    """A single task of a list."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)  #: of its configuration, by the groups that it is in
    metric: str = ""  #: that its group averages, maybe with the filter of answers; empty where it is in none


@dataclass(frozen=True)
class TaskGroup:
    """A group that has a figure of its own."""

    name: str
    tasks: tuple[str, ...]
    metric: str  #: that is averaged, maybe with the filter of answers
    by_size: bool  #: whether a task counts by its documents, and not once


@dataclass(frozen=True)
class TaskList:
    """Single tasks, each of them once, and the groups among which there is an average."""

    members: tuple[Member, ...] = ()
    groups: tuple[TaskGroup, ...] = ()


def expand(names: Sequence[str], *, where: str) -> TaskList:
    """Look up names, which may be patterns such as ``mmlu_*``.

    Args:
        names: of tasks, groups and tags.
        where: what errors begin with, e.g. ``--suite``.

    Raises:
        UserError: if lm-eval is not installed or knows no such name, or two groups ask one task in different ways.
    """
    members: dict[str, Member] = {}
    groups: dict[str, TaskGroup] = {}
    for name in (found for given in names for found in _matching(given, where)):
        for member in [Member(name)] if _single(name) else _inside(name, {}, groups):
            known = members.setdefault(member.name, member)
            if known.changes != member.changes:
                raise UserError(
                    f"{where} {name}: asks {member.name} in another way than another name there; measure them apart"
                )
            if member.metric and not known.metric:
                members[member.name] = member
    return TaskList(tuple(members.values()), tuple(groups.values()))


def _matching(name: str, where: str) -> list[str]:
    """The names that a name stands for: itself, or, as a pattern, those that it matches."""
    if _single(name):
        return [name]
    pattern = set(name) & set("*?[")
    found = sorted(fnmatch.filter(index(), name)) if pattern or is_mentioned(name) else []
    if not found:
        near = "" if pattern else did_you_mean(name, near_tasks(name) or METRICS)
        raise UserError(f"{where} {name}: lm-eval has no task, group or tag of that name{near}")
    return found


def _single(name: str) -> bool:
    return name in METRICS or is_task(name)  # lm-eval need not be there to plan the usual ones


def _inside(name: str, changes: Mapping[str, Any], groups: dict[str, TaskGroup]) -> Iterator[Member]:
    """The tasks of a group or a tag, as its harness would build them; groups with a figure are added to ``groups``."""
    entry = index()[name]
    if entry.cfg is None:  # a tag
        yield from (Member(task, changes) for task in sorted(entry.tags))
    else:
        yield from _of_group(name, entry.cfg, changes, groups)


def _of_group(
    name: str, config: Mapping[str, Any], changes: Mapping[str, Any], groups: dict[str, TaskGroup]
) -> Iterator[Member]:
    known = import_harness("lm_eval.config.group").GroupConfig
    fields = known.__dataclass_fields__
    group = known(group=name, task=config.get("task"), aggregate_metric_list=_averages(config))
    changes = {**{key: value for key, value in config.items() if key not in fields and key != "tag"}, **changes}
    every = [member for item in group.task or () for member in _of_item(name, item, changes, groups)]
    found = list({member.name: member for member in every}.values())  # of two of one name the harness takes the last
    if group.aggregate_metric_list:
        averaged = group.aggregate_metric_list[0]
        metric = ",".join([str(averaged.metric), *(averaged.filter_list or [])[:1]])
        groups[name] = TaskGroup(name, tuple(m.name for m in found), metric, averaged.weight_by_size)
        found = [Member(m.name, m.changes, m.metric or metric) for m in found]
    yield from found


def _averages(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a group says that it averages. The harness takes the mean whatever function a group names for it."""
    said = config.get("aggregate_metric_list") or []
    every = [{**one, "aggregation": "mean"} for one in ([said] if isinstance(said, dict) else said)]
    return [one for one in every if not str(one["metric"]).startswith(str(_root()))]  # a function names no figure


def _of_item(
    parent: str, item: str | Mapping[str, Any], changes: Mapping[str, Any], groups: dict[str, TaskGroup]
) -> Iterator[Member]:
    """One line of a group's list: a name, a name with changes, or a group or task that is defined there."""
    own = {} if isinstance(item, str) else dict(item)
    if "group" in own and own["group"] not in index():
        yield from _of_group(f"{parent}::{own.pop('group')}", own, changes, groups)
        return
    name = item if isinstance(item, str) else own.pop("group", None) or own.pop("task", None)
    if name is None:
        raise UserError(f"{parent}: lm-eval has it with a task that has no name, which it does not load itself")
    of_groups = ("task_alias", "group_alias", "aggregate_metric_list", "metadata")
    merged = {**changes, **{key: value for key, value in own.items() if key not in of_groups}}
    if place := next((value for value in _texts(merged) if value.startswith(str(_root()))), None):
        raise UserError(
            f"{parent}: computes with {Path(place).name} inside the group, which is not supported; name its tasks"
        )
    if name not in index():  # a task that is defined there
        yield Member(f"{parent}::{name}", merged)
    elif is_task(name):
        yield Member(name, merged)
    else:
        yield from _inside(name, merged, groups)


def _root() -> Path:
    return Path(import_harness("lm_eval").__file__).parent


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def check_groups(groups: Sequence[TaskGroup], tasks: Sequence[Task]) -> None:
    """See that every task of a group reports what the group averages, before anything is computed.

    Raises:
        UserError: if one does not.
    """
    known = {task.name: task.requests.keys for task in tasks}
    for group in groups:
        for name in group.tasks:
            if _key(group, known[name]) is None:
                told = ", ".join(known[name])
                raise UserError(f"{group.name}: averages {group.metric}, and {name} reports {told}; name its tasks")


def _key(group: TaskGroup, reported: Iterable[str]) -> str | None:
    """What a task reports that its group averages."""
    return next((key for key in reported if group.metric in (key, key.partition(",")[0])), None)


def measure_groups(groups: Sequence[TaskGroup], measured: Sequence[Measurement]) -> list[Measurement]:
    """The figure of each group, from those of its tasks: their mean, by their documents where the group says so.

    It has no items of its own: two models are compared on those of its tasks.

    Args:
        groups: those with a figure, which :func:`check_groups` has seen.
        measured: their tasks, and what else was measured.
    """
    by_name = {m.name: m for m in measured}
    found = []
    for group in groups:
        tasks = [by_name[name] for name in group.tasks]
        keys = [_key(group, task.details["metrics"]) for task in tasks]
        sizes = [len(task.items) if group.by_size else 1 for task in tasks]
        values = [task.details["metrics"][key] for task, key in zip(tasks, keys, strict=True)]
        content = {"tasks": [task.protocol["fingerprint"] for task in tasks], "by_size": group.by_size, "keys": keys}
        protocol = {
            "metric": group.metric,
            "lm_eval": tasks[0].protocol["lm_eval"],
            "tasks": list(group.tasks),
            "by_size": group.by_size,
            "documents": sum(len(task.items) for task in tasks),
            "fingerprint": fingerprint(content),
        }
        same = all(
            str(key).removesuffix(",none") == task.protocol["metric"] for key, task in zip(keys, tasks, strict=True)
        )
        kinds: set[MeasurementKind] = {task.kind for task in tasks}
        kind = kinds.pop() if same and len(kinds) == 1 else "score"
        value = float(np.average(values, weights=sizes))
        details = {"compared": same, **({"lower_is_better": True} if tasks[0].lower_is_better else {})}
        found.append(Measurement(group.name, kind, value, protocol, "documents", [], details))
    return found
