"""The folders of stages, identified by fingerprint.

``<out>/stages/<folder>`` is a finished stage. Its ``record.json`` holds the stage's identity and result, and no time,
host or path: an interrupted study has the same records as an uninterrupted one. ``files.json`` holds the hashes of all
files but ``runtime.json``, which holds time, host and environment. ``<folder>.partial-<number>`` is an unfinished
stage, which resumes from its checkpoints. The number is that of the lease under which a process runs it: a process
that has lost its lease finds the folder gone. ``<out>/scores/<folder>`` holds scores that pruning stages share if they
differ in the ratio alone.
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

PROGRESS = "progress.json"  #: progress of an unfinished stage
_RECORD, _RUNTIME, _FILES = "record.json", "runtime.json", "files.json"


@dataclass(frozen=True)
class StageOutcome:
    """How an attempt at a stage ended.

    Attributes:
        state: ``stopped``: by a signal, and the same command resumes it; ``elsewhere``: another process is running it.
        text: one line.
    """

    state: Literal["done", "failed", "stopped", "elsewhere"]
    text: str = ""


class Store:
    """The stages in a study's folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.stages = out / "stages"
        self.leases = Leases(out / "claims")

    def folder(self, stage: Stage) -> Path:
        """The folder of the finished stage, whether or not it exists."""
        folder = self.stages / stage.folder
        if folder.is_dir():
            return folder
        return next(self.stages.glob(f"{stage.kind}-*-{key_of(stage)}"), folder)

    def partial(self, stage: Stage) -> Path | None:
        """The folder of the unfinished stage; None if it has not begun."""
        return max(self._partials(stage), key=_number, default=None)

    def _partials(self, stage: Stage) -> list[Path]:
        paths = self.stages.glob(f"{stage.kind}-*-{key_of(stage)}.partial-*")
        return [path for path in paths if path.is_dir()]

    def log(self, stage: Stage) -> Path:
        """The log of all attempts at the stage."""
        return self.out / "logs" / f"{stage.folder}.log"

    def done(self, stage: Stage) -> bool:
        """Whether the stage is finished."""
        return (self.folder(stage) / _RECORD).is_file()

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """The result of a stage; None if it is not finished."""
        return read_json(self.folder(stage) / _RECORD)["result"] if self.done(stage) else None

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """Folder -> kind, version, fingerprint, identity and inputs of every finished stage of a kind, of any study."""
        records = {}
        for path in sorted(self.stages.glob(f"{kind}-*/{_RECORD}")):
            with contextlib.suppress(UserError, LookupError, TypeError):
                records[path.parent.name] = read_json(path)["stage"]
        return records

    def runtime(self, stage: Stage) -> dict[str, Any]:
        """How the stage ran: seconds, attempts, environment, or its error; empty if it has not run."""
        return self._read(stage, _RUNTIME)

    def finish_time(self, stage: Stage) -> float:
        """When a finished stage was published, in seconds since the epoch; 0 if it is not finished."""
        try:
            return (self.folder(stage) / _RUNTIME).stat().st_mtime
        except OSError:
            return 0.0

    def progress(self, stage: Stage) -> dict[str, Any]:
        """The last progress that an unfinished stage reported; empty if there is none."""
        return {} if self.done(stage) else self._read(stage, PROGRESS)

    def _read(self, stage: Stage, name: str) -> dict[str, Any]:
        folder = self.folder(stage) if self.done(stage) else self.partial(stage)
        try:
            content = read_json(folder / name) if folder else {}
        except UserError:  # missing or damaged: no result depends on it
            return {}
        return content if isinstance(content, dict) else {}

    def is_running(self, stage: Stage) -> bool:
        """Whether a process is running the stage."""
        return not self.leases.state(key_of(stage)).free

    def damage(self, stage: Stage) -> str | None:
        """Describe the first file of a finished stage that is missing or differs from its hash; None if all agree."""
        folder = self.folder(stage)
        try:
            for name, expected in read_json(folder / _FILES).items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
                    return f"{name} is damaged"
        except (UserError, LookupError, AttributeError, TypeError):
            return f"{_FILES} is missing or damaged"
        except OSError as error:
            return f"{error.filename or folder} cannot be read ({error.strerror})"
        return None

    def work_folder(self, stage: Stage, number: int) -> Path:
        """The partial folder of the process that holds lease ``number``."""
        return self.stages / f"{stage.folder}.partial-{number}"

    def begin(self, stage: Stage, lease: Lease) -> int:
        """Make the stage's partial folder from that of an earlier attempt; return the number of attempts.

        A former holder of the lease that is still running finds its own folder gone.
        """
        work = self.work_folder(stage, lease.number)
        earlier = self.partial(stage)
        if earlier:
            with contextlib.suppress(FileNotFoundError):
                os.rename(earlier, work)
        work.mkdir(parents=True, exist_ok=True)
        for path in self._partials(stage):
            if path != work:
                shutil.rmtree(path, ignore_errors=True)
        lease.check()
        runtime = self.runtime(stage)
        attempts = runtime.get("attempts", 0) + 1 if isinstance(runtime.get("attempts", 0), int) else 1
        write_json(work / _RUNTIME, {"attempts": attempts})
        return attempts

    def note(self, work: Path, **facts: Any) -> None:
        """Add facts to ``runtime.json`` of an unfinished stage, e.g. its error; a full disk is ignored."""
        with contextlib.suppress(OSError, UserError):
            write_json(work / _RUNTIME, {**read_json(work / _RUNTIME), **facts})

    def finish(self, stage: Stage, work: Path, lease: Lease, result: dict[str, Any], runtime: dict[str, Any]) -> None:
        """Write the record and the hashes, then publish the folder atomically.

        Raises:
            LeaseLost: if another process has taken the stage over; nothing is published then.
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
        lease.check()
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
        (work / PROGRESS).unlink(missing_ok=True)
        for path in [path for path in work.rglob(".*") if path.is_file()]:  # half-written when a process was killed
            path.unlink()
        write_json(work / _RECORD, record)
        # Links lead to files outside the study, which may be larger than it.
        paths = (path for path in work.rglob("*") if path.is_file() and not path.is_symlink())
        files = sorted(path for path in paths if path not in (work / _RUNTIME, work / _FILES))
        write_json(
            work / _FILES,
            {
                path.relative_to(work).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in files
            },
        )
        write_json(work / _RUNTIME, runtime)
        sync_tree(work)
        lease.check()
        try:
            os.rename(work, self.stages / stage.folder)
        except OSError as error:  # the folder went with the lease, or the stage exists
            raise LeaseLost(f"another process has taken this stage over ({error.strerror})") from None

    def discard(self, stage: Stage) -> None:
        """Delete a damaged finished stage; the caller must hold its lease."""
        folder = self.folder(stage)
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)  # so that it does not count as finished during the deletion
        shutil.rmtree(aside)

    @contextlib.contextmanager
    def scores(self, stage: Stage, identity: Mapping[str, Any]) -> Iterator[Path]:
        """Lock and yield a folder of scores that several pruning stages may share.

        If the block succeeds, the scores are complete and ``scores.json`` records their identity and hashes. Damaged
        scores are deleted with a warning.

        Args:
            identity: what the scores depend on, besides the version of the stage's kind.
        """
        name = f"{identity['method']}-{fingerprint([VERSIONS[stage.kind], identity])[:12]}"
        folder, seal = self.out / "scores" / name, self.out / "scores" / name / "scores.json"
        if not distributed.is_main():
            distributed.barrier()  # until rank 0 has checked the folder
            yield folder
            distributed.barrier()
            return
        waiting = f"{stage.name}: waits for its scores, which another stage is computing"
        lease = self.leases.wait(f"scores-{name}", lambda: notify(waiting))
        assert lease is not None
        with lease:
            if seal.exists() and not _is_intact(seal):
                notify(f"{stage.name}: the scores in {folder} are damaged and computed again")
                shutil.rmtree(folder)
            distributed.barrier()
            yield folder
            distributed.barrier()  # until no process reads in it
            lease.check()
            if not seal.exists():
                sync_tree(folder)
                files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.glob("*/*"))}
                write_json(seal, {"of": identity, "files": files})


def key_of(stage: Stage) -> str:
    """The name of a stage in its folders and leases: the beginning of its fingerprint."""
    return stage.fingerprint[:12]


def _number(partial: Path) -> int:
    match = re.search(r"\.partial-(\d+)$", partial.name)
    return int(match[1]) if match else -1


def _is_intact(seal: Path) -> bool:
    """Whether every file agrees with its hash in ``seal``."""
    try:
        return all(sha256_file(seal.parent / name) == digest for name, digest in read_json(seal)["files"].items())
    except (UserError, OSError, LookupError, AttributeError, TypeError):
        return False
