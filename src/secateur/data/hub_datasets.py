"""Datasets that the ``datasets`` library reads: of the Hugging Face Hub, or local folders of one."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur import progress
from secateur.data.documents import INVALID_UTF8, BadRow, Document, Fields, select_documents
from secateur.data.local_files import by_relative_path, hash_files, report_files, walk
from secateur.errors import RunError, UserError, first_line
from secateur.files import read_json

__all__ = ["HubSource", "SavedDataset", "is_saved"]

_SPLITS, _STATE = "dataset_dict.json", "state.json"  # files of `save_to_disk`


@dataclass(frozen=True)
class HubSource:
    """A streaming dataset of the ``datasets`` library; ``local`` is its folder if it is not on the Hub."""

    name: str
    path: str
    config: str | None
    fields: Fields
    split: str
    local: Path | None

    def digest(self) -> str:
        # A local folder is identified by its content, a dataset of the Hub by its name.
        content = hash_files(by_relative_path(self.local, walk(self.local))) if self.local else self.path
        return hashlib.sha256(json.dumps(["hf", content, self.config, self.split]).encode()).hexdigest()

    def size(self) -> int | None:
        return None

    def load(self) -> Any:
        """Open the streaming dataset.

        Raises:
            UserError: if a local dataset, its configuration or its split does not exist.
            RunError: the same for the Hub, or if the Hub cannot be reached.
        """
        import datasets  # takes a second

        if self.local is None:
            progress.notify(f"{self.name}: fetching from the Hugging Face Hub")
        with self._translate_errors():
            builder = datasets.load_dataset_builder(self.path, self.config)
            return builder.as_streaming_dataset(split=self.split)

    def check(self, folder: Path) -> None:
        """Open a local dataset without reading it, and report which files of its folder it reads.

        Raises:
            UserError: as :meth:`load`.
        """
        import datasets

        self.load()
        splits = datasets.load_dataset_builder(self.path, self.config).config.data_files or {}
        paths = {Path(file).resolve() for files in splits.values() for file in files}
        report_files(self.name, folder, [path for path in walk(folder) if path.resolve() in paths])

    def documents(self) -> Iterator[Document]:
        remedy = "name another split or field"
        return select_documents(self._rows(), f"{self.name}: split {self.split!r}", self.fields, remedy)

    def _rows(self) -> Iterator[Document | BadRow]:
        number = 0
        try:
            with self._translate_errors():
                for row in self.load():
                    at = f"{self.name}: {self.split} row {number}"
                    yield self.fields.document(row, f"{self.split}:{number}", at, "")
                    number += 1
        except UnicodeDecodeError:
            # Readers of `datasets` stop here, and some read rows ahead.
            raise UserError(
                f"{self.name}: {self.split} row {number} or one after it is not UTF-8; convert the data"
            ) from None
        finally:
            # An unfinished parquet scan aborts the process at exit unless it is collected before
            # (https://github.com/apache/arrow/issues/45214).
            gc.collect()

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn errors of ``datasets`` into one line."""

        def failure(text: str) -> Exception:
            return UserError(text) if self.local else RunError(text, 2)  # a network failure may pass

        try:
            yield
        except (UserError, RunError, UnicodeDecodeError):
            raise
        except ConnectionError:
            hint = "connect to the network, or name a local folder of .jsonl or .parquet files"
            raise failure(f"{self.name}: the Hugging Face Hub cannot be reached; {hint}") from None
        except Exception as error:  # `datasets` raises what its readers raise, of any class
            lines = (str(error).strip() or type(error).__name__).splitlines()
            reason = " ... ".join(dict.fromkeys([lines[0], lines[-1]])).rstrip(".")
            hint = f"check the dataset's name, its configuration ({self.config or 'none'}) and split {self.split!r}"
            raise failure(f"{self.name}: {reason}; {hint}") from None


@dataclass(frozen=True)
class SavedDataset:
    """A dataset that ``datasets`` wrote with ``save_to_disk``."""

    name: str
    folder: Path  #: of one split
    fields: Fields
    split: str

    @classmethod
    def open(cls, name: str, folder: Path, fields: Fields, split: str) -> SavedDataset:
        """Open a saved ``Dataset``, or a split of a ``DatasetDict``.

        Raises:
            UserError: if there is no such split.
        """
        if (folder / _SPLITS).is_file():
            splits = [str(name) for name in read_json(folder / _SPLITS).get("splits", [])]
            if split not in splits:
                names = ", ".join(splits) or "none"
                hint = f"; name the folder of one, e.g. hf:{folder / splits[0]}" if splits else ""
                raise UserError(f"{name}: no split {split!r}; the splits are {names}{hint}")
            return cls(name, folder / split, fields, split)
        # A single dataset may be any split: the default name is no request.
        stored = read_json(folder / _STATE).get("_split")
        if split not in ("train", stored):
            raise UserError(f"{name}: holds one split, {stored or 'without a name'}, not {split!r}; leave out `split`")
        return cls(name, folder, fields, str(stored or split))

    def digest(self) -> str:
        # Its other files hold a fingerprint of how the data was made.
        content = hash_files(by_relative_path(self.folder, walk(self.folder, (".arrow",))))
        return hashlib.sha256(json.dumps(["saved", content]).encode()).hexdigest()

    def size(self) -> int | None:
        return None

    def documents(self) -> Iterator[Document]:
        return select_documents(self._rows(), self.name, self.fields, "name another dataset or field")

    def _rows(self) -> Iterator[Document | BadRow]:
        import datasets  # takes a second

        try:
            dataset = datasets.Dataset.load_from_disk(str(self.folder)).with_format(None)
        except Exception as error:  # of any class, as its files are damaged
            raise UserError(f"{self.folder}: not a readable dataset: {first_line(error)}; save it again") from None
        self.fields.require(dataset.column_names, self.name, "column")
        dataset = dataset.select_columns(self.fields.columns(dataset.column_names))  # images need not be decoded
        number = 0
        while number < len(dataset):
            try:
                for row in dataset.skip(number):
                    yield self.fields.document(row, f"{self.split}:{number}", f"{self.name}: row {number}", "")
                    number += 1
            except UnicodeDecodeError:
                message = f"{self.name}: row {number}: not UTF-8; save the dataset again from valid text"
                yield BadRow(INVALID_UTF8, message)
                number += 1


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` wrote the folder with ``save_to_disk``."""
    return (folder / _SPLITS).is_file() or all((folder / name).is_file() for name in (_STATE, "dataset_info.json"))
