"""Windows of token ids for scoring and measuring: from text and a tokenizer, from shards, or from a file of ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.data.chat import begins_with_bos, check_format
from secateur.data.conversations import RowFormat
from secateur.data.documents import Document, OnBadRow
from secateur.data.domains import document_stream, heldout_stream
from secateur.data.encode import encode_rows
from secateur.data.shards import TokenStore
from secateur.data.sources import open_source
from secateur.data.token_files import is_token_file, read_token_file
from secateur.data.tokenizer import Stream, batches, check_ids, encode_documents, load_tokenizer
from secateur.data.tokenizer_match import check_encoded_for
from secateur.errors import UserError
from secateur.evaluation.loss import Protocol
from secateur.formatting import every, plural
from secateur.hub import local_checkpoint
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CALIBRATION_WINDOWS",
    "calibration_windows",
    "check_shards",
    "clipped_length",
    "document_windows",
    "heldout_protocol",
    "open_shards",
    "report_idle_fields",
    "window_length",
]

SEQLEN = 2048  #: default tokens in a window
CALIBRATION_WINDOWS = 128  #: default number of calibration windows, at most


def calibration_windows(
    checkpoint: Checkpoint,
    source: str | Iterable[str],
    *,
    field: str | None = None,
    format: RowFormat | None = None,
    on_bad_row: OnBadRow | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> torch.Tensor:
    """Cut calibration text into windows: int64 ids [windows, positions].

    Conversations lie end to end, as other documents do, and all of their tokens count. One that ends with the user's
    turn gets the prompt that asks for an answer.

    Args:
        checkpoint: the model whose vocabulary and positions apply.
        source: a source of text, ``tokens:FILE.npy``, or texts.
        field: the text's field where records have fields; None for ``text``, or ``messages``.
        format: of the records, see :func:`secateur.data.sources.open_source`.
        on_bad_row: what becomes of a record that is malformed or not text; None for ``error``.
        windows: the most windows; None for :data:`CALIBRATION_WINDOWS`.
        seqlen: tokens in a window; None for :data:`SEQLEN`.
        tokenizer: None for the checkpoint's own.

    Raises:
        UserError: if the source cannot be read, does not fit the model, or is shorter than one window.
    """
    fields: dict[str, Any] = {"field": field, "format": format, "on_bad_row": on_bad_row}
    if isinstance(source, str) and is_token_file(source):
        return torch.from_numpy(_read_file(checkpoint, source, windows, seqlen, **fields))
    limit = windows or CALIBRATION_WINDOWS
    tokens = limit * window_length(checkpoint, seqlen)
    stream, length, _ = _encode(checkpoint, source, tokens, seqlen, tokenizer, targets=False, **fields)
    ids = stream.ids
    cut = ids[: ids.size // length * length].reshape(-1, length)
    if not len(cut):
        raise UserError(
            f"`calibration`: {plural(ids.size, 'token')}, less than one calibration window of {length}; give more "
            "text or a smaller `seqlen`"
        )
    if len(cut) < limit:
        notify(f"the calibration text gives {plural(len(cut), 'window')} of {length} tokens, fewer than {limit}")
    return torch.from_numpy(cut)


def document_windows(
    checkpoint: Checkpoint,
    source: str,
    *,
    field: str | None,
    format: RowFormat | None = None,
    on_bad_row: OnBadRow | None = None,
    windows: int,
    seqlen: int,
    seed: int,
) -> torch.Tensor:
    """Cut one window from each of the first documents that are longer than a window: int64 ids [windows, positions].

    Args:
        seed: draws the place of each window within its document.

    Raises:
        UserError: if the source cannot be read, does not fit the model, or no document is longer than a window.
    """
    length, generator = clipped_length(checkpoint, seqlen), np.random.default_rng(seed)
    tokenizer = load_tokenizer(checkpoint.directory)
    check_format(tokenizer, format)
    rows: list[NDArray[np.int64]] = []
    for batch in batches(open_source(source, field=field, format=format, on_bad_row=on_bad_row).documents(), 16):
        for _, document in encode_rows(tokenizer, batch, on_bad_row=on_bad_row or "error", targets=False)[0]:
            ids = document.ids
            if len(ids) > length and len(rows) < windows:
                start = int(generator.integers(len(ids) - length))
                rows.append(ids[start : start + length])
                check_ids(rows[-1], checkpoint.shape.vocabulary, tokenizer, str(checkpoint.directory))
        if len(rows) == windows:
            break
    if not rows:
        raise UserError(f"`calibration`: no document of {source} is longer than {length} tokens; lower `seqlen`")
    if len(rows) < windows:
        notify(f"{source} has {plural(len(rows), 'document')} longer than {length} tokens, fewer than {windows}")
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def heldout_protocol(
    checkpoint: Checkpoint,
    source: str,
    *,
    field: str | None = None,
    format: RowFormat | None = None,
    on_bad_row: OnBadRow | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
) -> Protocol:
    """Cut held-out text into the windows that a loss is measured on; None stands for a default.

    Raises:
        UserError: if the source cannot be read, does not fit the model, or has nothing to predict.
    """
    fields: dict[str, Any] = {"field": field, "format": format, "on_bad_row": on_bad_row}
    if is_token_file(source):
        return Protocol((torch.from_numpy(_read_file(checkpoint, source, windows, seqlen, **fields)),), source)
    length = window_length(checkpoint, seqlen)
    step = min(stride or length, length)
    limit = length + (windows - 1) * step if windows else None
    if source.startswith("shards:"):
        report_idle_fields(source, **fields)
        store = open_shards(source, "data", checkpoint.shape.vocabulary)
        check_encoded_for(checkpoint.directory, store.tokenizer, source, "`data`")
        clipped_length(checkpoint, seqlen)
        if "heldout" not in store.manifest.splits:
            raise UserError(f"{source}: holds no held-out documents; build it again with a `holdout` above 0")
        if windows and step == length:
            stream = heldout_stream(store, windows, length)
        else:  # windows that overlap must follow each other
            tokens = store.tokens("heldout")
            stream = document_stream(store, "heldout", 0, min(limit or tokens, tokens))
        return Protocol.of_stream(stream, length, source, stride=step, split="heldout")
    stream, _, tokenizer = _encode(checkpoint, source, limit, seqlen, None, **fields)
    return Protocol.of_stream(stream, length, source, stride=step, bos=begins_with_bos(tokenizer))


def window_length(checkpoint: Checkpoint, seqlen: int | None) -> int:
    """Tokens in a window: ``seqlen`` or the default, at most the model's positions."""
    length = seqlen or SEQLEN
    return min(length, max_positions(checkpoint.config) or length)


