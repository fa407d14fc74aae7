"""Names of models in tables, comparisons and the files of their results."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from secateur.errors import UserError
from secateur.formatting import plural
from secateur.hub import is_hub_name

__all__ = ["check_names", "distinct_names"]

_STUDY_FOLDER = "model"  #: how the checkpoint of every stage is called, which tells nothing


def distinct_names(models: Sequence[Any]) -> list[str]:
    """Name each model by the shortest end of its path that no other one shares, such as ``A`` and ``B`` for ``A/model``
    and ``B/model``. Two names are equal only if two paths are.
    """
    parts = [_parts(os.fspath(model)) for model in models]
    lengths = [1] * len(parts)
    while True:
        names = [_joined(path[-length:]) for path, length in zip(parts, lengths, strict=True)]
        counts = Counter(name.casefold() for name in names)  # some file systems take A and a for the same
        longer = [i for i, name in enumerate(names) if counts[name.casefold()] > 1 and lengths[i] < len(parts[i])]
        if not longer:
            return _numbered(names, parts)
        for i in longer:
            lengths[i] += 1


def _numbered(names: Sequence[str], parts: Sequence[list[str]]) -> list[str]:
    """The names, with a number behind those of different paths that are equal but for odd characters."""
    paths: dict[str, list[list[str]]] = {}
    numbers = []
    for name, path in zip(names, parts, strict=True):
        equal = paths.setdefault(name.casefold(), [])
        if path not in equal:
            equal.append(path)
        numbers.append(equal.index(path) + 1)
    return [f"{name}-{number}" if number > 1 else name for name, number in zip(names, numbers, strict=True)]


def _parts(model: str) -> list[str]:
    path = model.removeprefix("hf:") if is_hub_name(model) else os.path.abspath(os.path.expanduser(model))
    return [part for part in path.split("/") if part] or ["root"]


def _joined(parts: Sequence[str]) -> str:
    """Parts of a path as one name that is also a file's."""
    if len(parts) > 1 and parts[-1] == _STUDY_FOLDER:
        parts = parts[:-1]
    return "-".join(re.sub(r"[^\w.+=@-]+", "-", part) for part in parts).lstrip(".-") or "model"


def check_names(names: Sequence[str], models: int) -> None:
    """Check names that a user has chosen.

    Raises:
        UserError: if there are not as many as models, or one is no name of a file or occurs twice.
    """
    if len(names) != models:
        raise UserError(f"`names`: {len(names)} for {plural(models, 'model')}; give each model one, in order")
    for name in names:
        if not re.fullmatch(r"[^\s/\\,.-]([^/\\,]*[^\s/\\,])?", name):
            raise UserError(f"`names`: {name!r} is no name of a file; leave out slashes, commas and dots in front")
    if twice := [name for name, count in Counter(map(str.casefold, names)).items() if count > 1]:
        raise UserError(f"`names`: two models are called {twice[0]!r}; give each a name of its own")
