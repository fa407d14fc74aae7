"""A stage: one step of a study, found again by what it is and what it is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from secateur.config import fingerprint

__all__ = ["VERSIONS", "Stage", "StageKind", "unique", "with_inputs"]

StageKind = Literal["corpus", "fetch", "train", "select", "prune", "evaluate", "cost"]

#: Raised when a stage of the kind would give other results from the same identity.
VERSIONS: dict[StageKind, int] = {
    "corpus": 2,
    "fetch": 1,
    "train": 5,
    "select": 2,
    "prune": 4,
    "evaluate": 4,
    "cost": 1,
}


@dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
        name: for people; not part of the identity.
        identity: everything that changes the result, as plain values.
        inputs: role -> the stage whose folder is read.
        runtime: how to run it; not part of the identity.
        facts: what the report needs to know of the stage (method, target, path); derived, not part of the identity.
    """

    kind: StageKind
    name: str
    identity: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    tokens: int = 0  #: that it trains or scores on
    flops: float = 0.0
    runtime: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the kind, its version, the identity and the inputs' fingerprints."""
        made_from = {role: stage.fingerprint for role, stage in self.inputs.items()}
        return fingerprint([self.kind, VERSIONS[self.kind], self.identity, made_from])

    @property
    def folder(self) -> str:
        """The name of its folder."""
        slug = self.name.translate(str.maketrans("/@~", "---", "{}"))
        return f"{self.kind}-{slug}-{self.fingerprint[:12]}"


def unique(stages: Iterable[Stage]) -> list[Stage]:
    """The stages to run: of equal ones, which different cells may share, the first."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found.setdefault(stage.fingerprint, stage)
    return list(found.values())


def with_inputs(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they are made from, each after its inputs."""

    def found(stage: Stage) -> Iterator[Stage]:
        for used in stage.inputs.values():
            yield from found(used)
        yield stage

    return unique(inner for stage in stages for inner in found(stage))
