"""Data parallelism over the processes that torchrun starts: each works on its share of the windows.

Statistics and gradients are summed over processes. Rank 0 alone decides and writes; other ranks read its decisions from
the journal. With a single process these functions do nothing and torch.distributed is not imported.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ProcessLost",
    "all_reduce",
    "all_true",
    "barrier",
    "broadcast",
    "ensure_group",
    "exit_all",
    "gather_texts",
    "is_main",
    "like_main",
    "local_rank",
    "process_group",
    "rank",
    "require_equal",
    "shard",
    "sum_count",
    "world_size",
]

_TIMEOUT = timedelta(days=7)  # other ranks wait while rank 0 writes; torchrun ends them if it dies


class ProcessLost(Exception):
    """Raised when another process has ended, which ends the run."""


@dataclass(frozen=True)
class _Group:
    rank: int
    world: int
    store: Any  # key-value store, usable while other processes are in a collective operation


_group: _Group | None = None


def world_size() -> int:
    """Number of processes."""
    return _group.world if _group else 1


def rank() -> int:
    """Number of this process, from 0."""
    return _group.rank if _group else 0


def is_main() -> bool:
    """Whether this is rank 0, the process that decides and writes."""
    return rank() == 0


def local_rank() -> tuple[int, int]:
    """Number of this process among those on this machine, and their count."""
    if world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", rank())), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join torchrun's process group while the block runs; all ranks but 0 print nothing.

    Tensors on a GPU are reduced by nccl, others by gloo. After an exception the group is not destroyed, because that
    would wait for the other processes; end the process with :func:`exit_all`.
    """
    global _group
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if _group or not all(name in os.environ for name in names) or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    on_gpu = torch.cuda.is_available() and distributed.is_nccl_available()
    store, number, count = next(rendezvous("env://", timeout=_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_TIMEOUT)
    _group = _Group(number, count, store)
    with contextlib.nullcontext() if is_main() else _silence():
        yield
        barrier()
    distributed.destroy_process_group()
    _group = None


def ensure_group() -> None:
    """Create a group of one process if there is none: sharded tensors need a group."""
    from torch import cuda, distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda.is_available() and distributed.is_nccl_available() else "gloo"
        store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(distributed.destroy_process_group)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    from secateur import progress

    progress.set_listener(progress.SilentListener())
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
    progress.close()


def exit_all(code: int, message: str) -> int:
    """Print why the run ends, unless another process already has, and return the exit code.

    With several processes this one ends immediately, and torchrun ends the processes that wait for it.
    """
    if _group is None:
        print(message, file=sys.stderr)
        return code
    store = _group.store
    try:
        if store.add("ended", 1) == 1:
            print(message, file=sys.stderr, flush=True)
            store.set("message_printed", "")
        # torchrun ends all processes once one has ended: first wait for the message and for rank 0 to clean up.
        _wait_for("message_printed", 10)
        if is_main():
            store.set("main_done", "")
        _wait_for("main_done", 3)  # times out if rank 0 is in a collective operation
    except RuntimeError:  # the process that hosts the store has ended
        pass
    sys.stdout.flush()
    os._exit(code)


def _wait_for(key: str, seconds: float) -> None:
    assert _group is not None
    deadline = time.monotonic() + seconds
    while not _group.store.check([key]) and time.monotonic() < deadline:
        time.sleep(0.02)


@contextlib.contextmanager
def _report_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"process {rank()} has lost contact with another process: {' '.join(str(error).split())[:200]}"
        ) from error


def shard(windows: Tensor, of: int | None = None) -> Tensor:
    """Return a rank's part of the windows [windows, positions], possibly empty; no part is larger than rank 0's.

    Args:
        windows: of all processes.
        of: the rank; None for this process.
    """
    return windows.tensor_split(world_size())[rank() if of is None else of]


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place if it is contiguous."""
    if _group is None:
        return tensor
    from torch import distributed

    tensor = tensor.contiguous()
    with _report_lost_process():
        distributed.all_reduce(tensor)
    return tensor


def sum_count(count: int) -> int:
    """Sum a number over all processes."""
    import torch

    return int(all_reduce(torch.tensor([count])))


def all_true(true: bool) -> bool:
    """Whether ``true`` is true in all processes."""
    return sum_count(int(true)) == world_size()


def gather_texts(texts: Mapping[int, str], count: int) -> list[str]:
    """Gather texts from all processes, in the order of their numbers.

    Args:
        texts: number -> text; no two processes have the same number.
    """
    import torch

    packed = {number: text.encode() for number, text in texts.items()}
    sizes = torch.zeros(count, dtype=torch.int64)
    for number, data in packed.items():
        sizes[number] = len(data)
    stops = all_reduce(sizes).cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    letters = torch.zeros(stops[-1] if stops else 0, dtype=torch.uint8)
    for number, data in packed.items():
        letters[starts[number] : stops[number]] = torch.tensor(list(data), dtype=torch.uint8)
    data = bytes(all_reduce(letters).tolist())
    return [data[start:stop].decode() for start, stop in zip(starts, stops, strict=True)]


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if _group:
        sum_count(0)


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a contiguous tensor with its values in rank 0."""
    if _group is None:
        return tensor
    from torch import distributed

    with _report_lost_process():
        distributed.broadcast(tensor, 0)
    return tensor


def like_main(tensor: Tensor | None, device: str) -> Tensor:
    """Return the tensor, or in a process without one, zeros of its shape and dtype in rank 0."""
    import torch

    dtypes, header = (torch.float32, torch.float64), torch.zeros(8, dtype=torch.int64)
    if tensor is not None:
        values = [dtypes.index(tensor.dtype), tensor.dim(), *tensor.shape]
        header[: len(values)] = torch.tensor(values)
    dtype, dimensions, *size = broadcast(header).tolist()
    return torch.zeros(size[:dimensions], dtype=dtypes[dtype], device=device) if tensor is None else tensor


def require_equal(subject: str, digest: str) -> None:
    """Check that all processes have the same input.

    Args:
        digest: hash of this process's input, in hexadecimal.

    Raises:
        UserError: in every process, if one differs.
    """
    import torch

    local = torch.tensor(list(bytes.fromhex(digest)))
    if not all_true(torch.equal(broadcast(local.clone()), local)):
        raise UserError(f"{subject} is not the same in all processes; give each the same files")
