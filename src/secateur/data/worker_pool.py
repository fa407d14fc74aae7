"""Encode batches of documents in several processes, in order.

Each worker has a pipe of its own, whose other end no other process holds: when this process is gone, however it ended,
the worker reads the pipe's end and stops. So a killed run leaves nothing behind.
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

from secateur.data.encode import EncodedBlock, Encoder
from secateur.data.readers import Document
from secateur.errors import RunError, UserError
from secateur.runtime import without_main

__all__ = ["encode_in_workers"]

_AHEAD = 8  # batches for each worker that are read before their turn: one long document holds up no other worker


def encode_in_workers(batches: Iterable[Sequence[Document]], encoder: Encoder, workers: int) -> Iterator[EncodedBlock]:
    """The blocks of the batches, in their order, whatever the number of workers.

    Args:
        batches: are read a little ahead.
        encoder: what to do.
        workers: processes; with one, this process does it.

    Raises:
        UserError: what the batches or the encoder raise.
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
    """Processes that encode. A thread for each of those at work hands over a batch and waits for its block."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks as they happen to be
        self.processes: list[Any] = []
        self.idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(count)
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            with without_main():
                process.start()
            theirs.close()
            self.processes.append(process)
            self.threads.submit(self._equip, ours, encoder)

    def _equip(self, pipe: Connection, encoder: Encoder) -> None:
        """Hand over the encoder; as an argument of the process it would make each start wait for the one before."""
        with contextlib.suppress(OSError):  # whoever asks next is told
            pipe.send(encoder)
        self.idle.put(pipe)

    def submit(self, batch: Sequence[Document]) -> Any:
        """A future of the batch's block."""
        return self.threads.submit(self._ask, batch)

    def _ask(self, batch: Sequence[Document]) -> EncodedBlock:
        pipe = self.idle.get()
        try:
            pipe.send(batch)
            answer = pipe.recv()
        except (EOFError, OSError):
            pipe.close()  # and back it goes, so that the next one that takes it fails in its turn and does not wait
            raise RunError(
                "a worker process was killed, perhaps for want of memory; run the same command again to go on, "
                "with fewer --workers"
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
            process.terminate()  # nobody waits for what it may be at, and it holds nothing but memory
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.join()
            process.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self.idle.get_nowait().close()


def _work(pipe: Connection) -> None:
    """Encode what comes through the pipe until it ends; first comes the encoder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one tells
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
