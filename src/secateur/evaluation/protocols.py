"""Named protocols of perplexity: texts, splits, how rows are joined and cut into windows.

``heldout`` reads splits that nothing is trained or calibrated on. ``paper-train-split`` follows the published scripts
of arXiv:2606.14150: it reads the beginning of *train* splits, joined to one text. Use it only beside the published
figures; WikiText-103's train split is also that study's calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.chat import begins_with_bos
from secateur.data.documents import Document, OnBadRow
from secateur.data.encode import encode_texts
from secateur.data.readers import FORMATS, TEXT_EXTENSIONS
from secateur.data.sources import Source, open_source
from secateur.data.tokenizer import encode_documents
from secateur.errors import RunError, UserError
from secateur.progress import notify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.evaluation.loss import Protocol

__all__ = ["PROTOCOLS", "SEQLEN", "WINDOWS", "Text", "text_protocol", "text_source"]

WINDOWS = 256  #: the most in a protocol
SEQLEN = 8192  #: tokens in a window, unless the model has fewer positions

_CHARACTERS = 8  # read for each token, at first


@dataclass(frozen=True)
class Text:
    """One text of a protocol."""

    name: str  #: of the measurement, e.g. ``heldout/c4``
    file: str  #: name of the file or subfolder in a local folder, without the ending
    hub: str  #: ``dataset:configuration`` on the Hugging Face Hub
    split: str
    field: str = "text"
    join: str | None = None  #: separator that joins rows to one text; None encodes each row as a document
    rows: int | None = None  #: the most that are read
    whole: bool = False  #: leave out a shorter last window
    note: str | None = None  #: warning for readers of the figure


_OVERLAP = "train split, as the published study reads it; it may overlap with calibration and training text"

PROTOCOLS: dict[str, tuple[Text, ...]] = {
    "heldout": (
        Text("heldout/c4", "c4", "allenai/c4:en", "validation"),
        Text("heldout/wikitext", "wikitext", "Salesforce/wikitext:wikitext-103-raw-v1", "test", join="\n\n"),
        Text("heldout/cnn_dailymail", "cnn_dailymail", "abisee/cnn_dailymail:3.0.0", "test", "article"),
    ),
    "paper-train-split": tuple(
        Text(f"paper-train-split/{file}", f"{file}-train", hub, "train", field, join, rows, True, _OVERLAP)
        for file, hub, field, join, rows in (
            ("c4", "allenai/c4:en", "text", " ", 8192),
            ("wikitext", "Salesforce/wikitext:wikitext-103-v1", "text", "\n\n", 32768),
            ("cnn_dailymail", "abisee/cnn_dailymail:3.0.0", "article", " ", 16384),
        )
    ),
}


def text_protocol(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | None = None,
    on_bad_row: OnBadRow | None = None,
    positions: int | None = None,
    windows: int = WINDOWS,
    seqlen: int = SEQLEN,
    stride: int | None = None,
) -> Protocol:
    """Cut a text into windows, in the tokens of a tokenizer.

    Args:
        data: a folder with ``<file>.txt``, ``.jsonl``, ..., or a folder ``<file>`` of such files; None for the Hub.
        on_bad_row: see :func:`secateur.data.sources.open_source`.
        positions: of the model, which limit the length of windows; None for no limit.
        stride: tokens from window to window; None for windows without overlap.

    Raises:
        UserError: if the text is missing, cannot be read or is too short.
    """
    from secateur.evaluation.loss import Protocol

    source = text_source(text, data, on_bad_row)
    used = min(seqlen, positions or seqlen)
    if used < seqlen:
        notify(f"{text.name}: windows have {used} tokens, as many as the model has positions")
    step = min(stride or used, used)
    limit = used + (windows - 1) * step
    rows = islice(source.documents(), text.rows)
    try:
        if text.join is None:
            stream = encode_documents(rows, tokenizer, limit)
        else:
            stream = _joined(rows, text.join, tokenizer, limit)
    except RunError as error:  # the Hub's
        raise RunError(f"{error}; or name a folder with {_names(text)} as `text_data`", error.code) from None
    source_name = text.hub if data is None else source.name
    return Protocol.of_stream(
        stream,
        used,
        source_name,
        stride=step,
        whole=text.whole,
        name=text.name,
        split=text.split,
        bos=begins_with_bos(tokenizer),
        note=text.note,
    )


def _joined(rows: Iterator[Document], join: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> NDArray[np.int64]:
    """Join rows to one text and encode it; rows beyond ``limit`` tokens are not read.

    The result names no documents: a row may be a line of an article.

    A token depends only on a few characters after it, so the first ``limit`` ids do not change if the text is cut
    some tokens later.
    """
    texts: list[str] = []
    characters, target = 0, _CHARACTERS * limit
    while True:
        more = False
        for row in rows:
            texts.append(row.text)
            characters += len(row.text) + len(join)
            if characters >= target:
                more = True
                break
        ids = encode_texts(tokenizer, [join.join(texts)])[0]
        if not more or len(ids) > limit + 16:
            return np.asarray(ids[:limit], dtype=np.int64)
        target *= 2


def text_source(text: Text, data: str | None, on_bad_row: OnBadRow | None = None) -> Source:
    """Open the source of a text; arguments and errors as in :func:`text_protocol`."""
    options: dict[str, Any] = {"default_field": text.field, "blank": text.join is not None, "on_bad_row": on_bad_row}
    if data is None:
        return open_source(f"hf:{text.hub}", split=text.split, **options)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"{data}: no such folder; name one that holds {_names(text)}")
    for name in (text.file, *(text.file + ending for ending in TEXT_EXTENSIONS)):
        if (folder / name).exists():
            return open_source(f"text:{folder / name}", **options)
    raise UserError(
        f"{folder}: holds no {_names(text)}, the {text.split} split of {text.hub} with its text in {text.field!r}; "
        "put it there, or leave out `text_data` to read it from the Hugging Face Hub"
    )


def _names(text: Text) -> str:
    return f"{text.file}{FORMATS.replace(' .', f' {text.file}.')}"
