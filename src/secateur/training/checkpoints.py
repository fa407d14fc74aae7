"""Training checkpoints: sharded safetensors through DCP, whole or absent, loadable by another number of processes.

Each is a folder ``step-N`` with the processes' shards of weights and moments and, written last, ``state.json``: step,
tokens, curve and the hash of every shard, since DCP would read shards of another save without a word. A checkpoint is
written under another name and renamed when it is complete, so that a kill at any moment leaves the older one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from secateur import distributed
from secateur.errors import UserError
from secateur.files import read_json, sha256_file, sync_tree, write_json
from secateur.progress import notify

__all__ = ["FINISHED", "Saver"]

FINISHED = "checkpoints/step-*/state.json"  #: what a folder of work has once there is a checkpoint
_STATE, _WRITING = "state.json", "writing"
_FILE_BYTES, _FILES = 2**26, 64  #: a file of a shard holds so much, or more where there would be more of them
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Saver:
    """Saves and restores a run.

    Args:
        folder: where checkpoints lie; all processes see it.
        parameters: what is trained, by the names that it is saved under.
        optimizer: AdamW.
        keep: how many checkpoints stay, the newest.
        background: write while the run goes on; a checkpoint is complete at the next save or :meth:`finish`.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizer: optim.Optimizer,
        *,
        keep: int = 2,
        background: bool = False,
    ) -> None:
        self.folder, self.optimizer, self.keep, self.background = folder, optimizer, keep, background
        self.parameters = dict(parameters)
        self.last: Path | None = None  #: the newest complete checkpoint
        self.before = 0  #: steps of the optimizer in the run that this one continues
        self._waiting: tuple[Future[Any], dict[str, Any]] | None = None
        self._group: Any = None

    def save(self, state: dict[str, Any]) -> None:
        """Write weights, moments and ``state`` (plain values, among them ``step``); all processes together."""
        self.finish()
        work = self.folder / _WRITING
        if distributed.is_main():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        distributed.barrier()
        tensors = self._tensors()
        state = {**state, "curve": list(state.get("curve", ())), "before": self.before}
        writer = HuggingFaceStorageWriter(str(work), _files(tensors), save_distributed=True)
        if self.background:
            if self._group is None:  # of its own: the threads of a save must not meet the run's own messages
                distributed.ensure_group()
                self._group = torch.distributed.new_group(backend="gloo")
            written: Any = async_save(tensors, storage_writer=writer, process_group=self._group)
            self._waiting = (written, state)
            return
        with _quietly(), _plainly():
            save(tensors, storage_writer=writer, no_dist=distributed.world_size() == 1)
        self._complete(state)

    def finish(self) -> None:
        """Wait for what is being written behind the run."""
        if self._waiting:
            written, state = self._waiting
            self._waiting = None
            with _plainly():
                written.result()
            self._complete(state)

    def _complete(self, state: dict[str, Any]) -> None:
        """Hash the shards and let the checkpoint appear."""
        work, final = self.folder / _WRITING, self.folder / f"step-{state['step']:08}"
        distributed.barrier()
        hashes = _hashes(work)
        if distributed.is_main():
            write_json(work / _STATE, {**state, "hashes": hashes})
            sync_tree(work)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
            sync_tree(self.folder)
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old)
        distributed.barrier()
        self.last = final

    def load(self) -> dict[str, Any] | None:
        """Restore the newest undamaged checkpoint; return its state, None without one."""
        distributed.barrier()
        for found in sorted(self.folder.glob("step-*"), reverse=True):
            state = _undamaged(found)
            if state is None:
                notify(f"{found}: this checkpoint is damaged and passed over")
                continue
            self.before = state.pop("before")
            self._read(found, state["step"])
            self.last = found
            return state
        return None

    def begin(self, found: Path) -> None:
        """Take weights and moments, and nothing else, from the checkpoint of another run; all processes together.

        Raises:
            UserError: if it is damaged.
        """
        state = _undamaged(found)
        if state is None:
            raise UserError(f"{found}: this checkpoint is damaged; remove the folder of the run that made it")
        self.before = state["before"] + state["step"]
        self._read(found, 0)

    def _read(self, found: Path, step: int) -> None:
        """Weights and moments of a checkpoint, after so many steps of this run."""
        for parameter in self.parameters.values():
            moments = {key: torch.zeros_like(parameter.detach()) for key in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.before + step)), **moments}
        with _quietly(), _plainly():
            load(
                self._tensors(),
                storage_reader=HuggingFaceStorageReader(str(found)),
                no_dist=distributed.world_size() == 1,
            )

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"weight.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key in _MOMENTS:
                if (moments := self.optimizer.state[parameter]) and key in moments:
                    found[f"{key}.{name}"] = moments[key]
        return found


def _undamaged(found: Path) -> dict[str, Any] | None:
    """The state of a checkpoint whose files are those it was written with; None for any other."""
    try:
        state = read_json(found / _STATE)
        known, step = state.pop("hashes"), state["step"]
        there = isinstance(step, int) and isinstance(state["before"], int) and bool(known)
    except (UserError, LookupError, AttributeError, TypeError):
        there, state, known = False, {}, {}
    if not distributed.all_true(there):
        return None
    return state if _hashes(found) == known else None


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to: a file is made in memory before it is written."""
    most = max(_FILE_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // _FILES)
    numbers, held = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + held // most
        held += tensor.nbytes
    return numbers


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard: each process reads its part of them."""
    files = sorted(folder.glob("*.safetensors"))
    digests = torch.zeros(len(files), 32, dtype=torch.int64)
    for number in range(distributed.rank(), len(files), distributed.world_size()):
        digests[number] = torch.tensor(list(bytes.fromhex(sha256_file(files[number]))))
    return {
        file.name: bytes(row).hex() for file, row in zip(files, distributed.all_reduce(digests).tolist(), strict=True)
    }


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Raise what went wrong, such as a full disk: DCP wraps it in an exception that is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _quietly() -> warnings.catch_warnings:
    """DCP warns that it saves in one process, which is meant, and of its own use of torch."""
    caught = warnings.catch_warnings()
    warnings.simplefilter("ignore")
    return caught
