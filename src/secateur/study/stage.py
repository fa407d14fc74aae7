"""A stage: one step of a study, identified by its settings and its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from secateur.config import fingerprint

__all__ = ["VERSIONS", "Stage", "StageKind", "critical_paths", "unique", "with_inputs"]

StageKind = Literal["corpus", "fetch", "train", "select", "prune", "reconstruct", "evaluate", "cost", "teach"]

#: Increased when the same identity would give other results.
VERSIONS: dict[StageKind, int] = {
    "corpus": 2,
    "fetch": 1,
    "train": 5,
    "select": 3,
    "prune": 4,
    "reconstruct": 1,
    "evaluate": 4,
    "cost": 1,
    "teach": 1,
}


@dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
        name: shown to users; not part of the identity.
        identity: everything that changes the result, as plain values.
        inputs: role -> the stage whose folder this one reads.
        tokens: that it trains or scores on.
        runtime: how to run it; not part of the identity.
        facts: for the report (method, target, path); derived, not part of the identity.
    """

    kind: StageKind
    name: str
    identity: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    tokens: int = 0
    flops: float = 0.0
    runtime: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the kind, its version, the identity and the inputs' fingerprints."""
        inputs = {role: stage.fingerprint for role, stage in self.inputs.items()}
        return fingerprint([self.kind, VERSIONS[self.kind], self.identity, inputs])

    @property
    def folder(self) -> str:
        """The name of the stage's folder."""
        slug = self.name.translate(str.maketrans("/@~", "---", "{}"))
        return f"{self.kind}-{slug}-{self.fingerprint[:12]}"


def unique(stages: Iterable[Stage]) -> list[Stage]:
    """The first stage of each fingerprint, since cells may share stages."""
    by_fingerprint: dict[str, Stage] = {}
    for stage in stages:
        by_fingerprint.setdefault(stage.fingerprint, stage)
    return list(by_fingerprint.values())


def with_inputs(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and their direct and indirect inputs, each after its inputs."""

    def chain(stage: Stage) -> Iterator[Stage]:
        for used in stage.inputs.values():
            yield from chain(used)
        yield stage

    return unique(link for stage in stages for link in chain(stage))


def critical_paths(stages: Sequence[Stage]) -> dict[str, float]:
    """FLOPs of the longest chain that begins with each stage; the longest should start first.

    Args:
        stages: each after its inputs.
    """
    below: dict[str, float] = {}
    for stage in reversed(stages):
        below[stage.fingerprint] = below.get(stage.fingerprint, 0.0) + stage.flops + 1.0
        for used in stage.inputs.values():
            below[used.fingerprint] = max(below.get(used.fingerprint, 0.0), below[stage.fingerprint])
    return below
