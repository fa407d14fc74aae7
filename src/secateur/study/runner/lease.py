"""Who is at a stage: claims that hold between the hosts of a shared disk as between the processes of one.

The claims of a stage are numbered files, and the last one counts. Each is made by a hard link, in which exactly one of
several processes succeeds. Its holder changes another file, the heartbeat, every few seconds. Whoever wants the stage
and sees no change for :data:`STALE` seconds of its own clock makes the next number; clocks of hosts are never compared.
On the holder's own machine its death is noticed at once, since the system frees the lock that it has on the heartbeat.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import RunError, UserError

__all__ = ["BEAT", "STALE", "Lease", "LeaseLost", "Leases"]

BEAT = 10.0  #: seconds between heartbeats
STALE = 120.0  #: seconds without one after which a claim may be taken over; disks of clusters show changes late


class LeaseLost(RunError):
    """The claim has been taken over: what its holder has done must not be published."""


@dataclass(frozen=True)
class Look:
    """What an observer found.

    Attributes:
        number: of the last claim; 0 if there was none.
        free: whether the next one may be made: nobody holds it, or its holder is gone.
    """

    number: int
    free: bool


@dataclass
class Leases:
    """The claims below a folder, as one process sees them.

    Attributes:
        folder: where they lie.
        beat: seconds between heartbeats.
        stale: seconds without one after which a claim may be taken over.
        machine: tells this machine from others.
    """

    folder: Path
    beat: float = BEAT
    stale: float = STALE
    machine: str = field(default_factory=lambda: _machine())
    _seen: dict[str, tuple[object, float]] = field(default_factory=dict)  # key -> last heartbeat, and when it changed

    def look(self, key: str) -> Look:
        """Say whether a stage may be claimed. Heartbeats are judged by what this object saw of them before."""
        number, content = self._last(key)
        if not content or content["owner"] is None:
            return Look(number, True)
        path = self._beat_file(key, content["owner"])
        if content["machine"] == self.machine and content["locked"] and _unlocked(path):
            return Look(number, True)
        try:
            seen: object = (number, path.read_bytes())
        except OSError:
            seen = (number, None)
        before, since = self._seen.get(key, (None, 0.0))
        now = time.monotonic()
        if seen != before:
            self._seen[key] = (seen, now)
            return Look(number, False)
        return Look(number, now - since > self.stale)

    def take(self, key: str, after: int, lost: Callable[[], object] = lambda: None) -> Lease | None:
        """Make the claim that follows number ``after``; None if another process was first.

        Args:
            key: of the stage.
            after: the number of the last claim, which was found free.
            lost: is called, in a thread, should the claim be taken over while it is held.

        Raises:
            UserError: if the file system has no hard links.
        """
        folder, owner = self.folder / key, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        beat = self._beat_file(key, owner)
        handle = os.open(beat, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        made = False
        try:
            os.pwrite(handle, _count(0), 0)
            claim = {"owner": owner, "machine": self.machine, "locked": _lock(handle)}
            made = self._make(key, after + 1, claim)
        finally:
            if not made:
                os.close(handle)
                beat.unlink(missing_ok=True)
        if not made:
            return None
        self._tidy(key, after + 1, owner)
        return Lease(self, key, after + 1, handle, lost)

    def wait(self, key: str, waiting: Callable[[], object], over: Callable[[], bool] = lambda: False) -> Lease | None:
        """Take a claim as soon as it is free; None if ``over`` becomes true before.

        Args:
            key: of the stage.
            waiting: is called once, before this process waits for another.
            over: says that there is nothing to wait for any more.
        """
        told = False
        while not over():
            found = self.look(key)
            claim = self.take(key, found.number) if found.free else None
            if claim:
                return claim
            if not told:
                waiting()
                told = True
            time.sleep(min(1.0, self.beat / 4))
        return None

    def _last(self, key: str) -> tuple[int, dict[str, Any]]:
        """The number of the last claim and what it says; empty if there is none."""
        for _ in range(100):
            number = self.last_number(key)
            if not number:
                return 0, {}
            with contextlib.suppress(FileNotFoundError):  # a later one has been made, and this one tidied away
                return number, json.loads(self._file(key, number).read_text(encoding="utf-8"))
        raise UserError(f"{self.folder / key}: cannot be read; remove it if nothing runs")

    def last_number(self, key: str) -> int:
        """The number of the last claim; 0 if there is none."""
        try:
            names = os.listdir(self.folder / key)
        except FileNotFoundError:
            return 0
        return max((int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()), default=0)

    def _make(self, key: str, number: int, content: dict[str, Any]) -> bool:
        """Make claim ``number``, whole; False if it is there."""
        fresh = self.folder / key / f".{uuid.uuid4().hex}"
        try:
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.link(fresh, self._file(key, number))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (1, 95):  # EPERM and EOPNOTSUPP, as file systems without links answer
                raise UserError(
                    f"{self.folder}: its file system has no hard links, by which processes tell who is at a stage; "
                    "give an --out on another"
                ) from None
            raise
        finally:
            fresh.unlink(missing_ok=True)

    def _tidy(self, key: str, number: int, owner: str | None) -> None:
        """Remove earlier claims, and heartbeats of others."""
        for name in os.listdir(self.folder / key):
            stem, _, kind = name.rpartition(".")
            old = kind == "json" and stem.isdigit() and int(stem) < number
            if old or (kind == "beat" and stem != owner):
                (self.folder / key / name).unlink(missing_ok=True)

    def _file(self, key: str, number: int) -> Path:
        return self.folder / key / f"{number:06}.json"

    def _beat_file(self, key: str, owner: str) -> Path:
        return self.folder / key / f"{owner}.beat"


class Lease:
    """A claim that this process holds; a context manager that releases it."""

    def __init__(self, claims: Leases, key: str, number: int, handle: int, lost: Callable[[], object]) -> None:
        self.claims, self.key, self.number = claims, key, number
        self._handle, self._lost = handle, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def valid(self) -> bool:
        """Whether no one has taken it over."""
        return self.claims.last_number(self.key) == self.number

    def check(self) -> None:
        """Go on only while the claim is valid.

        Raises:
            ClaimLost: if it is not.
        """
        if not self.valid:
            raise LeaseLost("another process has taken this stage over, since this one gave no sign of life")

    def release(self) -> None:
        """Let others have it: the next number is a claim of nobody's."""
        self._over.set()
        self._thread.join()
        if self.valid and self.claims._make(self.key, self.number + 1, {"owner": None}):
            self.claims._tidy(self.key, self.number + 1, None)
        os.close(self._handle)

    def _keep(self) -> None:
        """Beat until released; a claim that could not be beaten for half the patience of others counts as lost."""
        count, alive = 0, time.monotonic()
        while not self._over.wait(self.claims.beat):
            try:
                if not self.valid:
                    self._lost()
                    return
                count += 1
                os.pwrite(self._handle, _count(count), 0)
                os.fsync(self._handle)
                alive = time.monotonic()
            except OSError:  # e.g. a server that is away
                if time.monotonic() - alive > self.claims.stale / 2:
                    self._lost()
                    return


def _count(number: int) -> bytes:
    return b"%020d\n" % number  # always as long, so that a full disk has room for it


def _machine() -> str:
    """Something that only this machine says, and only until it is started anew."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def _lock(handle: int) -> bool:
    """Lock a file until this process ends; False where the file system cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _unlocked(path: Path) -> bool:
    """Whether a file that its maker has locked is locked no more."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
