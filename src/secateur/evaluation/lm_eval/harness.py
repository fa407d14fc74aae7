"""lm-evaluation-harness, an optional dependency: importing it, and finding its tasks.

The harness takes ten seconds and more to read its index of all tasks. Single tasks are found without the index, by a
search through its YAML files.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from secateur import progress
from secateur.errors import UserError, did_you_mean
from secateur.runtime import install_command

__all__ = ["folder_manager", "import_harness", "index", "is_mentioned", "silence", "suggest_task", "task_folders"]

_TASK_LINE = re.compile(rb"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#\[{][^"'#\r\n]*?)["']?[ \t]*(?:#.*)?\r?$""", re.M)


def import_harness(module: str) -> Any:
    """Import a module of the harness.

    Raises:
        UserError: if lm-eval is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"tasks need lm-eval, which cannot be imported ({error}); {install_command('secateur[tasks]')}"
        ) from None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress the log messages of the harness, ``datasets`` and transformers."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


@cache
def task_folders() -> Mapping[str, Path]:
    """The harness's single tasks, each with the folder of its YAML file; takes a second, and no import of the harness.

    Raises:
        UserError: if lm-eval is not installed.
    """
    folders: dict[str, Path] = {}
    for path in _yaml_files("*.yaml"):
        if match := _TASK_LINE.search(path.read_bytes()):
            folders.setdefault(match[1].decode(), path.parent)
    return folders


def is_mentioned(name: str) -> bool:
    """Whether ``name`` appears in any YAML file of the harness, as each group and tag does; takes a second."""
    paths = _yaml_files("*yaml")  # files that are only included have no dot
    return index.cache_info().currsize > 0 or any(name.encode() in path.read_bytes() for path in paths)


def suggest_task(name: str) -> str:
    """``"; did you mean 'x'?"`` for the single task with the nearest name; empty if none is near."""
    return did_you_mean(name, difflib.get_close_matches(name, task_folders(), n=1, cutoff=0.5))


def _yaml_files(pattern: str) -> list[Path]:
    spec = importlib.util.find_spec("lm_eval")
    origin = spec.origin if spec else import_harness("lm_eval").__file__
    return sorted((Path(str(origin)).parent / "tasks").glob(f"**/{pattern}"), key=Path.as_posix)


def folder_manager(task: str) -> Any:
    """The harness's ``TaskManager`` of the folder that defines a single task.

    Raises:
        UserError: if lm-eval is not installed, or has no such task.
    """
    if task not in task_folders():
        raise UserError(f"lm-eval has no single task {task!r}{suggest_task(task)}")
    with silence():
        manager = import_harness("lm_eval.tasks").TaskManager
        _cache_templates(import_harness("lm_eval.utils").env)
        return _manager(manager, task_folders()[task])


def _cache_templates(environment: Any) -> None:
    """Compile each template of a prompt once; the harness compiles them again for every document."""
    if not hasattr(environment.from_string, "cache_info"):
        environment.from_string = lru_cache(maxsize=1024)(environment.from_string)


@cache  # the tasks of a group mostly share a folder
def _manager(manager: Any, folder: Path) -> Any:
    return manager(include_defaults=False, include_path=folder)


@cache
def index() -> Mapping[str, Any]:
    """The harness's tasks, groups and tags by name, as entries with ``cfg`` and ``tags``.

    Raises:
        UserError: if lm-eval is not installed.
    """
    progress.notify("lm-eval: reading its index of groups, which takes ten seconds and more")
    with silence():
        return import_harness("lm_eval.tasks").TaskManager().task_index
