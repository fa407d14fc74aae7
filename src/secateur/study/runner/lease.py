"""Leases: at most one process runs a stage, among all hosts that share the disk.

The leases of a stage are numbered files, and the highest number is valid. Each file is made by a hard link, in which
exactly one of several processes succeeds. The holder rewrites a heartbeat file every few seconds. A process that sees
no change of it for :data:`STALE` seconds of its own clock may make the next number; the clocks of hosts are never
compared. On the holder's own machine its death is detected at once: the system then frees its lock on the heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
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

__all__ = ["BEAT", "STALE", "Lease", "LeaseLost", "LeaseState", "Leases"]

BEAT = 10.0  #: seconds between heartbeats
STALE = 120.0  #: seconds without a heartbeat until a lease may be taken over; cluster disks show changes late


class LeaseLost(RunError):
    """Another process has taken the lease over: the results of the former holder must not be published."""


@dataclass(frozen=True)
class LeaseState:
    """The last lease of a stage.

    Attributes:
        number: of the last lease; 0 if there is none.
        free: whether the next lease may be acquired: the last one was released, or its holder is dead.
    """

    number: int
    free: bool


@dataclass
class Leases:
    """The leases in a folder, as one process sees them.

    Attributes:
        folder: one subfolder for each stage.
        beat: seconds between heartbeats.
        stale: seconds without a heartbeat until a lease may be taken over.
        machine: identifies this machine.
    """

    folder: Path
    beat: float = BEAT
    stale: float = STALE
    machine: str = field(default_factory=lambda: _machine())
    _heartbeats: dict[str, tuple[object, float]] = field(default_factory=dict)  # key -> last heartbeat, time of change

    def state(self, key: str) -> LeaseState:
        """Read the last lease. Only repeated calls on the same object detect a heartbeat that has stopped."""
        number, content = self._last(key)
        if not content or content["owner"] is None:
            return LeaseState(number, True)
        path = self._beat_file(key, content["owner"])
        if content["machine"] == self.machine and content["locked"] and _is_unlocked(path):
            return LeaseState(number, True)
        try:
            heartbeat: object = (number, path.read_bytes())
        except OSError:
            heartbeat = (number, None)
        previous, since = self._heartbeats.get(key, (None, 0.0))
        time_now = time.monotonic()
        if heartbeat != previous:
            self._heartbeats[key] = (heartbeat, time_now)
            return LeaseState(number, False)
        return LeaseState(number, time_now - since > self.stale)

    def acquire(self, key: str, after: int, on_loss: Callable[[], object] = lambda: None) -> Lease | None:
        """Make the lease that follows number ``after``; None if another process was first.

        Args:
            after: the number of the last lease, whose state was free.
            on_loss: called in a thread if another process takes the lease over.

        Raises:
            UserError: if the file system has no hard links.
        """
        folder, owner = self.folder / key, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        beat = self._beat_file(key, owner)
        handle = os.open(beat, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        success = False
        try:
            os.pwrite(handle, _count(0), 0)
            content = {"owner": owner, "machine": self.machine, "locked": _lock(handle)}
            success = self._make(key, after + 1, content)
        finally:
            if not success:
                os.close(handle)
                beat.unlink(missing_ok=True)
        if not success:
            return None
        self._remove_old(key, after + 1, owner)
        return Lease(self, key, after + 1, handle, on_loss)

    def wait(
        self, key: str, on_wait: Callable[[], object], cancelled: Callable[[], bool] = lambda: False
    ) -> Lease | None:
        """Acquire a lease as soon as it is free; None if ``cancelled()`` becomes true first.

        Args:
            on_wait: called once if another process holds the lease.
        """
        waiting = False
        while not cancelled():
            state = self.state(key)
            lease = self.acquire(key, state.number) if state.free else None
            if lease:
                return lease
            if not waiting:
                on_wait()
                waiting = True
            time.sleep(min(1.0, self.beat / 4))
        return None

    def _last(self, key: str) -> tuple[int, dict[str, Any]]:
        """The number and content of the last lease; 0 and empty if there is none."""
        for _ in range(100):
            number = self.last_number(key)
            if not number:
                return 0, {}
            with contextlib.suppress(FileNotFoundError):  # a later lease was made and this one removed
                return number, json.loads(self._file(key, number).read_text(encoding="utf-8"))
        raise UserError(f"{self.folder / key}: cannot be read; delete it if no process runs the study")

    def last_number(self, key: str) -> int:
        """The number of the last lease; 0 if there is none."""
        try:
            names = os.listdir(self.folder / key)
        except FileNotFoundError:
            return 0
        return max((int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()), default=0)

    def _make(self, key: str, number: int, content: dict[str, Any]) -> bool:
        """Write lease ``number`` atomically; False if it exists."""
        temporary = self.folder / key / f".{uuid.uuid4().hex}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, self._file(key, number))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
                raise UserError(
                    f"`out`: the file system of {self.folder} has no hard links, which keep two processes from running "
                    "the same stage; name a folder on another"
                ) from None
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_old(self, key: str, number: int, owner: str | None) -> None:
        """Remove the leases before ``number`` and every heartbeat but that of ``owner``."""
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
    """A lease that this process holds; a context manager that releases it."""

    def __init__(self, leases: Leases, key: str, number: int, handle: int, on_loss: Callable[[], object]) -> None:
        self.leases, self.key, self.number = leases, key, number
        self._handle, self._on_loss = handle, on_loss
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def valid(self) -> bool:
        """Whether no other process has taken the lease over."""
        return self.leases.last_number(self.key) == self.number

    def check(self) -> None:
        """Check that the lease is valid.

        Raises:
            LeaseLost: if it is not.
        """
        if not self.valid:
            raise LeaseLost("another process has taken this stage over, because this one's heartbeat stopped")

    def release(self) -> None:
        """Free the stage: the next number is a lease without an owner."""
        self._released.set()
        self._thread.join()
        if self.valid and self.leases._make(self.key, self.number + 1, {"owner": None}):
            self.leases._remove_old(self.key, self.number + 1, None)
        os.close(self._handle)

    def _beat(self) -> None:
        """Write heartbeats until released. No success for half of the stale time counts as loss of the lease."""
        count, alive = 0, time.monotonic()
        while not self._released.wait(self.leases.beat):
            try:
                if not self.valid:
                    self._on_loss()
                    return
                count += 1
                os.pwrite(self._handle, _count(count), 0)
                os.fsync(self._handle)
                alive = time.monotonic()
            except OSError:  # e.g. a file server that is down
                if time.monotonic() - alive > self.leases.stale / 2:
                    self._on_loss()
                    return


def _count(number: int) -> bytes:
    return b"%020d\n" % number  # of constant length, so that a full disk has room for it


def _machine() -> str:
    """An id of this machine that changes when it is rebooted."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def _lock(handle: int) -> bool:
    """Lock a file until this process ends; False if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _is_unlocked(path: Path) -> bool:
    """Whether the process that locked a file has ended."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
