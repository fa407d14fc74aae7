"""The arguments of ``secateur completion``."""

from __future__ import annotations

from typing import Any

from secateur.cli import manual
from secateur.cli.arguments.common import add_verb

__all__ = ["SHELLS", "add_completion"]

SHELLS = ("bash", "zsh", "fish")


def add_completion(verbs: Any) -> None:
    """``secateur completion``."""
    completion = add_verb(
        verbs,
        "completion",
        "print a script that completes verbs and options in a shell",
        "Verbs, options, their choices, methods, files and folders are completed.",
        manual.COMPLETION_EPILOG,
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
