"""Documents of tasks in local files, and how a task of lm-evaluation-harness is made to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import UserError
from secateur.files import sha256_file

__all__ = ["examples_file", "local_changes", "read_documents", "task_file"]

Rows = list[dict[str, Any]]


def task_file(folder: str, name: str) -> Path:
    """Where the documents of a task lie."""
    return Path(folder).expanduser() / f"{name}.jsonl"


def examples_file(folder: str, name: str) -> Path:
    """Where the documents lie that examples in a prompt are drawn from."""
    return Path(folder).expanduser() / f"{name}.examples.jsonl"


def read_documents(path: Path, hint: str = "the data of a task is a folder that holds <task>.jsonl") -> Rows:
    """The documents of a local task, one a line.

    Raises:
        UserError: if the file is missing or empty, or a line is not an object in JSON with the fields of the first one.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows: Rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", getattr(error, "reason", error))
            raise UserError(f"{path}:{number}: not valid JSON: {reason}; mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; each line is one document")
        if rows and row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise UserError(f"{path}:{number}: differs from the first document in its fields: {odd}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no documents")
    return rows


def local_changes(config: Mapping[str, Any], folder: str, few_shot: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The changes of a task's configuration that make it read local files, and the hashes of these.

    Without examples in the prompt the documents are all there is, whichever split they are. With examples, they are
    drawn from a file of their own in place of the split that the task draws them from, unless the task brings them
    along, or draws them from the very documents that it asks about.

    Args:
        config: of the task, as the harness has it.
        folder: with ``<task>.jsonl``, and ``<task>.examples.jsonl`` where examples are drawn from another split.
        few_shot: examples in each prompt.

    Raises:
        UserError: as :func:`read_documents`, or if the task is a Python class that fetches its documents by itself.
    """
    name = config["task"]
    if "class" in config:
        raise UserError(
            f"{name}: lm-eval fetches its documents with code of its own, so that no local file serves; leave it out, "
            "or leave out the local data and connect to the network"
        )
    path = task_file(folder, name)
    rows = read_documents(path)
    hashes = {"sha256": sha256_file(path)}
    if not few_shot:
        splits = {"training_split": None, "validation_split": None, "test_split": "local"}
        return _reading({"local": rows}) | splits | {"fewshot_split": None, "fewshot_config": None}, hashes
    own = config.get("fewshot_config") or {}
    asked = config.get("test_split") or config.get("validation_split") or "local"
    drawn = own.get("split") or config.get("fewshot_split")
    if drawn is None and not own.get("samples"):  # the harness's own order
        drawn = config.get("training_split") or config.get("validation_split") or asked
    splits = {asked: rows}
    if drawn not in (None, asked):
        more = examples_file(folder, name)
        hint = (
            f"the {few_shot} examples in each prompt of {name} are drawn from it; put it there, or ask for 0 examples"
        )
        splits[drawn] = read_documents(more, hint)
        hashes["examples_sha256"] = sha256_file(more)
    there, needed = (len(splits[drawn]), few_shot + (drawn == asked)) if drawn else (few_shot, few_shot)
    if there < needed:
        file = path if drawn == asked else examples_file(folder, name)
        raise UserError(f"{file}: holds {there} documents, too few to draw {few_shot} examples from; give it {needed}")
    kept = {key: config.get(key) for key in ("training_split", "validation_split", "test_split")}
    kept = {key: split if split in splits else None for key, split in kept.items()}
    return _reading(splits) | kept | ({"test_split": asked} if asked == "local" else {}), hashes


def _reading(splits: Mapping[str, Rows]) -> dict[str, Any]:
    import datasets  # takes a second

    def read(**_: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    return {"custom_dataset": read, "dataset_kwargs": None}
