"""Loading the weights of blocks onto the device: on demand, or ahead in a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["on_demand", "prefetch"]

Loaded = Generator[dict[str, Tensor], None, None]  #: the weights of each block: name within the block -> tensor
Read = Callable[[int], Mapping[str, Tensor]]  #: index of a block -> its tensors as stored


def on_demand(order: Sequence[int], read: Read, device: str, dtype: torch.dtype) -> Loaded:
    """Yield each block's weights on the device, reading them when asked. Memory holds one block."""
    for index in order:
        yield {name: _copy(tensor, device, dtype) for name, tensor in read(index).items()}


def prefetch(order: Sequence[int], read: Read, device: str, dtype: torch.dtype) -> Loaded:
    """Yield each block's weights on the device, while a thread reads the next block and copies it there.

    The copy to a GPU uses a separate stream and page-locked memory, so that neither the host nor the kernels of the
    current block wait for it. Memory holds two blocks.

    Args:
        read: returns a block's tensors as stored; called in the thread. Its error is raised here, when that block is
            due.
    """
    on_gpu = torch.device(device).type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None

    def fetch(index: int) -> tuple[dict[str, Tensor], torch.Event | None]:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            tensors = {name: _copy(tensor, device, dtype) for name, tensor in read(index).items()}
            return tensors, stream.record_event() if stream else None

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        pending = thread.submit(fetch, order[0]) if order else None
        for next_index in [*order[1:], None]:
            if pending is None:
                return
            tensors, copy_event = pending.result()
            pending = None if next_index is None else thread.submit(fetch, next_index)
            if copy_event is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(copy_event)
                for tensor in tensors.values():
                    tensor.record_stream(current)  # their memory must not be reused while its kernels read them
            box = [tensors]
            del tensors
            yield box.pop()  # keeps no reference, so that the caller can free the block


def _copy(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A copy on the device: a stored tensor is a view into the mapped file, and blocks are pruned in place."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True).to(dtype)
    return tensor.to(device, dtype, copy=True)
