"""Names on a list of tasks: single tasks, groups, tags, and patterns of names.

A group of lm-evaluation-harness is averaged, and may change the configuration of its tasks. A tag is a set of tasks
without an average. Both may contain groups and tags.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateur.config import fingerprint
from secateur.errors import UserError
from secateur.evaluation.lm_eval.harness import import_harness, index, is_mentioned, suggest_task, task_folders
from secateur.evaluation.lm_eval.tasks import METRICS, Task
from secateur.evaluation.results import Measurement, MeasurementKind

__all__ = ["Member", "TaskGroup", "TaskList", "check_groups", "expand", "measure_groups"]

#: fields that describe a group, or an entry in it, and do not change its tasks
_GROUP_FIELDS = {"aggregate_metric_list", "group", "group_alias", "metadata", "tag", "task", "task_alias"}


@dataclass(frozen=True)
class Member:
    """A single task of a list."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)  #: changes of its configuration by the groups around it
    metric: str = ""  #: averaged by its group, maybe with the filter of answers; empty outside groups


@dataclass(frozen=True)
class TaskGroup:
    """A group with an average."""

    name: str
    tasks: tuple[str, ...]
    metric: str  #: averaged; maybe with the filter of answers
    by_size: bool  #: whether a task's weight is its number of documents; otherwise all weigh the same


@dataclass(frozen=True)
class TaskList:
    """Single tasks without repetition, and the groups with an average."""

    members: tuple[Member, ...] = ()
    groups: tuple[TaskGroup, ...] = ()


def expand(names: Sequence[str], *, where: str) -> TaskList:
    """Look up names, which may be patterns such as ``mmlu_*``.

    Args:
        where: the field that holds the names, at the beginning of errors, e.g. ``evaluation.suite``.

    Raises:
        UserError: if lm-eval is not installed or has no such name, or two groups configure one task differently.
    """
    members: dict[str, Member] = {}
    groups: dict[str, TaskGroup] = {}
    for name in (match for pattern in names for match in _matches(pattern, where)):
        for member in _members(name, {}, groups):
            first = members.setdefault(member.name, member)
            if first.changes != member.changes:
                raise UserError(
                    f"{where} {name}: configures {member.name} differently from another name in the list; "
                    "evaluate them separately"
                )
            if member.metric and not first.metric:
                members[member.name] = member
    return TaskList(tuple(members.values()), tuple(groups.values()))


def _is_single(name: str) -> bool:
    return name in METRICS or name in task_folders()  # planning the usual tasks does not need lm-eval


def _matches(name: str, where: str) -> list[str]:
    """The names that a pattern matches, or the name itself."""
    if _is_single(name):
        return [name]
    is_pattern = bool(set(name) & set("*?["))
    matches = sorted(fnmatch.filter(index(), name)) if is_pattern or is_mentioned(name) else []
    if not matches:
        suggestion = "" if is_pattern else suggest_task(name)
        raise UserError(f"{where} {name}: lm-eval has no task, group or tag of that name{suggestion}")
    return matches


def _members(name: str, changes: Mapping[str, Any], groups: dict[str, TaskGroup]) -> list[Member]:
    """The tasks of a name, configured as the harness does; groups with an average are added to ``groups``."""
    if _is_single(name):
        return [Member(name, changes)]
    entry = index()[name]
    if entry.cfg is None:  # a tag
        return [Member(task, changes) for task in sorted(entry.tags)]
    return _group_members(name, entry.cfg, changes, groups)


def _group_members(
    name: str, config: Mapping[str, Any], changes: Mapping[str, Any], groups: dict[str, TaskGroup]
) -> list[Member]:
    changes = {**_task_fields(config), **changes}
    entries = config.get("task") or []
    members: dict[str, Member] = {}  # of two with one name the harness takes the last
    for entry in [entries] if isinstance(entries, str) else entries:
        members |= {member.name: member for member in _entry_members(name, entry, changes, groups)}
    average = _average(config)
    if average is None:
        return list(members.values())
    filters = average.get("filter_list") or []
    metric = ",".join([str(average["metric"]), *([filters] if isinstance(filters, str) else filters)[:1]])
    groups[name] = TaskGroup(name, tuple(members), metric, average.get("weight_by_size", True))
    return [Member(member.name, member.changes, member.metric or metric) for member in members.values()]


