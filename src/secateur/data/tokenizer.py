"""Tokenizers: train one, load one, turn documents into ids by one rule.

A document is encoded as its tokenizer does by default (Llama's puts BOS first). Where a tokenizer adds no special token
by itself (GPT-2's, Qwen's), its EOS, if it has one, closes each document, so that documents never run together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from secateur import progress
from secateur.data.encode import encode_texts
from secateur.data.readers import Document
from secateur.errors import UserError

if TYPE_CHECKING:  # `transformers` takes seconds to import; only the functions that need it pay for it
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = [
    "END",
    "Stream",
    "batches",
    "check_vocabulary",
    "encode_documents",
    "encode_stream",
    "id_bound",
    "load_tokenizer",
    "token_hash",
    "token_hash_of",
    "train_tokenizer",
]

T = TypeVar("T")

END = "<|endoftext|>"
_SMALLEST = 257  # every byte, and END


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; the same texts, in any order, give the same tokenizer.

    Its one special token ``<|endoftext|>`` has id 0, is BOS and EOS, and is put before each document.

    Args:
        texts: what to learn from, read once.
        vocabulary: how many tokens it shall have, bytes and the special token included.

    Raises:
        UserError: if ``vocabulary`` is below 257, or more than the texts can give.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < _SMALLEST:
        raise UserError(f"a vocabulary of {vocabulary} is too small for all bytes; make it {_SMALLEST} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocabulary:
        raise UserError(
            f"the text gives only {reached} tokens, not a vocabulary of {vocabulary}; "
            f"lower the vocabulary to {reached} or name more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a local checkpoint's directory; code in the checkpoint is not run.

    Raises:
        UserError: if there is no directory, no tokenizer in it, or a broken one.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name a local checkpoint or tokenizer")
    if not any(directory.glob("*token*")) and not any(directory.glob("*vocab*")):
        raise UserError(f"{directory}: has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        works = bool(tokenizer("a", add_special_tokens=False)["input_ids"])
    except Exception as error:  # a damaged file surfaces as any class, a bare Exception from Rust among them
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"{directory}: its tokenizer cannot be loaded ({type(error).__name__}: {first}); restore its files"
        ) from None
    if not works:  # transformers builds an empty tokenizer where the vocabulary's file is missing
        raise UserError(f"{directory}: its tokenizer has no vocabulary; copy tokenizer.json into it")
    for key in ("is_local", "local_files_only"):  # how it was loaded is no property of a tokenizer that is saved again
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def id_bound(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that the tokenizer can produce; ids may have gaps, so this is not their count."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Check that an embedding of ``vocab_size`` rows has one for every id of the tokenizer.

    Raises:
        UserError: if it has not; ``where`` names the model.
    """
    bound = id_bound(tokenizer)
    if bound > vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives ids up to {bound - 1}, but the embedding has {vocab_size} rows; "
            "use the tokenizer that belongs to the model"
        )


@dataclass(frozen=True)
class Stream:
    """Documents as ids, one after the other."""

    ids: NDArray[np.int64]  #: [tokens]
    documents: NDArray[np.int64]  #: the number of each token's document, [tokens]
    domains: tuple[str, ...]  #: the domain of each document, by its number


def encode_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> Stream:
    """Encode documents, reading no more of them than needed.

    Args:
        documents: in the order wanted.
        tokenizer: how to encode them.
        limit: how many tokens are wanted; None for all. For windows ask for ``windows * seqlen`` and reshape.
    """
    parts: list[NDArray[np.int64]] = []
    domains: list[str] = []
    found = 0
    with progress.track("tokenize", limit or 1) as task:
        for batch in batches(documents, 16):
            rows = encode_texts(tokenizer, [document.text for document in batch])
            parts += rows
            domains += [document.domain for document in batch]
            size = sum(map(len, rows))
            found += size
            task.advance(size if limit else 0, f"{found:,} tokens")
            if limit is not None and found >= limit:
                break
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *parts])[:limit]
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[:limit]
    return Stream(ids, numbers, tuple(domains))


def encode_stream(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> NDArray[np.int64]:
    """The ids alone of :func:`encode_documents`: int64 of shape [limit], or shorter where the documents end before."""
    return encode_documents(documents, tokenizer, limit).ids


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter (``itertools.batched`` is Python 3.12's)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def token_hash(ids: NDArray[np.integer]) -> str:
    """SHA-256, in hexadecimal, of the shape and the ids as little-endian int64, whatever their dtype is."""
    return token_hash_of([ids], ids.shape)


def token_hash_of(parts: Iterable[NDArray[np.integer]], shape: Sequence[int]) -> str:
    """The ``token_hash`` of ids that come in parts and together have this shape."""
    digest = hashlib.sha256(f"{list(shape)}".encode())
    for ids in parts:
        digest.update(np.ascontiguousarray(ids, dtype="<i8").data)
    return digest.hexdigest()
