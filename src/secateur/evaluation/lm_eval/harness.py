"""lm-evaluation-harness, an optional dependency: how it is imported, and where its tasks lie.

Its index of all tasks takes ten seconds and more to read. A single task is found without it, by the names in the files.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from secateur import progress
from secateur.errors import UserError, did_you_mean

__all__ = [
    "import_harness",
    "index",
    "is_mentioned",
    "is_task",
    "manager_of",
    "near_tasks",
    "place_of",
    "silence",
]

_NAME = re.compile(rb"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#\[{][^"'#\r\n]*?)["']?[ \t]*(?:#.*)?\r?$""", re.M)


def import_harness(module: str) -> Any:
    """A module of the harness, which is not always installed.

    Raises:
        UserError: if it is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"tasks are measured with lm-eval, which cannot be imported ({error}); pip install 'secateur[tasks]'"
        ) from None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without the log messages of the harness, ``datasets`` and transformers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def is_task(name: str) -> bool:
    """Whether ``name`` is that of a single task; the harness itself is not imported, which takes seconds.

    Raises:
        UserError: if lm-eval is not installed.
    """
    return name in _places()


def is_mentioned(name: str) -> bool:
    """Whether any of the harness's files has ``name`` in it, as those of a group or a tag have; this takes a second."""
    return index.cache_info().currsize > 0 or any(
        name.encode() in path.read_bytes() for path in _files("*yaml")
    )  # included ones have no dot


def near_tasks(name: str) -> list[str]:
    """The single task whose name is the closest; none if no name is close."""
    return difflib.get_close_matches(name, _places(), n=1, cutoff=0.5)


def place_of(name: str) -> Path:
    """The folder that a single task's configuration lies in; the harness itself is not imported.

    Raises:
        UserError: if lm-eval is not installed, or knows no such task.
    """
    places = _places()
    if name not in places:
        raise UserError(f"lm-eval has no single task {name!r}{did_you_mean(name, near_tasks(name))}")
    return places[name]


def _files(pattern: str) -> list[Path]:
    """The configurations of the harness's tasks and groups."""
    found = importlib.util.find_spec("lm_eval")
    origin = found.origin if found else import_harness("lm_eval").__file__
    return sorted((Path(str(origin)).parent / "tasks").glob(f"**/{pattern}"), key=Path.as_posix)


@cache
def _places() -> Mapping[str, Path]:
    """Each of the harness's tasks -> the folder that its configuration lies in."""
    places: dict[str, Path] = {}
    for path in _files("*.yaml"):
        if named := _NAME.search(path.read_bytes()):
            places.setdefault(named[1].decode(), path.parent)
    return places


def manager_of(name: str | None) -> Any:
    """The harness's manager of the one folder that a task lies in; of no folder for one that lies in none."""
    folder = None if name is None else place_of(name)
    with silence():
        return _manager(import_harness("lm_eval.tasks").TaskManager, folder)


@cache  # the tasks of a group mostly lie together
def _manager(kind: Any, folder: Path | None) -> Any:
    return kind(include_defaults=False, include_path=folder)


@cache
def index() -> Mapping[str, Any]:
    """Every task, group and tag of the harness by its name, with its ``kind``, ``cfg`` and ``tags``.

    Raises:
        UserError: if lm-eval is not installed.
    """
    progress.notify("lm-eval: reading its index of groups of tasks, which takes ten seconds and more")
    with silence():
        return import_harness("lm_eval.tasks").TaskManager().task_index
