"""Errors in one line, without a traceback: bad input, whose fix is named (exit code 2), and runs that end early."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

__all__ = ["REQUEUE", "RunError", "UserError", "did_you_mean", "disk_full", "first_line", "out_of_memory"]


REQUEUE = 75  #: exit code (EX_TEMPFAIL) of a run that was told to stop and has saved; the same command goes on


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to mend it."""


class RunError(Exception):
    """A run that cannot go on, or was told to stop, through no fault of its input: what it has done stays.

    The message is one line.

    Attributes:
        code: the exit code: 1 for a failure, 75 (``EX_TEMPFAIL``) where the run was told to stop and the same command
            goes on, 2 where the input may be at fault all the same.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the option nearest to ``name``, or the list of options.

    Case does not count, nor whether words are joined by ``_`` or ``-``.
    """
    known = sorted(options)
    alike = {_alike(option): option for option in known}
    near = difflib.get_close_matches(_alike(name), alike, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {alike[near[0]]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether the system or a GPU had no more memory to give; torch has a type of its own for the latter alone."""
    told = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in told))


def disk_full(error: BaseException) -> bool:
    """Whether a file could not be written to its end; numpy raises an error without a number then."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and (error.errno in full or "requested and" in str(error))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _alike(name: object) -> str:
    return str(name).lower().replace("_", "-")
