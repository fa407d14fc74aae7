"""The directory that a verb writes, whole or unfinished, where several processes may work on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.config import fingerprint
from secateur.files import BLOCKS, partial_directories, resumable_directory

__all__ = ["shared_directory"]


@contextlib.contextmanager
def shared_directory(
    out: Path,
    asked: dict[str, Any],
    what: str,
    *,
    resume: bool,
    begun: str = BLOCKS,
    words: Mapping[str, str] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Those of :func:`resumable_directory`, made and put in place by the first process; the others read in them.

    Args:
        out: to be written.
        asked: for what, the same in all processes.
        what: to call it in an error.
        resume: whether to go on with an unfinished run.
        begun: files by which one is known.
        words: what a key of ``asked`` is called before people.
    """
    distributed.require_equal(what, fingerprint(asked))
    theirs = contextlib.nullcontext(partial_directories(out))
    ours = resumable_directory(out, asked, resume=resume, begun=begun, words=words)
    with ours if distributed.is_main() else theirs as found:
        distributed.barrier()  # until they are there
        yield found
        distributed.barrier()  # until none reads in them any more
