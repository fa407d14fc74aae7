"""Local documents of a task: reading the files, and changing the task's configuration to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.data.text_files import BOM
from secateur.errors import UserError
from secateur.files import sha256_file
from secateur.formatting import plural

__all__ = ["examples_file", "local_changes", "read_documents", "task_file"]

Rows = list[dict[str, Any]]


def task_file(folder: str, name: str) -> Path:
    """The file with the documents of a task."""
    return Path(folder).expanduser() / f"{name}.jsonl"


def examples_file(folder: str, name: str) -> Path:
    """The file with the documents that become examples in the prompts of a task."""
    return Path(folder).expanduser() / f"{name}.examples.jsonl"


def read_documents(path: Path, hint: str = "the data of a task is a folder that holds <task>.jsonl") -> Rows:
    """Read the documents of a task, one JSON object a line.

    Raises:
        UserError: if the file is missing or empty, or a line is not a JSON object with the fields of the first one.
    """
    try:
        data = path.read_bytes().removeprefix(BOM)
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
            raise UserError(f"{path}:{number}: not valid JSON: {reason}; repair or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; each line is one document")
        if rows and row.keys() != rows[0].keys():
            fields = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise UserError(f"{path}:{number}: differs from the first document in its fields: {fields}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no documents")
    return rows


def local_changes(config: Mapping[str, Any], folder: str, few_shot: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the changes of a task's configuration that make it read local files, and the hashes of these files.

    Without examples in the prompt the documents serve as the only split. With examples, a second file replaces the
    split that the task draws examples from, unless the task defines its examples itself or draws them from the
    documents that it asks about.

    Args:
        folder: holds ``<task>.jsonl``, and ``<task>.examples.jsonl`` if examples come from another split.

    Raises:
        UserError: as :func:`read_documents`; if there are too few examples; or if the task is a Python class, which
            fetches its documents itself.
    """
    name = config["task"]
    if "class" in config:
        raise UserError(
            f"{name}: lm-eval fetches its documents with code of its own, so local files cannot replace them; leave it "
            "out, or leave out the local data and connect to the network"
        )
    path, examples = task_file(folder, name), examples_file(folder, name)
    rows, hashes = read_documents(path), {"sha256": sha256_file(path)}
    if not few_shot:
        splits = {"training_split": None, "validation_split": None, "test_split": "local"}
        return _dataset({"local": rows}) | splits | {"fewshot_split": None, "fewshot_config": None}, hashes
    test_split = config.get("test_split") or config.get("validation_split") or "local"
    example_split = _example_split(config, test_split)
    datasets = {test_split: rows}
    if example_split not in (None, test_split):
        hint = f"the {few_shot} examples in each prompt of {name} are drawn from it; add the file, or use 0 examples"
        datasets[example_split] = read_documents(examples, hint)
        hashes["examples_sha256"] = sha256_file(examples)
    if example_split is not None:
        count, minimum = len(datasets[example_split]), few_shot + (example_split == test_split)
        if count < minimum:
            file = path if example_split == test_split else examples
            raise UserError(
                f"{file}: holds {plural(count, 'document')}, "
                f"too few to draw {plural(few_shot, 'example')} from; needs {minimum}"
            )
    names = {key: config.get(key) for key in ("training_split", "validation_split", "test_split")}
    splits = {key: split if split in datasets else None for key, split in names.items()}
    if test_split == "local":
        splits["test_split"] = test_split
    return _dataset(datasets) | splits, hashes


def _example_split(config: Mapping[str, Any], test_split: str) -> str | None:
    """The split that examples are drawn from, in the harness's order; None if the task defines its examples itself."""
    settings = config.get("fewshot_config") or {}
    split = settings.get("split") or config.get("fewshot_split")
    if split is None and not settings.get("samples"):
        split = config.get("training_split") or config.get("validation_split") or test_split
    return split


def _dataset(splits: Mapping[str, Rows]) -> dict[str, Any]:
    import datasets  # takes a second

    def load(**_: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    return {"custom_dataset": load, "dataset_kwargs": None}
