"""Build a corpus: read a source, hold documents out, train a tokenizer, write token shards.

Which side a document falls on, and its place there, follow from the hash of its text alone: neither the order of files
nor a library's random numbers can change them, and a document that occurs twice is never on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur import progress
from secateur.data.shards import ShardWriter, Split, TokenStore, smallest_dtype, write_manifest
from secateur.data.sources import Source, open_source
from secateur.data.tokenizer import batches, encode, id_bound, token_hash, train_tokenizer
from secateur.errors import UserError
from secateur.files import sha256_file
from secateur.spec import Count, Fraction, Positive, spec

__all__ = ["HELDOUT", "TRAIN", "CorpusSpec", "build_corpus"]

TRAIN, HELDOUT = "train", "heldout"


@spec
class CorpusSpec:
    """What to build a corpus from.

    ``field`` and ``split`` are those of :func:`secateur.data.sources.open_source`.
    """

    source: str = "stdlib"
    field: str = "text"
    split: str = "train"
    documents: Count | None = None  # at most so many are read, in the source's order; a stream can be endless
    holdout: Fraction = 0.05  # share of documents held out, by hash of the text
    vocabulary: Positive = 2048  # of the tokenizer that is trained
    seed: int = 0  # of the order of documents


def build_corpus(spec: CorpusSpec, out: Path) -> dict[str, Any]:
    """Write ``tokenizer/``, the shards of ``train`` and ``heldout`` and their manifest into the folder ``out``.

    The tokenizer learns from the train documents only. All text is held in memory.

    Returns:
        A JSON-able record, the same for the same spec and source: ``source``, ``source_sha256``, ``documents``,
        ``bytes``, ``tokens``, ``bytes_per_token`` and ``sha256`` (of the ids, see ``token_hash``), each of these five
        by split, ``duplicates`` (documents dropped), ``vocabulary`` and ``tokenizer_sha256``. Bytes are those of the
        kept documents' UTF-8 text.

    Raises:
        UserError: for a source that cannot be read, an empty side, or a vocabulary that the text cannot give.
    """
    source = open_source(spec.source, field=spec.field, split=spec.split)
    digest = source.digest()
    texts, duplicates = _read(source, spec.documents)
    sides = _sides(texts, spec)
    with progress.task("train the tokenizer", len(sides[TRAIN])) as task:
        tokenizer = train_tokenizer(_counted(sides[TRAIN], task), spec.vocabulary)
    tokenizer.save_pretrained(out / "tokenizer")
    vocabulary = id_bound(tokenizer)
    splits = {side: _write(out, side, documents, tokenizer, vocabulary) for side, documents in sides.items()}
    write_manifest(out, vocabulary, splits)
    store = TokenStore(out)
    size = {side: sum(len(text.encode()) for text in documents) for side, documents in sides.items()}
    return {
        "source": source.name,
        "source_sha256": digest,
        "documents": {side: split.documents for side, split in splits.items()},
        "duplicates": duplicates,
        "bytes": size,
        "tokens": {side: split.tokens for side, split in splits.items()},
        "bytes_per_token": {side: size[side] / split.tokens for side, split in splits.items()},
        "sha256": {side: token_hash(store.read(side, 0, store.tokens(side))) for side in splits},
        "vocabulary": vocabulary,
        "tokenizer_sha256": sha256_file(out / "tokenizer" / "tokenizer.json"),
    }


def _read(source: Source, limit: int | None) -> tuple[dict[str, str], int]:
    """The distinct texts by their SHA-256, and how many documents repeated one."""
    texts: dict[str, str] = {}
    read = 0
    total = limit or source.size()
    with progress.task(f"read {source.name}", total or 1) as task:
        for document in islice(source.documents(), limit):
            data = document.text.encode()
            texts.setdefault(hashlib.sha256(data).hexdigest(), document.text)
            read += 1
            # The size is that of the files, which may be compressed, so the bar stops at its end and waits there.
            amount = 1.0 if limit else min(len(data), task.total - task.done)
            task.advance(amount if total else 0.0, f"{read} documents")
    return texts, read - len(texts)


def _sides(texts: dict[str, str], spec: CorpusSpec) -> dict[str, list[str]]:
    """The texts of each side, in the order of the hash of their seeded hash."""
    order = sorted(texts, key=lambda key: hashlib.sha256(f"{spec.seed}:{key}".encode()).digest())
    sides: dict[str, list[str]] = {TRAIN: [], HELDOUT: []}
    for key in order:
        share = int(key[:16], 16) / 16**16  # uniform in [0, 1)
        sides[HELDOUT if share < spec.holdout else TRAIN].append(texts[key])
    for side, way in ((TRAIN, "lower"), (HELDOUT, "raise")):
        if not sides[side]:
            raise UserError(
                f"corpus.holdout: {spec.holdout} of {len(texts)} documents leaves no {side} document; "
                f"{way} it or name a source with more documents"
            )
    return sides


def _counted(texts: list[str], task: progress.Task) -> Iterator[str]:
    for text in texts:
        yield text
        task.advance()


def _write(out: Path, side: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Split:
    writer = ShardWriter(out, side, smallest_dtype(vocabulary))
    with progress.task(f"tokenize {side}", len(texts)) as task:
        for batch in batches(texts, 64):
            for ids in encode(tokenizer, batch):
                writer.append(ids)
            task.advance(len(batch), f"{writer.tokens} tokens")
    return writer.close()
