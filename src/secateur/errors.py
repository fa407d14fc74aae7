"""Errors in one line, without a traceback: bad input, whose fix is named (exit code 2), and runs that end early."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterable

__all__ = ["REQUEUE", "RunError", "UserError", "did_you_mean", "disk_full", "first_line", "out_of_memory", "spell"]


REQUEUE = 75  #: exit code (EX_TEMPFAIL) of a run that was told to stop and has saved; the same command goes on


_FIELD = re.compile(r"`([a-z_]+)`")


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and what to do.

    The message names fields of a request in backticks, as in "`ratio` must be between 0 and 1, got 1.5". Each face
    spells them its own way (:func:`spell`): the command line as ``--ratio``, a study file as ``ratio:``.

    Attributes:
        field: the field at fault; None where the fault is in a file or a model. A message that begins with a field in
            backticks needs no ``field`` of its own.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        leading = _FIELD.match(message)
        self.field = field or (leading[1] if leading else None)


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


def spell(message: str, spelling: Callable[[str], str | None]) -> str:
    """Replace each field that a message names in backticks by ``spelling(field)``, where that is not None."""
    return _FIELD.sub(lambda match: spelling(match[1]) or match[0], message)


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
