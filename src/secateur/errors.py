"""Errors that a user can mend: one line, the fix named, no traceback (exit code 2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["Interruption", "UserError", "did_you_mean"]


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to mend it."""


class Interruption(UserError):
    """No fault of what was asked: the network or the disk gave out. What is done stays, and a new run goes on."""


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
