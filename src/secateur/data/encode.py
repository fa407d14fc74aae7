"""Encode documents to blocks of token ids.

Worker processes import this module, so it must not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.data.documents import Document
from secateur.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ROW", "EncodedBlock", "Encoder", "encode_texts", "hash_of_ids"]

#: A document. ``order``: first 16 bytes of its seeded hash; ``place``: its number in the source; ``hash``: first eight
#: bytes of the SHA-256 of its text; ``bytes``: length of its text; ``domain``: index of a name.
ROW = np.dtype(
    [("order", "<u8", (2,)), ("place", "<u8"), ("hash", "<u8"), ("tokens", "<u8"), ("bytes", "<u8"), ("domain", "<u2")]
)


@dataclass(frozen=True)
class EncodedBlock:
    """Encoded documents: ``rows`` of dtype ROW, their concatenated ``ids``, and the names of their domains."""

    rows: NDArray[np.void]
    ids: NDArray[np.unsignedinteger]
    domains: list[str]


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


def hash_of_ids(ids: NDArray[np.integer]) -> bytes:
    """SHA-256 of the ids as little-endian uint32: identifies a document without text."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<u4").data).digest()


@dataclass(frozen=True)
class Encoder:
    """Encodes documents to a block; the result does not depend on the process.

    Args:
        vocabulary: ids are below it.
        seed: for the order of documents.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    dtype: Literal["uint16", "uint32"]
    seed: int

    def __call__(self, documents: Sequence[Document]) -> EncodedBlock:
        """Encode and hash documents.

        Raises:
            UserError: for a document with an id outside the vocabulary.
        """
        texts = iter(encode_texts(self.tokenizer, [d.text for d in documents if d.ids is None]))
        arrays = [self._validate_ids(d) if d.ids is not None else next(texts) for d in documents]
        data = [document.text.encode() for document in documents]
        digests = [
            hash_of_ids(ids) if document.ids is not None else hashlib.sha256(text).digest()
            for document, text, ids in zip(documents, data, arrays, strict=True)
        ]
        seeded = [hashlib.sha256(f"{self.seed}:{digest.hex()}".encode()).digest() for digest in digests]
        names: dict[str, int] = {}
        rows = np.zeros(len(documents), dtype=ROW)
        rows["order"] = np.frombuffer(b"".join(seeded), dtype=">u8").reshape(-1, 4)[:, :2]
        rows["hash"] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 4)[:, 0]
        rows["tokens"] = [len(ids) for ids in arrays]
        rows["bytes"] = [len(text) for text in data]
        rows["domain"] = [names.setdefault(document.domain, len(names)) for document in documents]
        ids = np.concatenate([np.zeros(0, dtype=self.dtype), *(array.astype(self.dtype) for array in arrays)])
        return EncodedBlock(rows, ids, list(names))

    def _validate_ids(self, document: Document) -> NDArray[np.integer]:
        ids = document.ids
        assert ids is not None
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < self.vocabulary:
                raise UserError(
                    f"{document.id}: holds the id {extreme}, but the tokenizer's ids are 0 to {self.vocabulary - 1}; "
                    "name the tokenizer that made the ids"
                )
        return ids
