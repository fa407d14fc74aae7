"""Several processes that prune or train together, as torchrun starts them, each with its share of the windows.

What they see is summed. The first one alone decides and writes; the others find what it decided in its journal. In one
process all of this does nothing, and torch.distributed is not imported.
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

_PATIENCE = timedelta(days=7)  # the others wait while the first one writes; torchrun ends them should it die


class ProcessLost(Exception):
    """Another process has ended, and with it the run."""


@dataclass(frozen=True)
class _Group:
    rank: int
    world: int
    store: Any  # a key-value store that all processes reach, even while others are in a collective operation


_group: _Group | None = None


def world_size() -> int:
    """How many processes there are."""
    return _group.world if _group else 1


def rank() -> int:
    """Which of them this is."""
    return _group.rank if _group else 0


def is_main() -> bool:
    """Whether this is the process that decides and writes."""
    return rank() == 0


def local_rank() -> tuple[int, int]:
    """Which of the processes on this machine this is, and how many there are."""
    if world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", rank())), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started beside this one while the block runs; all but the first keep quiet.

    Tensors on a GPU are summed by nccl, all others by gloo. After an exception the group is left as it is: to take it
    down would wait for processes that are elsewhere. :func:`exit_all` is the way out then.
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
    store, number, count = next(rendezvous("env://", timeout=_PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)
    _group = _Group(number, count, store)
    with contextlib.nullcontext() if is_main() else _quiet():
        yield
        barrier()
    distributed.destroy_process_group()
    _group = None


def ensure_group() -> None:
    """Where there are no others, be a group of one: what is sharded needs a group."""
    from torch import cuda, distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda.is_available() and distributed.is_nccl_available() else "gloo"
        store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(distributed.destroy_process_group)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from secateur import progress

    progress.set_listener(progress.SilentListener())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
    progress.close()


def exit_all(code: int, message: str) -> int:
    """Say on standard error why the run ends, unless another process has said why, and return the exit code.

    Of several processes each ends here and now, and torchrun ends those that wait for it.
    """
    if _group is None:
        print(message, file=sys.stderr)
        return code
    store = _group.store
    try:
        if store.add("ended", 1) == 1:
            print(message, file=sys.stderr, flush=True)
            store.set("told", "")
        # As soon as one is gone torchrun ends the others: let the one that tells do so, and the first one tidy up.
        _await("told", 10)
        if is_main():
            store.set("is_main", "")
        _await("is_main", 3)  # in vain if that one is elsewhere
    except RuntimeError:  # the store has gone with the process that held it
        pass
    sys.stdout.flush()
    os._exit(code)


def _await(key: str, seconds: float) -> None:
    assert _group is not None
    over = time.monotonic() + seconds
    while not _group.store.check([key]) and time.monotonic() < over:
        time.sleep(0.02)


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"process {rank()} has lost another one: {' '.join(str(error).split())[:200]}") from error


def shard(windows: Tensor, of: int | None = None) -> Tensor:
    """A process's part of the windows [windows, positions], maybe empty; none has more than the first one.

    Args:
        windows: of all processes.
        of: whose part; None for this one's.
    """
    return windows.tensor_split(world_size())[rank() if of is None else of]


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in its own place if it is contiguous."""
    if _group is None:
        return tensor
    from torch import distributed

    tensor = tensor.contiguous()
    with _all_there():
        distributed.all_reduce(tensor)
    return tensor


def sum_count(count: int) -> int:
    """Sum a number over all processes."""
    import torch

    return int(all_reduce(torch.tensor([count])))


def all_true(true: bool) -> bool:
    """Whether something holds in all processes."""
    return sum_count(int(true)) == world_size()


def gather_texts(texts: Mapping[int, str], count: int) -> list[str]:
    """Bring together texts by their numbers, of which each process has some and no two have the same.

    Args:
        texts: of this process.
        count: how many there are in all processes.
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
    every = bytes(all_reduce(letters).tolist())
    return [every[start:stop].decode() for start, stop in zip(starts, stops, strict=True)]


def barrier() -> None:
    """Wait until all processes have come here."""
    if _group:
        sum_count(0)


def broadcast(tensor: Tensor) -> Tensor:
    """Give a contiguous tensor the values that it has in the first process."""
    if _group is None:
        return tensor
    from torch import distributed

    with _all_there():
        distributed.broadcast(tensor, 0)
    return tensor


def like_main(tensor: Tensor | None, device: str) -> Tensor:
    """The tensor, or, in a process that has none, zeros of the size and type that it has in the first one."""
    import torch

    types, told = (torch.float32, torch.float64), torch.zeros(8, dtype=torch.int64)
    if tensor is not None:
        seen = [types.index(tensor.dtype), tensor.dim(), *tensor.shape]
        told[: len(seen)] = torch.tensor(seen)
    kind, dimensions, *size = broadcast(told).tolist()
    return torch.zeros(size[:dimensions], dtype=types[kind], device=device) if tensor is None else tensor


def require_equal(what: str, digest: str) -> None:
    """Refuse to go on where another process was given something else.

    Args:
        what: it is.
        digest: in hexadecimal, of what this process was given.

    Raises:
        UserError: in every process.
    """
    import torch

    mine = torch.tensor(list(bytes.fromhex(digest)))
    if not all_true(torch.equal(broadcast(mine.clone()), mine)):
        raise UserError(f"{what} is not the same in all processes; give each the same files")
