"""What a walk has found, block by block, and the states between blocks: in memory, or on disk."""

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
    """Tensors that were found, by name; on disk they are read when they are asked for.

    A step (a block, or a group of windows) is *finished* once all that comes of it is there. A run that was killed goes
    on behind the last finished one. Where a file is damaged, as its checksum tells, all begins anew, which is said. Of
    several processes only the first puts something in; a journal that the others shall read is a directory that they
    all see.

    Args:
        directory: where the tensors of each step are kept; None for memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.finished_steps = 0  #: steps that need not be done again
        self.complete = False  #: whether the walk came to its end
        self._held: dict[str, Tensor | TensorFile | Future[TensorFile]] = {}
        self._behind: AsyncWriter | None = None
        if directory is None:
            return
        if distributed.is_main():
            try:
                self._take_up(directory)
            except (FileNotFoundError, ValueError, SafetensorError) as error:
                notify(f"{directory}: begun anew, because what was kept there is damaged ({error})")
                shutil.rmtree(directory)
                self.finished_steps, self.complete, self._held = 0, False, {}
            directory.mkdir(parents=True, exist_ok=True)
        distributed.barrier()  # until the first process has looked at what is there
        if not distributed.is_main():
            self._take_up(directory)

    def _take_up(self, directory: Path) -> None:
        marker = directory / "finished"
        self.finished_steps = int(marker.read_text()) if marker.exists() else 0
        if self.finished_steps < 0:
            raise ValueError(f"{marker.name}: {self.finished_steps}")
        self.complete = (directory / "complete").exists()
        every = sorted(directory.glob("step-*.safetensors"))
        for path in every if self.complete else map(self._file, range(self.finished_steps)):
            file = self._index(path)
            if distributed.is_main() and path.with_suffix(".sum").read_text() != checksum(file.bytes).hex():
                raise ValueError(f"{path.name} is not as it was written")

    @contextlib.contextmanager
    def async_writes(self, device: str) -> Iterator[None]:
        """Let a thread write what is put in, behind what is computed on the device, where that pays.

        When the block ends all is on disk. What goes wrong in the thread is raised when the next step is put in, when
        what it should have written is asked for, or at the end.
        """
        if self.directory is None or not is_worthwhile(device):
            yield
            return
        self._behind = AsyncWriter(device)
        try:
            yield
            self.flush()
        finally:  # the thread is at rest before anyone tidies up
            self._behind.close()
            self._behind = None

    def flush(self) -> None:
        """Wait until all that was put in or noted is on disk."""
        if self._behind:
            self._behind.flush()

    def put(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was found in a step; no one may change it any more."""
        if self.directory is None:
            self._held |= {name: tensor.cpu() for name, tensor in tensors.items()}
        elif self._behind is None:
            self._held |= dict.fromkeys(tensors, self._write(step, tensors))
        else:
            self.flush()  # so that at most one step waits, and the memory that it takes is bounded
            sent = self._behind.copy_to_host(tensors)
            self._held |= dict.fromkeys(tensors, self._behind.submit(lambda: self._write(step, sent())))

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> TensorFile:
        path = self._file(step)
        fresh = path.with_suffix(".new")
        write_tensors(fresh, [Stored.of(name, tensor) for name, tensor in tensors.items()])
        fresh.replace(path)
        file = TensorFile(path)
        path.with_suffix(".sum").write_text(checksum(file.bytes).hex())
        return file

    def load_step(self, step: int) -> None:
        """Find here what the first process has put in, after it has."""
        self._index(self._file(step))

    def finish(self, step: int) -> None:
        """Note that all that comes of a step is there, once it is in every process."""
        distributed.barrier()
        self.finished_steps = step + 1
        if self.directory is not None and distributed.is_main():
            note = partial(write_text, self.directory / "finished", str(self.finished_steps))
            self._behind.submit(note) if self._behind else note()

    def close(self) -> None:
        """Note that the walk came to its end: what was found serves whoever asks for it again."""
        self.flush()
        self.complete = True
        if self.directory is not None and distributed.is_main():
            write_text(self.directory / "complete", "")

    def _file(self, step: int) -> Path:
        assert self.directory is not None
        return self.directory / f"step-{step:05}.safetensors"

    def _index(self, path: Path) -> TensorFile:
        file = TensorFile(path)
        self._held |= dict.fromkeys(file.names, file)
        return file

    def with_prefix(self, prefix: str) -> Mapping[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names."""
        return _Below(self, prefix)

    def __getitem__(self, name: str) -> Tensor:
        held = self._held[name]
        held = held.result() if isinstance(held, Future) else held
        return held if isinstance(held, Tensor) else held.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Workspace:
    """Where one or several prunings of a checkpoint keep what they find on the way.

    Args:
        directory: of the journals; None for memory. What is there already is taken up.
        states: where the states between blocks lie: ``ram``, ``disk``, which needs a directory, or ``device``.
    """

    def __init__(self, directory: Path | None = None, states: str = "ram") -> None:
        self.directory, self.states = directory, states
        self._journals: dict[str, Journal] = {}

    def journal(self, key: str) -> Journal:
        """What is found under this key; scores that serve several prunings have one."""
        if key not in self._journals:
            self._journals[key] = Journal(self.directory / key if self.directory else None)
        return self._journals[key]

    def store(self, key: str) -> StateStore:
        """Where the states of the walk under this key are held."""
        files = self.directory / "states" / key / str(distributed.rank()) if self.directory else None
        if self.states == "disk":
            return StateStore(files)
        if files:
            shutil.rmtree(files, ignore_errors=True)  # the walk goes on without them, and a later one must not
        return StateStore(on_device=self.states == "device")


class _Below(Mapping[str, Tensor]):
    def __init__(self, journal: Journal, prefix: str) -> None:
        self.journal, self.prefix = journal, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.journal[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.journal if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.prefix + name in self.journal._held


class StateStore:
    """Holds hidden states: in the host's memory, in files that are mapped into it, or where they were computed.

    Mapped files are no anonymous memory: the system may drop them from memory whenever it needs room.

    Args:
        directory: of the files; None for memory.
        on_device: whether they stay where they were computed, which saves copies.
    """

    def __init__(self, directory: Path | None = None, *, on_device: bool = False) -> None:
        self.directory, self.on_device = directory, on_device
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def save(self, states: Tensor, name: str | None = None) -> Tensor:
        """Keep a batch of states; a named file stays for :meth:`load`, one without a name goes with its tensor."""
        if self.directory is None:
            return states if self.on_device else states.cpu()
        path = self.directory / (name or uuid.uuid4().hex)
        held = self._map(path, states.shape, states.dtype)
        held.copy_(states)
        if name is None:
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.seek(held.nbytes)
                file.write(checksum(held))
        return held

    def load(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The states that were kept under a name; None where there are none.

        Raises:
            ValueError: if they are not what was kept: the file is damaged.
        """
        if self.directory is None or not (self.directory / name).exists():
            return None
        path, bytes_ = self.directory / name, size.numel() * dtype.itemsize
        if path.stat().st_size == bytes_ + SIZE:  # else to map it would lengthen it
            held = self._map(path, size, dtype)
            with path.open("rb") as file:
                file.seek(bytes_)
                if file.read() == checksum(held):
                    return held
        raise ValueError(f"{path} is damaged")

    @staticmethod
    def _map(path: Path, size: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(path), shared=True, size=size.numel(), dtype=dtype).reshape(size)
