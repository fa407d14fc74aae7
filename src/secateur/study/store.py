"""Where stages lie: one folder each, whole or unfinished, found again by fingerprint.

``<out>/stages/<folder>`` is a finished stage; ``record.json`` in it holds what was asked and what came out, and no
time, host or path, so that an interrupted study's records are those of an uninterrupted one. ``runtime.json`` beside it
holds the rest. ``<folder>.partial`` is an unfinished stage, whose checkpoints are used when it is run again.
``<out>/scores/<folder>`` holds what pruning stages that differ in the ratio alone share.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import UserError
from secateur.files import is_locked, locked, read_json, sha256_file, sync_tree, write_json
from secateur.progress import say
from secateur.spec import fingerprint
from secateur.study.stages import VERSIONS, Stage

__all__ = ["Store"]


class Store:
    """The stages below a study's output directory."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.stages = out / "stages"

    def folder(self, stage: Stage) -> Path:
        """Where the finished stage lies, or would."""
        existing = next(self.stages.glob(f"{stage.kind}-*-{stage.fingerprint[:12]}"), None)
        return existing or self.stages / stage.folder

    def partial(self, stage: Stage) -> Path:
        """Where an unfinished stage keeps what it has."""
        return self.stages / f"{stage.folder}.partial"

    def done(self, stage: Stage) -> bool:
        """Whether the stage is finished."""
        return (self.folder(stage) / "record.json").is_file()

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """What came out of a finished stage; None if it is not finished."""
        return read_json(self.folder(stage) / "record.json")["result"] if self.done(stage) else None

    def runtime(self, stage: Stage) -> dict[str, Any]:
        """How the stage ran: seconds, attempts, environment; empty if it never did."""
        path = (self.folder(stage) if self.done(stage) else self.partial(stage)) / "runtime.json"
        return read_json(path) if path.is_file() else {}

    def lock(self, stage: Stage) -> Any:
        """Hold the stage against other processes, e.g. one that a killed study left behind."""
        return locked(self._lock(stage))

    def held(self, stage: Stage) -> bool:
        """Whether a process is at the stage."""
        return is_locked(self._lock(stage))

    def _lock(self, stage: Stage) -> Path:
        return self.out / "locks" / stage.fingerprint[:12]

    @contextlib.contextmanager
    def scores(self, stage: Stage, identity: Mapping[str, Any]) -> Iterator[Path]:
        """Hold a folder of scores against other stages that want the same ones; yield it with what is there.

        Once the block succeeds they are complete, and ``scores.json`` tells what they are of and the hashes of their
        files. Scores that are damaged are thrown away, which is said.

        Args:
            stage: which wants them.
            identity: what they depend on, besides the version of its kind.
        """
        name = f"{identity['method']}-{fingerprint([VERSIONS[stage.kind], identity])[:12]}"
        folder, seal = self.out / "scores" / name, self.out / "scores" / name / "scores.json"
        waiting = f"{stage.name}: waits for its scores, which another stage is computing"
        with locked(self.out / "locks" / f"scores-{name}", lambda: say(waiting)):
            if seal.exists() and not _intact(seal):
                say(f"{stage.name}: the scores in {folder} are damaged and computed again")
                shutil.rmtree(folder)
            yield folder
            if not seal.exists():
                sync_tree(folder)
                files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.glob("*/*"))}
                write_json(seal, {"of": identity, "files": files})

    def begin(self, stage: Stage) -> int:
        """Count an attempt at the stage; return how many there have been."""
        attempts = self.runtime(stage).get("attempts", 0) + 1
        write_json(self.partial(stage) / "runtime.json", {"attempts": attempts})
        return attempts

    def fail(self, stage: Stage, message: str) -> None:
        """Record that the stage failed, and why."""
        runtime = self.runtime(stage)
        self.partial(stage).mkdir(parents=True, exist_ok=True)
        write_json(self.partial(stage) / "runtime.json", {**runtime, "error": message})

    def finish(self, stage: Stage, result: dict[str, Any], runtime: dict[str, Any]) -> None:
        """Write the record and let the stage appear, whole."""
        work = self.partial(stage)
        record = {
            "stage": {
                "kind": stage.kind,
                "version": VERSIONS[stage.kind],
                "fingerprint": stage.fingerprint,
                "identity": dict(stage.identity),
                "inputs": {role: used.fingerprint for role, used in stage.inputs.items()},
            },
            "result": result,
        }
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
        for begun in work.glob(".*"):  # files that a kill left half written
            begun.unlink()
        write_json(work / "runtime.json", runtime)
        write_json(work / "record.json", record)
        sync_tree(work)
        os.rename(work, self.stages / stage.folder)


def _intact(seal: Path) -> bool:
    """Whether the files are those that the seal was written for."""
    try:
        return all(sha256_file(seal.parent / name) == known for name, known in read_json(seal)["files"].items())
    except (UserError, OSError, LookupError, AttributeError, TypeError):
        return False
