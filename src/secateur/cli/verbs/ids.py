"""The token ids that ``prune`` scores on and ``eval`` measures on: from text and a tokenizer, or from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.data.domains import document_stream, heldout_stream
from secateur.data.shards import TokenStore
from secateur.data.sources import open_source
from secateur.data.token_files import is_token_file, read_token_file
from secateur.data.tokenizer import Stream, check_vocabulary, encode_documents, load_tokenizer
from secateur.errors import UserError
from secateur.evaluation.loss import Protocol
from secateur.evaluation.protocols import begins_with_bos
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify
from secateur.pruning.pipeline import Calibration

__all__ = ["WINDOWS", "calibration_of", "protocol_of", "window_length"]

SEQLEN = 2048  #: tokens in a window, unless told otherwise
WINDOWS = 128  #: calibration windows at most, unless told otherwise


def calibration_of(
    checkpoint: Checkpoint, source: str, *, field: str | None, windows: int | None, seqlen: int | None
) -> Calibration:
    """The windows that scores are computed on; None stands for an option that was not given.

    Raises:
        UserError: if the source cannot be read, does not fit the model, or is shorter than one window.
    """
    if is_token_file(source):
        return Calibration(torch.from_numpy(_file(checkpoint, source, field, windows, seqlen)), source)
    most = windows or WINDOWS
    stream, length = _encoded(checkpoint, source, field, most * window_length(checkpoint, seqlen), seqlen)
    ids = stream.ids
    cut = ids[: ids.size // length * length].reshape(-1, length)
    if not len(cut):
        raise UserError(
            f"--calibration {source}: {ids.size} tokens are less than one calibration window of {length}; "
            "give more text or a smaller --seqlen"
        )
    if len(cut) < most:
        notify(f"the calibration text gives {len(cut)} windows of {length} tokens ({most} were asked)")
    return Calibration(torch.from_numpy(cut), source)


def protocol_of(
    checkpoint: Checkpoint,
    source: str,
    *,
    field: str | None,
    windows: int | None,
    seqlen: int | None,
    stride: int | None = None,
) -> Protocol:
    """The windows that a loss is measured on; None stands for an option that was not given.

    Raises:
        UserError: if the source cannot be read, does not fit the model, or has nothing to predict.
    """
    if is_token_file(source):
        return Protocol((torch.from_numpy(_file(checkpoint, source, field, windows, seqlen)),), source)
    used = window_length(checkpoint, seqlen)
    step = min(stride or used, used)
    limit = used + (windows - 1) * step if windows else None
    if source.startswith("shards:"):
        store = _shards(checkpoint, source)
        if windows and step == used:
            stream = heldout_stream(store, windows, used)
        else:  # windows that overlap follow each other
            stream = document_stream(
                store, "heldout", 0, min(limit or store.tokens("heldout"), store.tokens("heldout"))
            )
        return Protocol.of_stream(stream, used, source, stride=step, split="heldout")
    stream, _ = _encoded(checkpoint, source, field, limit, seqlen)
    bos = begins_with_bos(load_tokenizer(checkpoint.directory))
    return Protocol.of_stream(stream, used, source, stride=step, bos=bos)


def window_length(checkpoint: Checkpoint, seqlen: int | None) -> int:
    """Tokens in a window of text: what was asked, unless the model's positions end before."""
    length = seqlen or SEQLEN
    return min(length, max_positions(checkpoint.config) or length)


def _encoded(
    checkpoint: Checkpoint, source: str, field: str | None, tokens: int | None, seqlen: int | None
) -> tuple[Stream, int]:
    """The ids of a text, at most so many, and the length of a window.

    If that is not what was asked, it is said aloud, once nothing else is wrong.
    """
    length = seqlen or SEQLEN
    if length < 2:
        raise UserError("--seqlen: a window needs two tokens or more, one to see and one to predict")
    used = window_length(checkpoint, seqlen)
    opened = open_source(source, field=field or "text", besides=("tokens:FILE.npy",))
    tokenizer = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))
    stream = encode_documents(opened.documents(), tokenizer, tokens)
    if used < length:
        notify(f"windows of {used} tokens: the model has no more positions (--seqlen is {length})")
    return stream, used


def _shards(checkpoint: Checkpoint, source: str) -> TokenStore:
    """Token shards with held-out documents, that fit the model."""
    folder = Path(source.removeprefix("shards:"))
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{source}: holds no token shards; write them with `secateur data SOURCE {folder}`")
    store = TokenStore(folder)
    if store.vocabulary > checkpoint.shape.vocabulary:
        raise UserError(
            f"{source}: has ids up to {store.vocabulary - 1}, but the model's vocabulary is "
            f"{checkpoint.shape.vocabulary}; build the data with the model's tokenizer"
        )
    if "heldout" not in store.manifest.splits:
        raise UserError(f"{source}: holds no held-out documents; build it again with --holdout above 0")
    return store


def _file(
    checkpoint: Checkpoint, source: str, field: str | None, windows: int | None, seqlen: int | None
) -> NDArray[np.int64]:
    """All windows of a file of ids; options that would say otherwise do not apply, which is said aloud."""
    ids = read_token_file(source, vocabulary=checkpoint.shape.vocabulary, positions=max_positions(checkpoint.config))
    count, length = ids.shape
    said = {"--windows": windows not in (None, count), "--seqlen": seqlen not in (None, length), "--field": bool(field)}
    unused = [option for option, differs in said.items() if differs]
    if unused:
        notify(
            f"{source}: all its {count} windows of {length} tokens are used; {', '.join(unused)} does not apply to it"
        )
    return ids