def _average(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first metric that a group averages; metrics that are functions do not count."""
    metrics = config.get("aggregate_metric_list") or []
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    return next((metric for metric in metrics if not str(metric["metric"]).startswith(_code_folder())), None)


def _entry_members(
    group: str, entry: str | Mapping[str, Any], changes: Mapping[str, Any], groups: dict[str, TaskGroup]
) -> list[Member]:
    """The tasks of one entry in a group's list: a name, a name with changes, or a group defined in place."""
    if isinstance(entry, str):
        return _members(entry, changes, groups)
    if "group" in entry and entry["group"] not in index():
        return _group_members(f"{group}::{entry['group']}", entry, changes, groups)
    name = entry.get("group") or entry.get("task")
    if name is None or name not in index():
        raise UserError(f"{group}: defines a task in place ({name or 'no name'}), which is not supported; leave it out")
    merged = {**changes, **_task_fields(entry)}
    if json.dumps(_code_folder())[1:-1] in json.dumps(merged, default=str):
        raise UserError(f"{group}: computes with code of the group, which is not supported; name its tasks")
    return _members(name, merged, groups)


def _task_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _GROUP_FIELDS}


def _code_folder() -> str:
    """The harness's folder: its index holds functions as paths that begin with it."""
    return str(Path(import_harness("lm_eval").__file__).parent)


def check_groups(groups: Sequence[TaskGroup], tasks: Sequence[Task]) -> None:
    """Check that every task of a group reports the metric that the group averages.

    Raises:
        UserError: if a task does not.
    """
    reported = {task.name: task.requests.keys for task in tasks}
    for group in groups:
        for name in group.tasks:
            if _averaged_key(group, reported[name]) is None:
                keys = ", ".join(reported[name])
                raise UserError(f"{group.name}: averages {group.metric}, and {name} reports {keys}; name its tasks")


def _averaged_key(group: TaskGroup, reported: Iterable[str]) -> str | None:
    """The first of a task's metrics that its group averages."""
    return next((key for key in reported if group.metric in (key, key.partition(",")[0])), None)


def measure_groups(groups: Sequence[TaskGroup], measurements: Sequence[Measurement]) -> list[Measurement]:
    """Average the tasks of each group, weighted by documents where the group says so.

    A group has no items of its own: models are compared on the items of its tasks.

    Args:
        groups: checked by :func:`check_groups`.
        measurements: of the groups' tasks; others are ignored.
    """
    by_name = {measurement.name: measurement for measurement in measurements}
    return [_group_measurement(group, [by_name[name] for name in group.tasks]) for group in groups]


def _group_measurement(group: TaskGroup, tasks: Sequence[Measurement]) -> Measurement:
    keys = [_averaged_key(group, task.details["metrics"]) for task in tasks]
    values = [task.details["metrics"][key] for task, key in zip(tasks, keys, strict=True)]
    sizes = [len(task.items) if group.by_size else 1 for task in tasks]
    content = {"tasks": [task.protocol["fingerprint"] for task in tasks], "by_size": group.by_size, "keys": keys}
    protocol = {
        "metric": group.metric,
        "lm_eval": tasks[0].protocol["lm_eval"],
        "tasks": list(group.tasks),
        "by_size": group.by_size,
        "documents": sum(len(task.items) for task in tasks),
        "fingerprint": fingerprint(content),
    }
    same = all(str(key).removesuffix(",none") == task.protocol["metric"] for key, task in zip(keys, tasks, strict=True))
    kinds: set[MeasurementKind] = {task.kind for task in tasks}
    kind = kinds.pop() if same and len(kinds) == 1 else "score"
    details = {"compared": same, **({"lower_is_better": True} if tasks[0].lower_is_better else {})}
    return Measurement(group.name, kind, float(np.average(values, weights=sizes)), protocol, "documents", [], details)
