"""completion: a script by which a shell completes the command line."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from secateur.cli.arguments import parser
from secateur.cli.verbs.answer import Answer
from secateur.errors import UserError
from secateur.methods.registry import METHODS
from secateur.runtime import install_command

__all__ = ["completion"]

#: fields whose values are folders or files
_FOLDERS = (
    "init",
    "like",
    "model",
    "models",
    "other_out",
    "out",
    "study",
    "tasks_data",
    "teacher",
    "text_data",
    "tokenizer",
)
_FILES = ("a", "b", "file", "other", "recipe")


def completion(arguments: Namespace) -> Answer:
    """``secateur completion SHELL``."""
    try:
        import shtab
    except ImportError:
        raise UserError(f"completion needs shtab; install it: {install_command('shtab')}") from None
    outermost = parser()
    for action in _actions(outermost):
        if isinstance(action.choices, dict):  # verbs: what shells show beside their names
            for verb in action.choices.values():
                verb.description = str(verb.description).partition(". ")[0]
        elif action.dest == "method":
            action.choices = list(METHODS)
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(outermost, arguments.shell)
    return {"shell": arguments.shell, "script": script}, script, 0


def _actions(outermost: ArgumentParser) -> Iterator[Action]:
    """Every action of a parser and of those of its verbs."""
    for action in outermost._actions:
        yield action
        verbs: Any = action.choices
        if isinstance(verbs, dict):
            for verb in verbs.values():
                yield from _actions(verb)
