"""Train and load tokenizers, and encode documents.

A document gets the special tokens that its tokenizer adds by default (Llama's adds BOS). If a tokenizer adds none
(GPT-2's, Qwen's), its EOS, if any, ends each document, so that documents stay separated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from secateur import progress
from secateur.data.documents import Document, OnBadRow
from secateur.data.encode import Skipped, encode_rows
from secateur.errors import UserError
from secateur.files import refuse_pointer
from secateur.formatting import plural
from secateur.model.companions import sentencepiece_model, vocabulary_files
from secateur.runtime import install_command

if TYPE_CHECKING:  # `transformers` takes seconds to import
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = [
    "END",
    "MIN_VOCABULARY",
    "Stream",
    "batches",
    "check_ids",
    "encode_documents",
    "id_bound",
    "load_tokenizer",
    "missing_row",
    "token_hash",
    "token_hash_of",
    "train_tokenizer",
]

T = TypeVar("T")

END = "<|endoftext|>"
MIN_VOCABULARY = 257  # every byte, and END


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the order of the texts does not matter.

    Its only special token ``<|endoftext|>`` has id 0, is both BOS and EOS, and precedes each document.

    Args:
        texts: training text, read once.
        vocabulary: number of tokens, including bytes and the special token.

    Raises:
        UserError: if ``vocabulary`` is below 257, or larger than the texts support.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < MIN_VOCABULARY:
        raise UserError(f"a vocabulary of {vocabulary} is too small for all bytes; make it {MIN_VOCABULARY} or more")
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
    size = tokenizer.get_vocab_size()
    if size < vocabulary:
        raise UserError(
            f"the text gives only {plural(size, 'token')}, not a vocabulary of {vocabulary}; "
            f"lower the vocabulary to {size} or name more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a local checkpoint's directory; code in the checkpoint is not run.

    Raises:
        UserError: if the directory or its tokenizer does not exist, or the tokenizer is damaged.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name a local checkpoint or tokenizer")
    if not any(directory.glob("*token*")) and not vocabulary_files(directory):
        raise UserError(f"{directory}: has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        works = bool(tokenizer("a", add_special_tokens=False)["input_ids"])
    except Exception as error:  # a damaged file raises any class, even a bare Exception from Rust
        for path in filter(Path.is_file, directory.glob("*token*")):
            refuse_pointer(path)
        _require_sentencepiece(directory)
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"{directory}: its tokenizer cannot be loaded ({type(error).__name__}: {first}); restore its files"
        ) from None
    if not works:  # transformers builds an empty tokenizer where the vocabulary's file is missing
        _require_sentencepiece(directory)
        raise UserError(f"{directory}: its tokenizer has no vocabulary; copy tokenizer.json into it")
    for key in ("is_local", "local_files_only"):  # must not be saved with the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _require_sentencepiece(directory: Path) -> None:
    """Blame a missing package where only a model of sentencepiece holds the vocabulary."""
    model = sentencepiece_model(directory)
    if model and not find_spec("sentencepiece"):
        raise UserError(
            f"{model}: reading this tokenizer needs the package sentencepiece; install it: "
            f"{install_command('sentencepiece', 'protobuf')}, or copy the model's tokenizer.json beside it"
        ) from None


def id_bound(tokenizer: PreTrainedTokenizerBase) -> int:
    """Upper bound (exclusive) of the tokenizer's ids; ids may have gaps, so it can exceed their number."""
    return max(tokenizer.get_vocab().values()) + 1


def check_ids(ids: NDArray[np.integer], rows: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that an embedding has a row for each id of a text.

    A tokenizer may have more ids than its model has rows: the one that all Gemma 3 models share has a token for images.

    Args:
        rows: of the embedding.
        where: names the model.

    Raises:
        UserError: naming the largest id without a row.
    """
    largest = int(ids.max(initial=-1))
    if largest >= rows:
        raise UserError(f"{where}: {missing_row(largest, rows, tokenizer)}")


def missing_row(id: int, rows: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe an id of a text that an embedding has no row for, and what to do."""
    token = tokenizer.convert_ids_to_tokens(id)
    return (
        f"the text holds the token {token!r} with id {id}, but the embedding has {rows} rows; take it out of the text, "
        "or use the tokenizer that belongs to the model"
    )


@dataclass(frozen=True)
class Stream:
    """Token ids of consecutive documents."""

    ids: NDArray[np.int64]  #: [tokens]
    documents: NDArray[np.int64]  #: index of each token's document, [tokens]
    domains: tuple[str, ...]  #: of each document
    targets: NDArray[np.bool_] | None = None  #: whether each token is a target of a loss, [tokens]; None where all are


def encode_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    *,
    on_bad_row: OnBadRow | None = None,
    targets: bool = True,
) -> Stream:
    """Encode documents, reading no more than necessary.

    Args:
        limit: maximal number of tokens; None for all.
        on_bad_row: what becomes of a conversation that cannot be encoded; None for ``error``.
        targets: whether to mark the targets of conversations, which they must have then.

    Raises:
        UserError: for a conversation that cannot be encoded, unless it is skipped.
    """
    parts: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.bool_]] = []
    skipped = Skipped()
    domains: list[str] = []
    total = 0
    with progress.track("tokenize", limit or 1) as task:
        for batch in batches(documents, 16):
            pairs, bad = encode_rows(tokenizer, batch, on_bad_row=on_bad_row or "error", targets=targets)
            skipped.update(bad)
            parts += [row.ids for _, row in pairs]
            masks += [row.targets for _, row in pairs if row.targets is not None]
            domains += [document.domain for document, _ in pairs]
            size = sum(len(row.ids) for _, row in pairs)
            total += size
            task.advance(size if limit else 0, plural(total, "token"))
            if limit is not None and total >= limit:
                break
    if skipped.first:
        progress.notify(f"chat data: {skipped}")
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *parts])[:limit]
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[:limit]
    return Stream(ids, numbers, tuple(domains), np.concatenate(masks)[:limit] if masks else None)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items, the last one possibly shorter (``itertools.batched`` needs Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def token_hash(ids: NDArray[np.integer]) -> str:
    """SHA-256, in hexadecimal, of the shape and of the ids as little-endian int64."""
    return token_hash_of([ids], ids.shape)


def token_hash_of(parts: Iterable[NDArray[np.integer]], shape: Sequence[int]) -> str:
    """Return the ``token_hash`` of ids of shape ``shape`` that come in parts."""
    digest = hashlib.sha256(f"{list(shape)}".encode())
    for ids in parts:
        digest.update(np.ascontiguousarray(ids, dtype="<i8").data)
    return digest.hexdigest()
