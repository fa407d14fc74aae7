"""Results of a walk, block by block, and the states between blocks: in memory or on disk."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from secateur import distributed
from secateur.calibration.async_writer import AsyncWriter, is_worthwhile
from secateur.calibration.checksum import SIZE, checksum
from secateur.files import write_text
from secateur.model.safetensors_io import Stored, TensorFile, write_tensors
from secateur.progress import notify

__all__ = ["Journal", "StateStore", "Workspace"]


class Journal(Mapping[str, Tensor]):
    """Result tensors of a walk, by name; on disk, a tensor is read when it is used.

    A step (a block, or a group of windows) is *finished* once all its results are there. A killed run resumes after the
    last finished step. If a file does not match its checksum, the walk starts over, with a notice. Only the main
    process puts tensors in; with several processes, the directory must be visible to all.

    Args:
        directory: directory for the tensors of each step; None for memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.finished_steps = 0  #: number of finished steps
        self.complete = False  #: whether the walk has ended
        self._tensors: dict[str, Tensor | TensorFile | Future[TensorFile]] = {}
        self._writer: AsyncWriter | None = None
        if directory is None:
            return
        if distributed.is_main():
            try:
                self._read_index(directory)
            except (FileNotFoundError, ValueError, SafetensorError) as error:
                notify(f"{directory}: is damaged ({error}); scoring starts over")
                shutil.rmtree(directory)
                self.finished_steps, self.complete, self._tensors = 0, False, {}
            directory.mkdir(parents=True, exist_ok=True)
        distributed.barrier()  # until the main process has checked the files
        if not distributed.is_main():
            self._read_index(directory)

    def _read_index(self, directory: Path) -> None:
        marker = directory / "finished"
        self.finished_steps = int(marker.read_text()) if marker.exists() else 0
        if self.finished_steps < 0:
            raise ValueError(f"{marker.name}: {self.finished_steps}")
        self.complete = (directory / "complete").exists()
        paths = sorted(directory.glob("step-*.safetensors"))
        for path in paths if self.complete else map(self._file, range(self.finished_steps)):
            file = self._index(path)
            if distributed.is_main() and path.with_suffix(".sum").read_text() != checksum(file.bytes).hex():
                raise ValueError(f"{path.name} does not match its checksum")

    @contextlib.contextmanager
    def async_writes(self, device: str) -> Iterator[None]:
        """Write tensors in a thread while the device computes, if that saves time; at the end all are on disk.

        An error in the thread is raised by the next :meth:`put`, when its tensor is read, or at the end.
        """
        if self.directory is None or not is_worthwhile(device):
            yield
            return
        self._writer = AsyncWriter(device)
        try:
            yield
            self.flush()
        finally:  # the thread must be idle before files are removed
            self._writer.close()
            self._writer = None

    def flush(self) -> None:
        """Wait until all tensors and markers are on disk."""
        if self._writer:
            self._writer.flush()

    def put(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the results of a step; the tensors must not change afterwards."""
        if self.directory is None:
            self._tensors |= {name: tensor.cpu() for name, tensor in tensors.items()}
        elif self._writer is None:
            self._tensors |= dict.fromkeys(tensors, self._write(step, tensors))
        else:
            self.flush()  # at most one step waits, which bounds the memory
            to_host = self._writer.copy_to_host(tensors)
            self._tensors |= dict.fromkeys(tensors, self._writer.submit(lambda: self._write(step, to_host())))

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> TensorFile:
        path = self._file(step)
        temporary = path.with_suffix(".new")
        write_tensors(temporary, [Stored.of(name, tensor) for name, tensor in tensors.items()])
        temporary.replace(path)
        file = TensorFile(path)
        path.with_suffix(".sum").write_text(checksum(file.bytes).hex())
        return file

    def load_step(self, step: int) -> None:
        """Load what the main process has put in for a step."""
        self._index(self._file(step))

    def finish(self, step: int) -> None:
        """Mark a step as finished, once every process has reached this call."""
        distributed.barrier()
        self.finished_steps = step + 1
        if self.directory is not None and distributed.is_main():
            mark = partial(write_text, self.directory / "finished", str(self.finished_steps))
            self._writer.submit(mark) if self._writer else mark()

    def close(self) -> None:
        """Mark the walk as complete: later runs read its results without walking."""
        self.flush()
        self.complete = True
        if self.directory is not None and distributed.is_main():
            write_text(self.directory / "complete", "")

    def _file(self, step: int) -> Path:
        assert self.directory is not None
        return self.directory / f"step-{step:05}.safetensors"

    def _index(self, path: Path) -> TensorFile:
        file = TensorFile(path)
        self._tensors |= dict.fromkeys(file.names, file)
        return file

    def with_prefix(self, prefix: str) -> Mapping[str, Tensor]:
        """The tensors whose names begin with ``prefix``, keyed by the rest of the name."""
        return _PrefixView(self, prefix)

    def __getitem__(self, name: str) -> Tensor:
        source = self._tensors[name]
        source = source.result() if isinstance(source, Future) else source
        return source if isinstance(source, Tensor) else source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Workspace:
    """The journals and states of one or several prunings of a checkpoint.

    Args:
        directory: directory of the journals; None for memory. Existing journals are resumed.
        states: place of the states between blocks: ``ram``, ``device``, or ``disk``, which needs a directory.
    """

    def __init__(self, directory: Path | None = None, states: str = "ram") -> None:
        self.directory, self.states = directory, states
        self._journals: dict[str, Journal] = {}

    def journal(self, key: str) -> Journal:
        """The journal under this key; prunings that share scores share a journal."""
        if key not in self._journals:
            self._journals[key] = Journal(self.directory / key if self.directory else None)
        return self._journals[key]

    def store(self, key: str) -> StateStore:
        """The store for the states of the walk under this key."""
        files = self.directory / "states" / key / str(distributed.rank()) if self.directory else None
        if self.states == "disk":
            return StateStore(files)
        if files:
            shutil.rmtree(files, ignore_errors=True)  # stale once this walk proceeds without them
        return StateStore(on_device=self.states == "device")


class _PrefixView(Mapping[str, Tensor]):
    def __init__(self, journal: Journal, prefix: str) -> None:
        self.journal, self.prefix = journal, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.journal[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.journal if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.prefix + name in self.journal._tensors


class StateStore:
    """Stores hidden states: in host memory, in memory-mapped files, or on the device that computed them.

    The system can drop the pages of mapped files from memory whenever it needs room.

    Args:
        directory: directory of the files; None for memory.
        on_device: whether the states stay on the device, which saves copies.
    """

    def __init__(self, directory: Path | None = None, *, on_device: bool = False) -> None:
        self.directory, self.on_device = directory, on_device
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def save(self, states: Tensor, name: str | None = None) -> Tensor:
        """Store a batch of states. A file with a name can be loaded later; one without is deleted with its tensor."""
        if self.directory is None:
            return states if self.on_device else states.cpu()
        path = self.directory / (name or uuid.uuid4().hex)
        stored = self._map(path, states.shape, states.dtype)
        stored.copy_(states)
        if name is None:
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.seek(stored.nbytes)
                file.write(checksum(stored))
        return stored

    def load(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Load the states stored under ``name``; None if there are none.

        Raises:
            ValueError: if the file is damaged.
        """
        if self.directory is None or not (self.directory / name).exists():
            return None
        path, length = self.directory / name, size.numel() * dtype.itemsize
        if path.stat().st_size == length + SIZE:  # mapping a shorter file would extend it
            stored = self._map(path, size, dtype)
            with path.open("rb") as file:
                file.seek(length)
                if file.read() == checksum(stored):
                    return stored
        raise ValueError(f"{path} is damaged")

    @staticmethod
    def _map(path: Path, size: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(path), shared=True, size=size.numel(), dtype=dtype).reshape(size)
