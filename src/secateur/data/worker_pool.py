"""Encode batches of documents in several processes, in order.

Each worker has its own pipe, shared with this process only. When this process ends, even by a kill, the worker reads
the end of the pipe and stops, so no orphans remain.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from secateur.data.documents import Document
from secateur.data.encode import EncodedBlock, Encoder
from secateur.errors import RunError, UserError
from secateur.runtime import without_main

__all__ = ["encode_in_workers"]

_AHEAD = 8  # batches queued for each worker, so that a long document does not block the other workers


def encode_in_workers(batches: Iterable[Sequence[Document]], encoder: Encoder, workers: int) -> Iterator[EncodedBlock]:
    """Yield the blocks of the batches in order; the number of workers does not change them.

    Args:
        batches: read a little ahead.
        workers: number of processes; 1 encodes in this process.

    Raises:
        UserError: raised by the batches or the encoder.
        RunError: if a worker was killed.
    """
    if workers == 1:
        yield from map(encoder, batches)
        return
    with _Workers(encoder, workers) as pool:
        pending: deque[Any] = deque()
        for batch in batches:
            pending.append(pool.submit(batch))
            if len(pending) == _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Workers:
    """A pool of encoding processes. For each, a thread sends a batch and waits for its block."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        self.processes: list[Any] = []
        self.idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(count)
        for _ in range(count):
            parent_end, worker_end = context.Pipe()
            process = context.Process(target=_work, args=(worker_end,), daemon=True)
            with without_main():
                process.start()
            worker_end.close()
            self.processes.append(process)
            self.threads.submit(self._send_encoder, parent_end, encoder)

    def _send_encoder(self, pipe: Connection, encoder: Encoder) -> None:
        """Send the encoder to a worker; as a process argument it would make the starts sequential."""
        with contextlib.suppress(OSError):  # the next request reports the failure
            pipe.send(encoder)
        self.idle.put(pipe)

    def submit(self, batch: Sequence[Document]) -> Any:
        """Return a future of the batch's block."""
        return self.threads.submit(self._encode, batch)

    def _encode(self, batch: Sequence[Document]) -> EncodedBlock:
        pipe = self.idle.get()
        try:
            pipe.send(batch)
            answer = pipe.recv()
        except (EOFError, OSError):
            pipe.close()  # it returns to the queue below, so that later requests fail and do not wait
            raise RunError(
                "`workers`: a worker process was killed, perhaps because memory ran out; run the same command again to "
                "continue, with fewer workers"
            ) from None
        finally:
            self.idle.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()  # its result is not needed, and it owns no files
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.join()
            process.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self.idle.get_nowait().close()


def _work(pipe: Connection) -> None:
    """Receive the encoder, then encode batches from the pipe until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process handles it
    with contextlib.suppress(EOFError, OSError):
        encoder = pipe.recv()
        while True:
            batch = pipe.recv()
            try:
                answer: EncodedBlock | Exception = encoder(batch)
            except UserError as error:
                answer = error
            except Exception:
                answer = RuntimeError(traceback.format_exc())
            pipe.send(answer)