def clipped_length(checkpoint: Checkpoint, seqlen: int | None) -> int:
    """Return the window length, and say so where the model's positions shorten it."""
    request, length = seqlen or SEQLEN, window_length(checkpoint, seqlen)
    if length < request:
        notify(f"windows of {length} tokens instead of {request}: the model has no more positions (`seqlen`)")
    return length


def open_shards(source: str, field: str, vocabulary: int | None = None) -> TokenStore:
    """Open the token shards that ``shards:DIR`` names.

    Args:
        vocabulary: of the model, which the shards' ids must be below; None to leave it unchecked.

    Raises:
        UserError: if there are none, or they were built with a larger vocabulary.
    """
    scheme, _, path = source.partition(":")
    if scheme != "shards" or not path:
        raise UserError(f"`{field}`: {source!r} is not shards:DIR, a folder that `secateur data` has written")
    if not (Path(path) / "manifest.json").is_file():
        raise UserError(f"`{field}`: {source} holds no token shards; write them with `secateur data SOURCE {path}`")
    store = TokenStore(Path(path))
    if vocabulary is not None:
        check_shards(store, source, field, vocabulary)
    return store


def report_idle_fields(source: str, **fields: Any) -> None:
    """Print which of the fields are set, although shards hold no records."""
    if idle := [f"`{name}`" for name, value in fields.items() if value is not None]:
        notify(f"{source}: {', '.join(idle)} does not apply to token shards")


def check_shards(store: TokenStore, source: str, field: str, vocabulary: int) -> None:
    """Refuse shards with ids that a model of this vocabulary has not."""
    if store.vocabulary > vocabulary and (largest := store.largest_id) >= vocabulary:
        raise UserError(
            f"`{field}`: {source} has ids up to {largest}, but the model's vocabulary is {vocabulary}; "
            "build the data with the model's tokenizer, from text without tokens that the model lacks"
        )


def _encode(
    checkpoint: Checkpoint,
    source: str | Iterable[str],
    limit: int | None,
    seqlen: int | None,
    tokenizer: Any,
    *,
    targets: bool = True,
    **fields: Any,
) -> tuple[Stream, int, PreTrainedTokenizerBase]:
    """Encode at most ``limit`` tokens of text; return the stream, the window length and the tokenizer.

    Args:
        targets: whether to mark the targets of conversations.
        fields: ``field``, ``format`` and ``on_bad_row`` of a source.
    """
    length = seqlen or SEQLEN
    if length < 2:
        raise UserError("`seqlen`: a window needs two tokens or more, one to see and one to predict")
    documents = (
        open_source(source, besides=("tokens:FILE.npy",), **fields).documents()
        if isinstance(source, str)
        else (Document(f"text {number}", text) for number, text in enumerate(source))
    )
    tokenizer = tokenizer or load_tokenizer(local_checkpoint(checkpoint.directory, weights=False))
    check_format(tokenizer, fields["format"])
    stream = encode_documents(documents, tokenizer, limit, on_bad_row=fields["on_bad_row"], targets=targets)
    check_ids(stream.ids, checkpoint.shape.vocabulary, tokenizer, str(checkpoint.directory))
    return stream, clipped_length(checkpoint, seqlen), tokenizer


def _read_file(
    checkpoint: Checkpoint, source: str, windows: int | None, seqlen: int | None, **fields: Any
) -> NDArray[np.int64]:
    """Read all windows of a file of ids, and report the options that do not apply to it."""
    positions = max_positions(checkpoint.config)
    ids = read_token_file(source, vocabulary=checkpoint.shape.vocabulary, positions=positions)
    count, length = ids.shape
    differs = {"windows": windows not in (None, count), "seqlen": seqlen not in (None, length)}
    differs |= {name: value is not None for name, value in fields.items()}
    if unused := [name for name, differ in differs.items() if differ]:
        names = ", ".join(f"`{name}`" for name in unused)
        notify(f"{source}: uses {every(count, 'window')} of {length} tokens; {names} does not apply to it")
    return ids
