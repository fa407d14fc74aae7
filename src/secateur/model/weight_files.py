"""Which file, and which name in it, each tensor of a checkpoint is read from: the rules of transformers.

torch is imported only to compare a head with an embedding.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from secateur.errors import UserError
from secateur.files import read_json
from secateur.model.families import Family

__all__ = [
    "INDEX",
    "SINGLE",
    "WEIGHTS_KEY",
    "describe_block",
    "differs",
    "holds_own_head",
    "model_names",
    "other_format",
    "weight_files",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS_KEY = "transformers_weights"  #: key of config.json that names other weight files
_INDEX_SUFFIX = ".safetensors.index.json"
#: files of other formats -> what to do
_OTHER_FORMATS = {
    "adapter_config.json": "it is a PEFT adapter: merge it into its base model first (merge_and_unload, then "
    "save_pretrained)",
    "*.gguf": "GGUF files are not read: name the safetensors checkpoint that they were made from",
    "*.bin": "convert its .bin files to safetensors first, secateur unpickles nothing",
    "consolidated*": "its consolidated files are the publisher's own format: name the version for transformers",
}
_ROWS = 4096  #: rows of two matrices that are compared at once


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, sorted: ``model.safetensors``, or without it every file that the index names.

    The key ``transformers_weights`` of config.json names another file or index.

    Where a tensor lies is read from the files, as transformers does, not from the index.

    Raises:
        UserError: if there are none, or the index names a file outside the directory.
    """
    choice = _configured_file(directory)
    single = directory / (choice or SINGLE)
    index = directory / (choice or INDEX)
    if single.exists() and not single.name.endswith(_INDEX_SUFFIX):
        return [single]
    if choice and not index.exists():
        raise UserError(f"{directory}: lacks {choice}, which `transformers_weights` in config.json names")
    if not index.exists():
        raise UserError(f"{directory}: holds no {SINGLE} and no {INDEX}{other_format(directory)}")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{index}: names {file!r}, which is not a file in the same directory")
    if not isinstance(content.get("metadata"), dict):
        raise UserError(f'{index}: has no metadata, and transformers refuses it; add "metadata": {{}}')
    return [directory / file for file in sorted(set(weight_map.values()))]


def other_format(directory: Path) -> str:
    """What a directory holds instead of a checkpoint, and what to do, as the end of an error; empty if unknown."""
    advice = (text for pattern, text in _OTHER_FORMATS.items() if next(directory.glob(pattern), None))
    return next((f"; {text}" for text in advice), "")


def _configured_file(directory: Path) -> str | None:
    """The file or index of weights that config.json names; None for the usual ones.

    Raises:
        UserError: if it is no safetensors file in the same directory.
    """
    path = directory / "config.json"
    content = read_json(path) if path.is_file() else None
    name = content.get(WEIGHTS_KEY) if isinstance(content, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", _INDEX_SUFFIX)):
        raise UserError(f"{path}: `{WEIGHTS_KEY}` is {name!r}, which is no safetensors file in the same directory")
    return name


def model_names(stored: Iterable[str], expected: Collection[str], prefix: str) -> dict[str, str]:
    """Map the names of a model's tensors to the names that they are stored under.

    A file may lack the prefix (``model.``) that a base model lacks, or have one more, as a wrapper's file has.
    """
    names: dict[str, str] = {}
    for name in sorted(stored):
        candidates = (name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        names.setdefault(next((c for c in candidates if c in expected), name), name)
    return names


def holds_own_head(
    directory: Path, family: Family, names_of: Callable[[Iterable[str], Family], dict[str, str]] | None = None
) -> bool:
    """Whether a checkpoint stores a head that differs from its embedding; False if its weights cannot be read.

    transformers then keeps both, even where the configuration says that they are one.

    Args:
        names_of: maps the names of a model's tensors to those stored; None for :func:`model_names`.
    """
    try:
        places = {name: path for path in weight_files(directory) for name in _stored_sizes(path)}
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return False
    names = (
        names_of(places, family) if names_of else model_names(places, (family.embedding, family.head), family.prefix)
    )
    if family.embedding not in names or family.head not in names:
        return False
    from safetensors import SafetensorError

    from secateur.model.safetensors_io import TensorFile

    embedding, head = names[family.embedding], names[family.head]
    try:
        return differs(TensorFile(places[embedding]), embedding, TensorFile(places[head]), head)
    except (SafetensorError, OSError, ValueError):
        return False


def differs(first: Any, first_name: str, second: Any, second_name: str) -> bool:
    """Whether two stored matrices have different sizes or values.

    Args:
        first: a :class:`~secateur.model.safetensors_io.TensorFile`, as ``second``.
    """
    import torch

    size = first.size(first_name)
    if size != second.size(second_name):
        return True
    try:
        same_type = first.dtype(first_name) == second.dtype(second_name)
        for start in range(0, size[0], _ROWS):
            pair = [
                file.rows(n, start, min(start + _ROWS, size[0]))
                for file, n in ((first, first_name), (second, second_name))
            ]
            if not torch.equal(*(pair if same_type else (part.float() for part in pair))):
                return True
    except UserError:  # a type that is not read here
        return True
    return False


def describe_block(directory: Path) -> str:
    """The tensors of a checkpoint's first block, with their sizes; empty if its weights cannot be read.

    Of several stacks of blocks, as a model with a vision tower has, it is the one whose first block is largest.
    Numbers within a block become ``*``, so that one expert stands for all.
    """
    try:
        sizes = {name: size for path in weight_files(directory) for name, size in _stored_sizes(path).items()}
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return ""
    stacks: dict[str, dict[str, list[int]]] = {}
    for name, size in sorted(sizes.items()):
        if match := re.match(r"([^\d.][^.]*(?:\.[^\d.][^.]*)*)\.0\.(.+)", name):
            rest = re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])
            stacks.setdefault(match[1], {})[rest] = size
    if not stacks:
        return ""
    stack = max(stacks, key=lambda name: sum(math.prod(size) for size in stacks[name].values()))
    return f"{stack}.0: {', '.join(f'{name} {size}' for name, size in stacks[stack].items())}"


def _stored_sizes(path: Path) -> dict[str, list[int]]:
    """The tensors in a safetensors file: name -> size. The checks of the library are left out."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: damaged header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        return {}
    return {name: [int(n) for n in entry["shape"]] for name, entry in header.items() if name != "__metadata__"}
