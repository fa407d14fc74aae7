"""Atomic writes, hashes, and output directories that appear only when they are complete."""

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
from secateur.errors import UserError, reason
from secateur.formatting import byte_size

__all__ = [
    "FINISHED_BLOCKS",
    "check_disk",
    "partial_directories",
    "read_json",
    "refuse_file",
    "refuse_pointer",
    "require_new_directory",
    "require_writable",
    "resumable_directory",
    "sha256_file",
    "sha256_tree",
    "shared_directory",
    "sync_tree",
    "write_bytes",
    "write_json",
    "write_text",
]


_POINTER = b"version https://git-lfs.github.com/spec/"
FINISHED_BLOCKS = "**/finished"  #: files of a work directory that show that a block has been pruned


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
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
    """Write ``value`` as indented JSON, atomically; NaN and infinity raise ValueError."""
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
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    except json.JSONDecodeError as error:
        refuse_pointer(path)
        raise UserError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}") from None


def refuse_pointer(path: Path) -> None:
    """Check that a file is not the pointer that git leaves where git-lfs has not fetched the content.

    Raises:
        UserError: if it is.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path}: holds a pointer of git-lfs instead of the file; run `git lfs pull` beside it")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path, files: Iterable[Path] | None = None) -> str:
    """SHA-256, in hexadecimal, of the contents of ``files`` and their paths below ``root``; None means all files."""
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


def refuse_file(out: Path) -> None:
    """Check that ``out`` is a directory or can become one; nothing is written.

    Raises:
        UserError: if it is a file, or below one.
    """
    existing = next((path for path in (out, *out.parents) if path.exists()), None)
    if existing is not None and not existing.is_dir():
        raise UserError(f"`out`: {existing} is a file; name a folder")


def require_writable(out: Path) -> None:
    """Check that files may be written into ``out``, which may not exist yet; nothing is written.

    Raises:
        UserError: if it is a file, lies below one, or may not be written.
    """
    refuse_file(out)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"`out`: {existing} may not be written; name another folder")


def require_new_directory(out: Path) -> None:
    """Check that ``out`` may be written: it does not exist, or is an empty directory.

    Raises:
        UserError: if it is anything else.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is a {'link' if out.is_symlink() else 'file'}; name a new directory")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: already exists and is not empty; name a new directory")


def partial_directories(out: Path) -> tuple[Path, Path]:
    """Return where ``out`` is assembled, and the work directory from which a killed run resumes."""
    partial = out.with_name(f"{out.name}.partial")
    return partial / "out", partial / "work"


@contextlib.contextmanager
def resumable_directory(
    out: Path,
    request: dict[str, Any],
    *,
    resume: bool,
    progress_files: str = FINISHED_BLOCKS,
    labels: Mapping[str, str] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Create and yield :func:`partial_directories`; the first becomes ``out`` if the block succeeds.

    A run that fails or is killed after its first step keeps its work directory, and a later run with the same
    ``request`` and ``resume`` continues from it. Before the first step, and after invalid input, nothing remains.

    Args:
        request: identifies the run: what it makes, from what.
        progress_files: glob pattern below the work directory; a match shows that the first step is done.
        labels: how to name keys of ``request`` in messages.

    Raises:
        UserError: if ``out`` exists, another process is writing it, or an unfinished run exists that must not be
            continued or had another request.
    """
    require_new_directory(out)
    fresh, work = partial_directories(out)
    partial = work.parent
    new_parents = [parent for parent in out.parents if not parent.exists()]  # innermost first
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
        had_progress = _has_progress(work, progress_files)
        _prepare_work(partial, request, resume, progress_files, labels or {})
        shutil.rmtree(fresh, ignore_errors=True)
        work.mkdir(exist_ok=True)
        fresh.mkdir()
        try:
            yield fresh, work
            _move_into_place(fresh, out)
        except BaseException as error:
            # Progress of an earlier run survives invalid input: the input may be a mistyped option.
            if (isinstance(error, UserError) and not had_progress) or not _has_progress(work, progress_files):
                _remove(partial, new_parents)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _prepare_work(
    partial: Path, request: dict[str, Any], resume: bool, progress_files: str, labels: Mapping[str, str]
) -> None:
    """Check that an unfinished run may be continued, or clear the work directory; record ``request``."""
    work = partial / "work"
    if _has_progress(work, progress_files):
        if not resume:
            raise UserError(f"{partial}: holds an unfinished run; continue it with `resume`, or delete it")
        previous = _previous_request(partial)
        if previous != request:
            raise UserError(
                f"{partial}: holds an unfinished run with another request: "
                f"{'; '.join(_differences(previous, request, labels))}; repeat that request, or delete the directory"
            )
    else:
        shutil.rmtree(work, ignore_errors=True)
    write_json(partial / "asked.json", request)


def _differences(previous: dict[str, Any], request: dict[str, Any], labels: Mapping[str, str]) -> Iterator[str]:
    """The labels of the keys that differ, with the differences of short mappings."""
    for key in sorted(k for k in {*previous, *request} if previous.get(k) != request.get(k)):
        old, new = previous.get(key), request.get(key)
        details = ""
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            details = ", ".join(f"{name} was {old.get(name)}, is now {new.get(name)}" for name in names)
        yield labels.get(key, key) + (f" ({details})" if 0 < len(details) < 120 else "")


def _previous_request(partial: Path) -> dict[str, Any]:
    try:
        previous = read_json(partial / "asked.json")
        if isinstance(previous, dict):
            return previous
        raise UserError(f"{partial / 'asked.json'}: should hold a mapping")
    except UserError as error:
        raise UserError(f"{error}; delete {partial} and start again") from None


def _has_progress(work: Path, progress_files: str) -> bool:
    return next(work.glob(progress_files), None) is not None


def _move_into_place(fresh: Path, out: Path) -> None:
    sync_tree(fresh)
    if out.is_dir():
        out.rmdir()
    os.rename(fresh, out)


def _remove(partial: Path, new_parents: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for parent in new_parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextlib.contextmanager
def shared_directory(
    out: Path,
    identity: dict[str, Any],
    subject: str,
    *,
    resume: bool,
    progress_files: str = FINISHED_BLOCKS,
    labels: Mapping[str, str] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Yield the folders of :func:`resumable_directory` in all processes; the first one makes and moves them.

    Args:
        identity: what it is made of, the same in all processes.
        subject: what ``identity`` describes, for errors.
    """
    distributed.require_equal(subject, fingerprint(identity))
    if distributed.is_main():
        directories: contextlib.AbstractContextManager[tuple[Path, Path]] = resumable_directory(
            out, identity, resume=resume, progress_files=progress_files, labels=labels
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
