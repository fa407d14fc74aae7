"""Whether two tokenizers give ids the same meaning, whatever their files look like.

Tokenizers match if the ids that both have stand for the same tokens, their merges are the same, and both encode sample
texts alike, special tokens included. The formatting of ``tokenizer.json``, the library version that wrote it, padding,
truncation and chat templates do not count, nor do tokens that only one of them has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.data.encode import encode_texts
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import UserError
from secateur.model.companions import vocabulary_files
from secateur.progress import notify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_encoded_for", "has_tokenizer", "tokenizer_difference", "tokenizer_hash"]

#: files that decide which ids a text gets
_ENCODING_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
#: differ where normalisers, rules for cutting words or special tokens do
_SAMPLES = (
    "",
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 3.14159, or 2,718 of 1000000!",
    " two  spaces,\ttabs\r\nand lines\n\n\n  of indented text \n",
    "def f(x: int) -> str:\n    return f'{x!r}' if x >= 0 else None  # 100%\n",
    "UPPER lower CamelCase snake_case kebab-case http://example.org/a?b=c&d",
    "Cafe\u0301 café naïve Straße İstanbul ﬁne ½ Ⅷ \uff41\uff42",
    "Съешь ещё этих мягких французских булок 日本語の文章 한국어 العربية हिन्दी",
    "\U0001f642\U0001f469\u200d\U0001f467 \u200b\u00a0\ufeff\x07",
)
_SAMPLED_TOKENS = 4096  #: tokens of the vocabulary whose texts are samples as well


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer's files."""
    return bool(vocabulary_files(directory))


def tokenizer_hash(directory: Path) -> str | None:
    """SHA-256, in hexadecimal, of a tokenizer's vocabulary without added tokens, its merges and the samples as encoded.

    None where the directory has no tokenizer that can be loaded.
    """
    if not has_tokenizer(directory):
        return None
    try:
        tokenizer: Any = load_tokenizer(directory)
    except UserError:
        return None
    added = tokenizer.get_added_vocab()
    vocabulary = sorted((index, token) for index, token in _tokens_by_id(tokenizer).items() if token not in added)
    content = [vocabulary, _merges(tokenizer), _encode(tokenizer, list(_SAMPLES))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """The first difference of two tokenizers, a clause that says "in the first" and "in the second"; None if none."""
    tokens = _tokens_by_id(first), _tokens_by_id(second)
    shared = sorted(tokens[0].keys() & tokens[1].keys())
    for index in shared:
        if tokens[0][index] != tokens[1][index]:
            return f"id {index} is {tokens[0][index]!r} in the first and {tokens[1][index]!r} in the second"
    if _merges(first) != _merges(second):
        return "their merges differ"
    samples = _samples(first, {index: tokens[0][index] for index in shared})
    for text, ids, others in zip(samples, _encode(first, samples), _encode(second, samples), strict=True):
        if ids != others:
            start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))
            place = f" from token {start} on" if start else ""
            pair = f"{_shorten(ids[start:])} in the first and {_shorten(others[start:])} in the second"
            return f"{text[:40]!r} is{place} {pair}"
    return None


def check_encoded_for(
    model: Path | PreTrainedTokenizerBase,
    encoder: Path,
    source: str,
    where: str,
    *,
    name: str | None = None,
    remedy: str = "build the data with the model's tokenizer",
) -> None:
    """Refuse ids that another tokenizer than the model's has encoded.

    A notice says so where the ids or the model have no tokenizer, so that nothing is compared.

    Args:
        model: directory of the model, or its tokenizer.
        encoder: folder of the tokenizer that encoded the ids.
        source: of the ids, for messages.
        where: the field or key that names the source, as messages begin.
        name: of the model, for messages; None for its directory.
        remedy: the end of the error.

    Raises:
        UserError: if the tokenizers differ.
    """
    name = name or str(model)
    if difference := _difference(model, encoder, source, name):
        raise UserError(f"{where}: {source} has the ids of another tokenizer than {name}: {difference}; {remedy}")


def _difference(model: Path | PreTrainedTokenizerBase, encoder: Path, source: str, name: str) -> str | None:
    def skip(reason: object) -> None:
        notify(f"{reason}: whether {source} has the ids of {name} is not checked")

    if not has_tokenizer(encoder):
        return skip(f"{source} has no tokenizer")
    if isinstance(model, Path):
        if not has_tokenizer(model):
            return skip(f"{name} has no tokenizer")
        if _same_files(encoder, model):
            return None
    try:
        tokenizers = load_tokenizer(encoder), load_tokenizer(model) if isinstance(model, Path) else model
    except UserError as error:
        return skip(error)
    clause = tokenizer_difference(*tokenizers)
    return clause and clause.replace("in the first", "in the data").replace("in the second", "in the model")


def _same_files(first: Path, second: Path) -> bool:
    """Whether all files that decide the encoding are the same, byte by byte."""
    return all(_content(first / name) == _content(second / name) for name in _ENCODING_FILES)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The merges of a BPE tokenizer in order, or the scores of a unigram one; None for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    model = json.loads(backend.to_str())["model"]
    if "merges" in model:  # older files write a pair as "a b"
        return [list(merge) if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return model["vocab"] if isinstance(model.get("vocab"), list) else None


def _samples(tokenizer: Any, tokens: dict[int, str]) -> list[str]:
    """Texts that show differences: fixed ones, and those of tokens at even distances."""
    indices = sorted(tokens)[:: -(-len(tokens) // _SAMPLED_TOKENS) or 1]
    return [*_SAMPLES, *(tokenizer.decode([index], clean_up_tokenization_spaces=False) for index in indices)]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encode_texts(tokenizer, texts)]


def _shorten(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"{str(ids[:8])[:-1]}, ...]"
