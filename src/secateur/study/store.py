"""Where stages lie: one folder each, whole or unfinished, found again by fingerprint.

``<out>/stages/<folder>`` is a finished stage; ``record.json`` in it holds what was asked and what came out, and no
time, host or path, so that an interrupted study's records are those of an uninterrupted one. ``files.json`` holds the
hashes of all files but ``runtime.json``, which holds the rest. ``<folder>.partial-<number>`` is an unfinished stage,
whose checkpoints are used when it is run again; the number is that of the claim under which it is worked at, so that
whoever has lost that claim finds the folder gone. ``<out>/scores/<folder>`` holds what pruning stages that differ in
the ratio alone share.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur import distributed
from secateur.config import fingerprint
from secateur.errors import UserError
from secateur.files import read_json, sha256_file, sync_tree, write_json
from secateur.progress import notify
from secateur.study.runner.lease import Lease, LeaseLost, Leases
from secateur.study.stage import VERSIONS, Stage

__all__ = ["PROGRESS", "StageOutcome", "Store", "key_of"]

PROGRESS = "progress.json"  #: how far an unfinished stage is
_RECORD, _RUNTIME, _FILES = "record.json", "runtime.json", "files.json"


@dataclass(frozen=True)
class StageOutcome:
    """What became of a stage.

    Attributes:
        how: ``stopped``: told to, and the same command goes on; ``elsewhere``: another process is at it.
        text: one line.
    """

    how: Literal["done", "failed", "stopped", "elsewhere"]
    text: str = ""


class Store:
    """The stages below a study's output directory."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.stages = out / "stages"
        self.claims = Leases(out / "claims")

    def folder(self, stage: Stage) -> Path:
        """Where the finished stage lies, or would."""
        own = self.stages / stage.folder
        if own.is_dir():
            return own
        return next(self.stages.glob(f"{stage.kind}-*-{key_of(stage)}"), own)

    def partial(self, stage: Stage) -> Path | None:
        """Where an unfinished stage keeps what it has; None if it has not begun."""
        return max(self._partials(stage), key=_number, default=None)

    def _partials(self, stage: Stage) -> list[Path]:
        found = self.stages.glob(f"{stage.kind}-*-{key_of(stage)}.partial-*")
        return [path for path in found if path.is_dir()]

    def log(self, stage: Stage) -> Path:
        """What the stage said, in all its attempts."""
        return self.out / "logs" / f"{stage.folder}.log"

    def done(self, stage: Stage) -> bool:
        """Whether the stage is finished."""
        return (self.folder(stage) / _RECORD).is_file()

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """What came out of a finished stage; None if it is not finished."""
        return read_json(self.folder(stage) / _RECORD)["result"] if self.done(stage) else None

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """Folder -> what was asked, of every finished stage of a kind, those of other studies among them."""
        found = {}
        for path in sorted(self.stages.glob(f"{kind}-*/{_RECORD}")):
            with contextlib.suppress(UserError, LookupError, TypeError):
                found[path.parent.name] = read_json(path)["stage"]
        return found

    def runtime(self, stage: Stage) -> dict[str, Any]:
        """How the stage ran: seconds, attempts, environment, or its error; empty if it never did."""
        return self._read(stage, _RUNTIME)

    def progress(self, stage: Stage) -> dict[str, Any]:
        """How far an unfinished stage said last that it was; empty if it said nothing."""
        return {} if self.done(stage) else self._read(stage, PROGRESS)

    def _read(self, stage: Stage, name: str) -> dict[str, Any]:
        folder = self.folder(stage) if self.done(stage) else self.partial(stage)
        try:
            found = read_json(folder / name) if folder else {}
        except UserError:  # absent, or damaged: nothing else rests on it
            return {}
        return found if isinstance(found, dict) else {}

    def held(self, stage: Stage) -> bool:
        """Whether a process is at the stage."""
        return not self.claims.look(key_of(stage)).free

    def damage(self, stage: Stage) -> str | None:
        """The first file of a finished stage that is not as it was written, in words; None if all are."""
        folder = self.folder(stage)
        try:
            known = read_json(folder / _FILES)
            for name, told in known.items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != told["bytes"] or sha256_file(path) != told["sha256"]:
                    return f"{name} is damaged"
        except (UserError, LookupError, AttributeError, TypeError):
            return f"{_FILES} is missing or damaged"
        except OSError as error:
            return f"{error.filename or folder} cannot be read ({error.strerror})"
        return None

    def working(self, stage: Stage, number: int) -> Path:
        """The partial folder of whoever holds claim ``number``."""
        return self.stages / f"{stage.folder}.partial-{number}"

    def begin(self, stage: Stage, claim: Lease) -> int:
        """Make the stage's partial folder, with what an earlier attempt left there; return the number of attempts.

        From here on whoever held the stage before finds the folder that it works in gone.
        """
        work = self.working(stage, claim.number)
        before = self.partial(stage)
        if before:
            with contextlib.suppress(FileNotFoundError):
                os.rename(before, work)
        work.mkdir(parents=True, exist_ok=True)
        for left in self._partials(stage):
            if left != work:
                shutil.rmtree(left, ignore_errors=True)
        claim.check()
        runtime = self.runtime(stage)
        attempts = runtime.get("attempts", 0) + 1 if isinstance(runtime.get("attempts", 0), int) else 1
        write_json(work / _RUNTIME, {"attempts": attempts})
        return attempts

    def note(self, work: Path, **facts: Any) -> None:
        """Add to how an unfinished stage ran, e.g. its error; a disk that is full keeps no one from ending."""
        with contextlib.suppress(OSError, UserError):
            write_json(work / _RUNTIME, {**read_json(work / _RUNTIME), **facts})

    def finish(self, stage: Stage, work: Path, claim: Lease, result: dict[str, Any], runtime: dict[str, Any]) -> None:
        """Write the record and the hashes and let the stage appear, whole.

        Raises:
            ClaimLost: if another process has taken the stage over; nothing appears then.
        """
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
        claim.check()
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
        (work / PROGRESS).unlink(missing_ok=True)
        for begun in [path for path in work.rglob(".*") if path.is_file()]:  # what a kill left half written
            begun.unlink()
        write_json(work / _RECORD, record)
        # What a link stands for is not of the stage, and may be larger than the study.
        every = (path for path in work.rglob("*") if path.is_file() and not path.is_symlink())
        files = sorted(path for path in every if path not in (work / _RUNTIME, work / _FILES))
        write_json(
            work / _FILES,
            {
                path.relative_to(work).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in files
            },
        )
        write_json(work / _RUNTIME, runtime)
        sync_tree(work)
        claim.check()
        try:
            os.rename(work, self.stages / stage.folder)
        except OSError as error:  # gone with the claim, or the stage is there already
            raise LeaseLost(f"another process has taken this stage over ({error.strerror})") from None

    def discard(self, stage: Stage) -> None:
        """Remove a finished stage that is damaged; its claim must be held."""
        folder = self.folder(stage)
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)  # so that it does not count as finished while it goes
        shutil.rmtree(aside)

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
        if not distributed.is_main():
            distributed.barrier()  # until the first process has looked at what is there
            yield folder
            distributed.barrier()
            return
        waiting = f"{stage.name}: waits for its scores, which another stage is computing"
        claim = self.claims.wait(f"scores-{name}", lambda: notify(waiting))
        assert claim is not None
        with claim:
            if seal.exists() and not _intact(seal):
                notify(f"{stage.name}: the scores in {folder} are damaged and computed again")
                shutil.rmtree(folder)
            distributed.barrier()
            yield folder
            distributed.barrier()  # until none reads in it any more
            claim.check()
            if not seal.exists():
                sync_tree(folder)
                files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.glob("*/*"))}
                write_json(seal, {"of": identity, "files": files})


def key_of(stage: Stage) -> str:
    """By what the folders and claims of a stage are known: the beginning of its fingerprint."""
    return stage.fingerprint[:12]


def _number(partial: Path) -> int:
    found = re.search(r"\.partial-(\d+)$", partial.name)
    return int(found[1]) if found else -1


def _intact(seal: Path) -> bool:
    """Whether the files are those that the seal was written for."""
    try:
        return all(sha256_file(seal.parent / name) == known for name, known in read_json(seal)["files"].items())
    except (UserError, OSError, LookupError, AttributeError, TypeError):
        return False
