"""The verbs: arguments in; a JSON-able answer, its text for people, and the exit code out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module

from secateur.cli.verbs.answer import Answer
from secateur.runtime import quiet_libraries

__all__ = ["function_of"]

_MODULES = {
    "compare": "evaluation",
    "completion": "completion",
    "data": "data",
    "demo": "studies",
    "eval": "evaluation",
    "inspect": "describe",
    "mask": "pruning",
    "prune": "pruning",
    "recommend": "recommend",
    "search": "search",
    "shapes": "describe",
    "study": "studies",
    "teach": "training",
    "train": "training",
}


def function_of(arguments: Namespace) -> Callable[[Namespace], Answer]:
    """Import the module of a verb and return its function."""
    quiet_libraries()
    verb: str = arguments.verb
    name = {"eval": "evaluate", "study": f"study_{getattr(arguments, 'action', '')}"}.get(verb, verb)
    return getattr(import_module(f"{__name__}.{_MODULES[verb]}"), name)
