"""How the weights of blocks come to the device: in turn, or the next block's while the present one is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["on_demand", "prefetch"]

Loaded = Generator[dict[str, Tensor], None, None]  #: blocks' weights: the name within the block -> tensor
Read = Callable[[int], Mapping[str, Tensor]]  #: index of a block -> its tensors as they are stored


def on_demand(order: Sequence[int], read: Read, device: str, dtype: torch.dtype) -> Loaded:
    """Yield each block's weights on the device, when they are asked for. What is held is one block."""
    for index in order:
        yield {name: _sent(tensor, device, dtype) for name, tensor in read(index).items()}


def prefetch(order: Sequence[int], read: Read, device: str, dtype: torch.dtype) -> Loaded:
    """Yield each block's weights on the device, while a thread reads the next block and copies it there.

    On a GPU the copy has a stream of its own, from page-locked memory, so that neither the host nor the kernels of the
    present block wait for it. What is held is two blocks.

    Args:
        order: of the blocks' indices.
        read: gives a block's tensors as they are stored; called from the thread. What it raises is raised here, when
            that block is due.
        device: where to.
        dtype: of the weights there.
    """
    on_gpu = torch.device(device).type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None

    def fetch(index: int) -> tuple[dict[str, Tensor], torch.Event | None]:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            tensors = {name: _sent(tensor, device, dtype) for name, tensor in read(index).items()}
            return tensors, stream.record_event() if stream else None

    with ThreadPoolExecutor(1, thread_name_prefix="blocks-ahead") as thread:
        coming = thread.submit(fetch, order[0]) if order else None
        for following in [*order[1:], None]:
            if coming is None:
                return
            tensors, arrived = coming.result()
            coming = None if following is None else thread.submit(fetch, following)
            if arrived is not None:
                present = torch.cuda.current_stream(device)
                present.wait_event(arrived)
                for tensor in tensors.values():
                    tensor.record_stream(present)  # their memory must not be reused while its kernels read them
            given = [tensors]
            del tensors
            yield given.pop()  # so that none is held here when its block has been given up


def _sent(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A copy on the device: a stored tensor is a view into the mapped file, and blocks are pruned in place."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True).to(dtype)
    return tensor.to(device, dtype, copy=True)
