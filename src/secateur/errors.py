"""Errors in one line, without a traceback: bad input, whose fix is named (exit code 2), and runs that end early."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["RunError", "UserError", "did_you_mean"]


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


def _alike(name: object) -> str:
    return str(name).lower().replace("_", "-")
