"""Files that are either whole or absent: atomic writes, hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.config import fingerprint
from secateur.errors import UserError
from secateur.formatting import byte_size

__all__ = [
    "BLOCKS",
    "check_disk",
    "check_free",
    "partial_directories",
    "read_json",
    "resumable_directory",
    "sha256_file",
    "sha256_tree",
    "shared_directory",
    "sync_tree",
    "write_bytes",
    "write_json",
    "write_text",
]


BLOCKS = "*/finished"  #: what a folder of work has once a block has been pruned


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path, files: Iterable[Path] | None = None) -> str:
    """SHA-256, in hexadecimal, of the names below ``root`` and the contents of ``files``; of all there unless given."""
    if files is None:
        files = sorted((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
    pairs = [[path.relative_to(root).as_posix(), sha256_file(path)] for path in files]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def sync_tree(directory: Path) -> None:
    """Force every file below ``directory``, and the directories, to disk."""
    for root, _, names in os.walk(directory):
        for path in [*(os.path.join(root, name) for name in names), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_free(out: Path) -> None:
    """Refuse a directory to be written that is there already.

    Raises:
        UserError: if ``out`` exists and is not an empty directory.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is a {'link' if out.is_symlink() else 'file'}; name a new directory")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: already exists and is not empty; name a new directory")


def partial_directories(out: Path) -> tuple[Path, Path]:
    """Where ``out`` is written until it is whole, and where a run keeps what it goes on with after a kill."""
    partial = out.with_name(f"{out.name}.partial")
    return partial / "out", partial / "work"


@contextlib.contextmanager
def resumable_directory(
    out: Path,
    asked: dict[str, Any],
    *,
    resume: bool,
    begun: str = BLOCKS,
    words: Mapping[str, str] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Make and yield :func:`partial_directories`; the first becomes ``out`` if the block succeeds.

    Bad input leaves nothing behind that was not there. A run that was interrupted or killed after a step (a file
    ``begun`` below ``work`` tells) leaves its work, and one with the same ``asked`` and ``resume`` finds it as it was.

    Args:
        out: what is to be written.
        asked: what it is to be made of, and how.
        resume: whether to go on with an unfinished run.
        begun: files below ``work`` by which an unfinished run is known.
        words: what a key of ``asked`` is called before people.

    Raises:
        UserError: if ``out`` exists; an unfinished run is there and is not to be resumed, or asked for something else;
            or another process is at it.
    """
    check_free(out)
    fresh, work = partial_directories(out)
    partial = work.parent
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("a")
    except OSError as error:
        raise UserError(f"{out}: cannot be created: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{partial}: another process is writing it; wait for it, or name another directory"
            ) from None
        before = _begun(work, begun)
        _take_up(partial, asked, resume, begun, words or {})
        shutil.rmtree(fresh, ignore_errors=True)
        work.mkdir(exist_ok=True)
        fresh.mkdir()
        try:
            yield fresh, work
            _put_in_place(fresh, out)
        except BaseException as error:
            # What an earlier run has done is never lost, not even to bad input: an option may be all that is wrong.
            if (isinstance(error, UserError) and not before) or not _begun(work, begun):
                _remove(partial, made)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _take_up(partial: Path, asked: dict[str, Any], resume: bool, begun: str, words: Mapping[str, str]) -> None:
    """Decide what becomes of an earlier run's work; leave the folder with this run's ``asked.json``."""
    work = partial / "work"
    if _begun(work, begun):
        if not resume:
            raise UserError(f"{partial}: holds an unfinished run; go on with --resume, or delete it")
        before = _asked_before(partial)
        if before != asked:
            raise UserError(
                f"{partial}: the unfinished run there was asked for something else: "
                f"{'; '.join(_differences(before, asked, words))}; ask for the same, or delete it"
            )
    else:
        shutil.rmtree(work, ignore_errors=True)
    write_json(partial / "asked.json", asked)


def _differences(before: dict[str, Any], asked: dict[str, Any], words: Mapping[str, str]) -> Iterator[str]:
    """What differs, in words, and how, where that is short."""
    for key in sorted(k for k in {*before, *asked} if before.get(k) != asked.get(k)):
        old, new = before.get(key), asked.get(key)
        parts = []
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            parts = [f"{name} was {old.get(name)}, is now {new.get(name)}" for name in names]
        told = ", ".join(parts)
        yield words.get(key, key) + (f" ({told})" if 0 < len(told) < 120 else "")


def _asked_before(partial: Path) -> dict[str, Any]:
    try:
        before = read_json(partial / "asked.json")
        if isinstance(before, dict):
            return before
        raise UserError(f"{partial / 'asked.json'}: should hold a mapping")
    except UserError as error:
        raise UserError(f"{error}; delete {partial} and start again") from None


def _begun(work: Path, begun: str) -> bool:
    return next(work.glob(begun), None) is not None


def _put_in_place(work: Path, out: Path) -> None:
    sync_tree(work)
    if out.is_dir():
        out.rmdir()
    os.rename(work, out)


def _remove(partial: Path, made: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for parent in made:
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextlib.contextmanager
def shared_directory(
    out: Path,
    identity: dict[str, Any],
    subject: str,
    *,
    resume: bool,
    begun: str = BLOCKS,
    words: Mapping[str, str] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Yield the folders of :func:`resumable_directory` in all processes; the first one makes and moves them.

    Args:
        out: the directory to write.
        identity: what it is made of, the same in all processes.
        subject: what ``identity`` describes, for errors.
        resume: whether to continue an unfinished run.
        begun: pattern of the files that an unfinished run is known by.
        words: what a key of ``identity`` is called in errors.
    """
    distributed.require_equal(subject, fingerprint(identity))
    if distributed.is_main():
        directories: contextlib.AbstractContextManager[tuple[Path, Path]] = resumable_directory(
            out, identity, resume=resume, begun=begun, words=words
        )
    else:
        directories = contextlib.nullcontext(partial_directories(out))
    with directories as folders:
        distributed.barrier()  # until they exist
        yield folders
        distributed.barrier()  # until no process reads in them any more


def check_disk(out: Path, needed: float) -> str:
    """Describe the disk space that a run needs and that is free.

    Raises:
        UserError: if too little is free.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{out}: needs about {byte_size(needed)} of disk, and {byte_size(free)} are free; write elsewhere"
        )
    return f"{byte_size(needed)} of disk (free: {byte_size(free)})"
