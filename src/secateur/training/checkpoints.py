"""Training checkpoints: sharded safetensors through DCP, complete or absent, for any number of processes.

Each is a folder ``step-N`` with the processes' shards of weights and moments and, written last, ``state.json``: step,
tokens, curve and the hash of every shard, since DCP would read shards of another save without an error. A checkpoint
is written under another name and renamed when complete, so that a kill at any moment leaves the previous one.
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

FINISHED = "checkpoints/step-*/state.json"  #: pattern of the file that completes a checkpoint
_STATE, _WRITING = "state.json", "writing"
_FILE_BYTES, _FILES = 2**26, 64  #: size of a file, larger where there would be more than so many files
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Saver:
    """Saves and restores a run.

    Args:
        parameters: trained parameters by the names to save them under.
        background: write while training continues; a checkpoint is complete at the next save or :meth:`finish`.
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
        self.earlier_steps = 0  #: optimizer steps of the run that this one continues
        self._pending: tuple[Future[Any], dict[str, Any]] | None = None
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
        state = {**state, "curve": list(state.get("curve", ())), "before": self.earlier_steps}
        writer = HuggingFaceStorageWriter(str(work), _files(tensors), save_distributed=True)
        if self.background:
            if self._group is None:  # a group apart: the threads of a save must not mix with training messages
                distributed.ensure_group()
                self._group = torch.distributed.new_group(backend="gloo")
            future: Any = async_save(tensors, storage_writer=writer, process_group=self._group)
            self._pending = (future, state)
            return
        with _ignore_warnings(), _unwrap_errors():
            save(tensors, storage_writer=writer, no_dist=distributed.world_size() == 1)
        self._complete(state)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background."""
        if self._pending:
            future, state = self._pending
            self._pending = None
            with _unwrap_errors():
                future.result()
            self._complete(state)

    def _complete(self, state: dict[str, Any]) -> None:
        """Hash the shards and rename the folder to its final name."""
        work, final = self.folder / _WRITING, self.folder / f"step-{state['step']:08}"
        distributed.barrier()
        hashes = _hashes(work)
        if distributed.is_main():
            write_json(work / _STATE, {**state, "hashes": hashes})
            sync_tree(work)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
            sync_tree(self.folder)
            for expired in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(expired)
        distributed.barrier()
        self.last = final

    def load(self) -> dict[str, Any] | None:
        """Restore the newest undamaged checkpoint; return its state, None without one."""
        distributed.barrier()
        for checkpoint in sorted(self.folder.glob("step-*"), reverse=True):
            state = _read_state(checkpoint)
            if state is None:
                notify(f"{checkpoint}: this checkpoint is damaged; trying the previous one")
                continue
            self.earlier_steps = state.pop("before")
            self._read(checkpoint, state["step"])
            self.last = checkpoint
            return state
        return None

    def begin(self, checkpoint: Path) -> None:
        """Start from the weights and moments of another run's checkpoint; all processes together.

        Raises:
            UserError: if it is damaged.
        """
        state = _read_state(checkpoint)
        if state is None:
            raise UserError(f"{checkpoint}: this checkpoint is damaged; remove the folder of the run that made it")
        self.earlier_steps = state["before"] + state["step"]
        self._read(checkpoint, 0)

    def _read(self, checkpoint: Path, step: int) -> None:
        """Read weights and moments; ``step`` steps of this run are done."""
        for parameter in self.parameters.values():
            moments = {key: torch.zeros_like(parameter.detach()) for key in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.earlier_steps + step)), **moments}
        with _ignore_warnings(), _unwrap_errors():
            load(
                self._tensors(),
                storage_reader=HuggingFaceStorageReader(str(checkpoint)),
                no_dist=distributed.world_size() == 1,
            )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key in _MOMENTS:
                if (moments := self.optimizer.state[parameter]) and key in moments:
                    tensors[f"{key}.{name}"] = moments[key]
        return tensors


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The state of a checkpoint; None if its state or a shard is damaged."""
    try:
        state = read_json(checkpoint / _STATE)
        hashes, step = state.pop("hashes"), state["step"]
        complete = isinstance(step, int) and isinstance(state["before"], int) and bool(hashes)
    except (UserError, LookupError, AttributeError, TypeError):
        complete, state, hashes = False, {}, {}
    if not distributed.all_true(complete):
        return None
    return state if _hashes(checkpoint) == hashes else None


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of its file; files are small, since each is made in memory before it is written."""
    limit = max(_FILE_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // _FILES)
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // limit
        size += tensor.nbytes
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
def _unwrap_errors() -> Iterator[None]:
    """Raise the cause, such as a full disk, of DCP's ``CheckpointException``, which is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _ignore_warnings() -> warnings.catch_warnings:
    """Hide DCP's warnings about saving in one process, which is intended, and about its calls of torch."""
    caught = warnings.catch_warnings()
    warnings.simplefilter("ignore")
    return caught
