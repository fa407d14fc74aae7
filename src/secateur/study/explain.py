"""Why a stage is not done: what sets it apart from the nearest one that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.study.stage import VERSIONS, Stage
from secateur.study.status import state_of
from secateur.study.store import Store

__all__ = ["Change", "Explanation", "explain_stage"]

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A field that is not what it was.

    Attributes:
        field: with dots where it lies deeper; behind ``input ROLE (KIND NAME):`` where it is an input's.
        old: None where there was none.
        new: None where there is none.
    """

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} -> {_short(self.new)}"


@dataclass(frozen=True)
class Explanation:
    """Where a stage stands, and why.

    Attributes:
        state: as ``study status`` says it.
        reason: one line.
        nearest: folder of the finished stage that is most like it, and belongs to no stage of the study as it is now.
        changes: what sets the two apart.
    """

    state: str
    reason: str
    nearest: str | None = None
    changes: tuple[Change, ...] = ()


def explain_stage(stage: Stage, stages: list[Stage], store: Store, damage: str | None = None) -> Explanation:
    """Say why a stage will run, or why it need not.

    Args:
        stage: in question.
        stages: all of the study.
        store: where they lie.
        damage: what is wrong with its files, if something is.
    """
    state, note = state_of(stage, store)
    if damage:
        return Explanation("damaged", f"{damage}; it will be done again")
    if state == "done":
        return Explanation(state, f"{store.folder(stage).name} is what the study file asks for")
    nearest, changes = _nearest(stage, {s.fingerprint for s in stages}, store)
    told = {
        "failed": f"it failed: {note}",
        "interrupted": "it was interrupted, and goes on from what it has",
        "running": "a process is at it",
    }.get(state)
    if told is None and changes:
        told = "; ".join(map(str, changes[:3])) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    return Explanation(state, told or "nothing like it has been done yet", nearest, changes)


def _nearest(stage: Stage, current: set[str], store: Store) -> tuple[str | None, tuple[Change, ...]]:
    """The finished stage of an earlier study file that differs least, and how it differs."""
    slug = stage.folder.removesuffix(stage.fingerprint[:12])
    best: tuple[tuple[bool, int, str], tuple[Change, ...]] | None = None
    for folder, told in store.records(stage.kind).items():
        if told["fingerprint"] in current:
            continue
        changes = tuple(_changes(stage, told, store))
        rank = (not folder.startswith(slug), len(changes), folder)
        if best is None or rank < best[0]:
            best = rank, changes
    return (best[0][2], best[1]) if best else (None, ())


def _changes(stage: Stage, told: Mapping[str, Any], store: Store) -> Iterator[Change]:
    """What differs between a finished stage, as its record tells of it, and one that is asked for."""
    if told["version"] != VERSIONS[stage.kind]:
        yield Change(f"version of {stage.kind}", told["version"], VERSIONS[stage.kind])
    old, new = dict(_flat(told["identity"])), dict(_flat(_plain(stage.identity)))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key, _ABSENT) != new.get(key, _ABSENT):
            yield Change(key, old.get(key), new.get(key))
    for role in {**told["inputs"], **stage.inputs}:
        before, used = told["inputs"].get(role), stage.inputs.get(role)
        if used is None or before != used.fingerprint:
            yield from _input_changes(role, before, used, store)


def _input_changes(role: str, before: str | None, used: Stage | None, store: Store) -> Iterator[Change]:
    """Why an input is another one, as far as the earlier one is still there to compare with."""
    name = f"input {role}" + (f" ({used.kind} {used.name})" if used else "")
    found = store.records(used.kind).values() if used and before else ()
    record = next((told for told in found if told["fingerprint"] == before), None)
    if record is None or used is None:
        yield Change(name, before and before[:12], used and used.fingerprint[:12])
        return
    for change in _changes(used, record, store):
        yield Change(f"{name}: {change.field}", change.old, change.new)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
