"""How results leave a GPU: copied and written in a thread, behind the computation of the next block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur import distributed

__all__ = ["AsyncWriter", "is_worthwhile"]

_Done = TypeVar("_Done")


def is_worthwhile(device: str) -> bool:
    """Whether there is time to be won.

    On a CPU the thread would only take the cores from the computation; and of several processes all wait for what the
    first one writes, since they go on with it.
    """
    return device.startswith("cuda") and distributed.world_size() == 1


class AsyncWriter:
    """Does jobs in a thread, in the order in which they were given; after one that failed, none.

    Args:
        device: where the tensors are from; on a GPU they are copied on a stream of its own into page-locked memory, so
            that neither the host nor the kernels of the next block wait for them.
    """

    def __init__(self, device: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="written-behind")
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._last: Future[Any] | None = None

    def submit(self, job: Callable[[], _Done]) -> Future[_Done]:
        """Have a job done behind all that were given before."""
        before = self._last

        def in_turn() -> _Done:
            if before is not None:
                before.result()  # raises what it raised: a step must not be noted as finished without its file
            return job()

        self._last = done = self._thread.submit(in_turn)
        return done

    def flush(self) -> None:
        """Wait until all is done; raise what went wrong."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait until nothing is done any more, whether it went well or not."""
        self._thread.shutdown()

    def copy_to_host(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Give up tensors as the stream that is current will have left them: they may not be changed any more.

        Returns:
            What a job calls, once, to have them on the host; then they are held on the device no longer.
        """
        held, stream = dict(tensors), self._stream
        if stream is None:
            return lambda: held
        ready = torch.cuda.current_stream(stream.device).record_event()

        def arrive() -> dict[str, Tensor]:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                arrived = {name: _copied(tensor) for name, tensor in held.items()}
                stream.synchronize()  # holds up this thread alone; until then ``held`` keeps their memory from reuse
            held.clear()
            return arrived

        return arrive


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the host of what lies on a GPU, still under way; anything else as it is."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
