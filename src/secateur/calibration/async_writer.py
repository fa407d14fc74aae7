"""Writing results in a thread while the GPU computes the next block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur import distributed

__all__ = ["AsyncWriter", "is_worthwhile"]

_Result = TypeVar("_Result")


def is_worthwhile(device: str) -> bool:
    """Whether writing in a thread saves time.

    On a CPU the thread would compete with the computation for cores. With several processes, all wait for the files of
    the main one anyway.
    """
    return device.startswith("cuda") and distributed.world_size() == 1


class AsyncWriter:
    """Runs jobs in a thread, in order; after a failed job it runs no more.

    Args:
        device: the device of the tensors. From a GPU they are copied on a separate stream into page-locked memory, so
            that neither the host nor the kernels of the next block wait.
    """

    def __init__(self, device: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="async-writer")
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._last: Future[Any] | None = None

    def submit(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Queue a job behind all earlier ones."""
        previous = self._last

        def run() -> _Result:
            if previous is not None:
                previous.result()  # raises its error: a step must not be marked finished without its file
            return job()

        self._last = future = self._thread.submit(run)
        return future

    def flush(self) -> None:
        """Wait for all jobs; raise the error of a failed one."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait until the thread is idle, without raising errors."""
        self._thread.shutdown()

    def copy_to_host(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Prepare to copy tensors to the host, once the current stream has computed them. Do not change them any more.

        Returns:
            A function for a job to call once: it copies the tensors, frees them on the device and returns the copies.
        """
        sources, stream = dict(tensors), self._stream
        if stream is None:
            return lambda: sources
        ready = torch.cuda.current_stream(stream.device).record_event()

        def copy() -> dict[str, Tensor]:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                copies = {name: _copy_async(tensor) for name, tensor in sources.items()}
                stream.synchronize()  # blocks only this thread; until then ``sources`` keeps the memory from reuse
            sources.clear()
            return copies

        return copy


def _copy_async(tensor: Tensor) -> Tensor:
    """Start copying a GPU tensor to the host; return any other tensor unchanged."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
