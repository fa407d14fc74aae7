"""Encode documents to blocks of token ids.

Worker processes import this module, so it must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.data.chat import EncodedDocument, encode_conversation
from secateur.data.conversations import content_bytes
from secateur.data.documents import BadRow, Document, OnBadRow, skip_summary
from secateur.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ROW", "EncodedBlock", "Encoder", "Skipped", "encode_rows", "encode_texts", "hash_of_ids"]

#: A document. ``order``: first 16 bytes of its seeded hash; ``place``: its number in the source; ``hash``: first eight
#: bytes of the SHA-256 of its text; ``bytes``: length of its text; ``domain``: index of a name.
ROW = np.dtype(
    [("order", "<u8", (2,)), ("place", "<u8"), ("hash", "<u8"), ("tokens", "<u8"), ("bytes", "<u8"), ("domain", "<u2")]
)


@dataclass
class Skipped:
    """Conversations that were not encoded, since the chat template refuses them or nobody answers."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: str = ""  #: why the first one was not

    def add(self, error: BadRow) -> None:
        """Count one."""
        self.reasons[error.reason] += 1
        self.first = self.first or str(error)

    def update(self, more: Skipped) -> None:
        """Count those of another part."""
        self.reasons += more.reasons
        self.first = self.first or more.first

    def __str__(self) -> str:
        return f"{skip_summary(self.reasons)}, the first: {self.first}"


@dataclass(frozen=True)
class EncodedBlock:
    """Encoded documents: ``rows`` of dtype ROW, their concatenated ``ids``, and the names of their domains.

    Ids of conversations have a field ``target`` beside the field ``id``.
    """

    rows: NDArray[np.void]
    ids: NDArray[Any]
    domains: list[str]
    skipped: Skipped = field(default_factory=Skipped)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Encode documents as described in ``data/tokenizer.py``; returns int64 ids [tokens] for each."""
    if not texts:
        return []
    rows = tokenizer(
        list(texts),
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about documents longer than the context: they are cut into windows
    )["input_ids"]
    end = tokenizer.eos_token_id if tokenizer.num_special_tokens_to_add() == 0 else None
    suffix = [] if end is None else [end]
    return [np.array([*row, *suffix], dtype=np.int64) for row in rows]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    on_bad_row: OnBadRow = "error",
    targets: bool = True,
) -> tuple[list[tuple[Document, EncodedDocument]], Skipped]:
    """Encode documents with their targets, and count conversations that cannot be encoded.

    Args:
        on_bad_row: what becomes of such conversations.
        targets: whether conversations need targets, see :func:`secateur.data.chat.encode_conversation`.

    Raises:
        UserError: at the first such conversation, unless they are skipped.
    """
    skipped = Skipped()
    encoded: list[tuple[Document, EncodedDocument]] = []
    texts = iter(encode_texts(tokenizer, [d.text for d in documents if d.ids is None and d.format == "text"]))
    for document in documents:
        if document.ids is not None or document.format == "text":
            ids = next(texts) if document.ids is None else document.ids
            encoded.append((document, EncodedDocument(np.asarray(ids, dtype=np.int64))))
            continue
        try:
            encoded.append((document, encode_conversation(tokenizer, document, targets=targets)))
        except BadRow as error:
            if on_bad_row == "error":
                raise UserError(f"{error}, or set `on_bad_row` to skip such rows") from None
            skipped.add(error)
    return encoded, skipped


def hash_of_ids(ids: NDArray[np.integer]) -> bytes:
    """SHA-256 of the ids as little-endian uint32: identifies a document without text."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<u4").data).digest()


@dataclass(frozen=True)
class Encoder:
    """Encodes documents to a block; the result does not depend on the process.

    Args:
        vocabulary: ids are below it.
        seed: for the order of documents.
        chat: whether the documents are conversations, whose ids have targets.
        on_bad_row: what becomes of conversations that the chat template refuses.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    dtype: Literal["uint16", "uint32"]
    seed: int
    chat: bool = False
    on_bad_row: OnBadRow = "error"

    @property
    def block_dtype(self) -> np.dtype[Any]:
        """Type of a block's ids."""
        return np.dtype([("id", self.dtype), ("target", "?")] if self.chat else self.dtype)

    def __call__(self, documents: Sequence[Document]) -> EncodedBlock:
        """Encode and hash documents.

        Raises:
            UserError: for a document with an id outside the vocabulary, or a conversation that cannot be encoded.
        """
        for document in documents:
            if document.ids is not None:
                self._validate_ids(document)
        encoded, skipped = encode_rows(self.tokenizer, documents, on_bad_row=self.on_bad_row)
        data = [document.text.encode() for document, _ in encoded]
        digests = [
            hash_of_ids(document.ids) if document.ids is not None else hashlib.sha256(text).digest()
            for (document, _), text in zip(encoded, data, strict=True)
        ]
        seeded = [hashlib.sha256(f"{self.seed}:{digest.hex()}".encode()).digest() for digest in digests]
        names: dict[str, int] = {}
        rows = np.zeros(len(encoded), dtype=ROW)
        rows["order"] = np.frombuffer(b"".join(seeded), dtype=">u8").reshape(-1, 4)[:, :2]
        rows["hash"] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 4)[:, 0]
        rows["tokens"] = [len(row.ids) for _, row in encoded]
        rows["bytes"] = [content_bytes(json.loads(text)) if self.chat else len(text) for text in data]
        rows["domain"] = [names.setdefault(document.domain, len(names)) for document, _ in encoded]
        return EncodedBlock(rows, self._joined([row for _, row in encoded]), list(names), skipped)

    def _joined(self, rows: Sequence[EncodedDocument]) -> NDArray[Any]:
        """The ids of documents end to end, of :attr:`block_dtype`."""
        ids = np.concatenate([np.zeros(0, dtype=self.dtype), *(row.ids.astype(self.dtype) for row in rows)])
        if not self.chat:
            return ids
        joined = np.empty(len(ids), dtype=self.block_dtype)
        joined["id"] = ids
        masks = [row.targets if row.targets is not None else np.ones(len(row.ids), dtype=bool) for row in rows]
        joined["target"] = np.concatenate([np.zeros(0, dtype=bool), *masks])
        return joined

    def _validate_ids(self, document: Document) -> None:
        ids = document.ids
        assert ids is not None
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < self.vocabulary:
                raise UserError(
                    f"{document.id}: holds the id {extreme}, but the tokenizer's ids are 0 to {self.vocabulary - 1}; "
                    "name the tokenizer that made the ids"
                )
