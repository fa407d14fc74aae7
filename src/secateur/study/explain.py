"""Why a stage is not done, and how it differs from the most similar finished stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.study.stage import VERSIONS, Stage
from secateur.study.status import state_of
from secateur.study.store import Store

__all__ = ["Change", "Explanation", "explain_stage"]

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A field of a stage's identity whose value differs.

    Attributes:
        field: with dots for nested ones; prefixed by ``input ROLE (KIND NAME):`` for a field of an input.
        old: None if the field is new.
        new: None if the field is gone.
    """

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} -> {_short(self.new)}"


@dataclass(frozen=True)
class Explanation:
    """The state of a stage, and the reason.

    Attributes:
        state: as in :class:`secateur.study.status.StatusRow`, or ``damaged``.
        reason: one line.
        nearest: folder of the most similar finished stage, among those that the study as it is now does not use.
        changes: how the stage differs from ``nearest``.
        log: what the stage printed; None if it has not run.
    """

    kind: str
    name: str
    fingerprint: str
    state: str
    reason: str
    nearest: str | None = None
    changes: tuple[Change, ...] = ()
    log: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """The explanation as plain values, as ``--json`` prints it."""
        return {key: value for key, value in asdict(self).items() if key != "log"}

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.name}: {self.state}: {self.reason}"]
        if self.nearest:
            lines += [f"  most similar finished stage: {self.nearest}", *(f"    {change}" for change in self.changes)]
        if self.log:
            lines.append(f"  log: {self.log}")
        return "\n".join(lines)


def explain_stage(stage: Stage, stages: list[Stage], store: Store, damage: str | None = None) -> Explanation:
    """Say why a stage will run, or why it need not."""
    state, note = state_of(stage, store)
    nearest, changes = None, ()
    if damage:
        state, reason = "damaged", f"{damage}; it will be run again"
    elif state == "done":
        reason = f"{store.folder(stage).name} is what the study file asks for"
    else:
        nearest, changes = _nearest(stage, {s.fingerprint for s in stages}, store)
        reason = _reason(state, note, changes)
    log = store.log(stage)
    return Explanation(
        stage.kind, stage.name, stage.fingerprint, state, reason, nearest, changes, log if log.is_file() else None
    )


def _reason(state: str, note: str, changes: tuple[Change, ...]) -> str:
    """Why an unfinished stage is not done."""
    if state == "failed":
        return f"it failed: {note}"
    if state == "interrupted":
        return "it was interrupted, and resumes from its last checkpoint"
    if state == "running":
        return "a process is running it"
    if not changes:
        return "no similar stage is finished"
    return "; ".join(map(str, changes[:3])) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _nearest(stage: Stage, current: set[str], store: Store) -> tuple[str | None, tuple[Change, ...]]:
    """The folder of the finished stage of an earlier study file that differs least, and how the stage differs."""
    slug = stage.folder.removesuffix(stage.fingerprint[:12])
    best: tuple[tuple[bool, int, str], tuple[Change, ...]] | None = None
    for folder, record in store.records(stage.kind).items():
        if record["fingerprint"] in current:
            continue
        changes = tuple(_changes(stage, record, store))
        rank = (not folder.startswith(slug), len(changes), folder)
        if best is None or rank < best[0]:
            best = rank, changes
    return (best[0][2], best[1]) if best else (None, ())


def _changes(stage: Stage, record: Mapping[str, Any], store: Store) -> Iterator[Change]:
    """How a stage differs from a finished one, given the latter's record."""
    if record["version"] != VERSIONS[stage.kind]:
        yield Change(f"version of {stage.kind}", record["version"], VERSIONS[stage.kind])
    old, new = dict(_flat(record["identity"])), dict(_flat(_as_json(stage.identity)))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key, _ABSENT) != new.get(key, _ABSENT):
            yield Change(key, old.get(key), new.get(key))
    for role in {**record["inputs"], **stage.inputs}:
        old_fingerprint, new_input = record["inputs"].get(role), stage.inputs.get(role)
        if new_input is None or old_fingerprint != new_input.fingerprint:
            yield from _input_changes(role, old_fingerprint, new_input, store)


def _input_changes(role: str, old_fingerprint: str | None, stage: Stage | None, store: Store) -> Iterator[Change]:
    """How an input differs from the earlier one; only fingerprints if the earlier one has been deleted."""
    name = f"input {role}" + (f" ({stage.kind} {stage.name})" if stage else "")
    records = store.records(stage.kind).values() if stage and old_fingerprint else ()
    record = next((record for record in records if record["fingerprint"] == old_fingerprint), None)
    if record is None or stage is None:
        yield Change(name, old_fingerprint and old_fingerprint[:12], stage and stage.fingerprint[:12])
        return
    for change in _changes(stage, record, store):
        yield Change(f"{name}: {change.field}", change.old, change.new)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of nested mappings, its key with dots."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _as_json(value: Any) -> Any:
    """The value after a round trip through JSON: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
