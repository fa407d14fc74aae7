"""Build a study's corpus: read a source, train a tokenizer on the train documents, write token shards.

The source is read twice, because the tokenizer is needed before any document is encoded, and text is not stored.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from secateur import progress
from secateur.config import Count, Fraction, IdentityKey, Positive, spec
from secateur.data.build import TRAIN, Holdout, hash_splits, is_heldout, track_documents, write_splits
from secateur.data.chat import check_format
from secateur.data.conversations import RowFormat
from secateur.data.documents import OnBadRow
from secateur.data.encode import Encoder
from secateur.data.excerpts import Excerpts
from secateur.data.manifest import smallest_dtype, write_manifest
from secateur.data.shards import TokenStore
from secateur.data.sources import Source, open_source
from secateur.data.tokenizer import MIN_VOCABULARY, id_bound, load_tokenizer, train_tokenizer
from secateur.errors import UserError
from secateur.files import sha256_tree
from secateur.hub import local_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CorpusSpec", "build_corpus", "open_corpus"]


@spec
class CorpusSpec:
    """The source and tokenizer of a corpus.

    For ``field``, ``format``, ``on_bad_row`` and ``split`` see :func:`secateur.data.sources.open_source`.
    """

    source: str = "stdlib"
    field: str = "text"
    format: Annotated[RowFormat, IdentityKey(omit="text")] = "text"  # chat data has a format of its own
    on_bad_row: Annotated[OnBadRow, IdentityKey(omit="error")] = "error"
    split: str = "train"
    documents: Count | None = None  # maximal number to read, in the source's order; a stream can be endless
    #: characters of each document to read, at most: a stretch of it, whose place the hash of its text decides
    excerpt: Annotated[Count | None, IdentityKey(omit=None)] = None
    holdout: Fraction = 0.05  # share of documents held out, by hash of the text
    vocabulary: Positive = 2048  # size of the trained tokenizer and of the parent's embedding
    tokenizer: str | None = None  # a directory or a Hub model (org/name); None to train one
    seed: int = 0  # of the order of documents

    def __post_init__(self) -> None:
        for key in ("documents", "excerpt"):
            if self.source.startswith("shards:") and getattr(self, key) is not None:
                raise UserError(f"corpus.{key}: shards are read as they are; leave the key out, or name their text")
        if self.format != "text":
            self._check_chat()
        if self.tokenizer is None and self.vocabulary < MIN_VOCABULARY:
            raise UserError(
                f"corpus.vocabulary: {self.vocabulary} is too small for all bytes; make it {MIN_VOCABULARY} or more"
            )

    def _check_chat(self) -> None:
        if self.source.startswith("shards:"):
            raise UserError("corpus.format: shards are read as they are; leave the key out, or name their text")
        if self.excerpt is not None:
            raise UserError("corpus.excerpt: conversations are read whole; leave the key out")


def build_corpus(spec: CorpusSpec, out: Path) -> dict[str, Any]:
    """Write ``tokenizer/``, the shards of ``train`` and ``heldout`` and their manifest into the folder ``out``.

    The tokenizer is trained on the train documents only. Memory holds one document at a time, the distinct words for
    the tokenizer, and about a hundred bytes per document. Encoded documents are stored in ``out/checkpoints`` until
    the end; a killed build resumes from them.

    Returns:
        A JSON-able record, the same for the same spec and source: ``source``, ``source_sha256``, ``documents``,
        ``bytes``, ``tokens``, ``bytes_per_token`` and ``sha256`` (of the ids, see ``token_hash``), these five by
        split, and so of chat data ``targets``; ``duplicates`` (documents dropped), ``vocabulary`` and
        ``tokenizer_sha256``. Bytes are those of the UTF-8 text without duplicates.

    Raises:
        UserError: for a source that cannot be read, an empty split, or a vocabulary too large for the text.
    """
    source = open_corpus(spec)
    source = Excerpts(source, spec.excerpt) if spec.excerpt else source
    digest = source.digest()
    if spec.tokenizer is None:
        tokenizer = _train_tokenizer(source, spec)
    else:
        tokenizer = load_tokenizer(local_checkpoint(spec.tokenizer, weights=False))
    check_format(tokenizer, spec.format)
    tokenizer.save_pretrained(out / "tokenizer")
    vocabulary = id_bound(tokenizer)
    work = out / "checkpoints"
    built = write_splits(
        source,
        Encoder(
            tokenizer,
            vocabulary,
            smallest_dtype(vocabulary),
            spec.seed,
            chat=spec.format != "text",
            on_bad_row=spec.on_bad_row,
        ),
        out,
        work / "runs",
        holdout=_holdout(spec),
        documents=spec.documents,
    )
    write_manifest(out, vocabulary, built.splits, domains=built.domains, provenance={"source": source.name})
    sha256 = hash_splits(TokenStore(out))
    shutil.rmtree(work)
    tokens = {side: split.tokens for side, split in built.splits.items()}
    targets = {side: split.targets for side, split in built.splits.items()}
    return {
        "source": source.name,
        "source_sha256": digest,
        "documents": {side: split.documents for side, split in built.splits.items()},
        "duplicates": built.duplicates,
        "bytes": built.bytes,
        "tokens": tokens,
        **({"targets": targets} if spec.format != "text" else {}),
        "bytes_per_token": {side: size / tokens[side] for side, size in built.bytes.items()},
        "sha256": sha256,
        "vocabulary": vocabulary,
        "tokenizer_sha256": sha256_tree(out / "tokenizer"),
    }


def open_corpus(spec: CorpusSpec) -> Source:
    """Open the source of a corpus.

    Raises:
        UserError: if it cannot be read, or is chat data without a tokenizer that has a template.
    """
    if spec.format != "text" and spec.tokenizer is None:
        raise UserError("corpus.format: a tokenizer that a study trains has no chat template; set corpus.tokenizer")
    default = spec.format != "text" and spec.field == "text"
    field = None if default else spec.field
    return open_source(spec.source, field=field, format=spec.format, split=spec.split, on_bad_row=spec.on_bad_row)


def _train_tokenizer(source: Source, spec: CorpusSpec) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the distinct train documents."""
    with progress.track("train the tokenizer", spec.documents or source.size() or 0) as task:

        def texts() -> Iterator[str]:
            hashes: set[bytes] = set()
            empty = True
            for document in track_documents(source.documents(), task, spec.documents):
                key = hashlib.sha256(document.text.encode()).digest()
                if key[:16] in hashes:
                    continue
                hashes.add(key[:16])
                if not is_heldout(np.frombuffer(key[:8], dtype=">u8"), spec.holdout)[0]:
                    empty = False
                    yield document.text
            if empty:
                raise _holdout(spec).empty(TRAIN, len(hashes))

        return train_tokenizer(texts(), spec.vocabulary)


def _holdout(spec: CorpusSpec) -> Holdout:
    return Holdout(spec.holdout, "corpus.holdout")
