"""The files beside the weights of a checkpoint, which follow it to an output: tokenizer, templates, licences ..."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from secateur.progress import notify

__all__ = [
    "COMPANIONS",
    "COMPANION_FOLDERS",
    "copy_companions",
    "sentencepiece_model",
    "tokenizer_files",
    "vocabulary_files",
]

#: models of sentencepiece, which transformers converts where there is no tokenizer.json
_SENTENCEPIECE = ("tokenizer.model", "tokenizer.model.v*", "spiece.model", "sentencepiece*.model", "*.spm")

#: what the ids of a text depend on; the order is that of the digest of a folder
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    *_SENTENCEPIECE[1:],
    "*.bpe.model",
    "*token*.json",
    "*vocab*",
    "*.tiktoken",
    "bpe.codes",
    "tekken*",
)

_VOCABULARIES = ("tokenizer.json", *_SENTENCEPIECE, "*.bpe.model", "*vocab*", "*.tiktoken", "tekken*")


def _any_case(word: str) -> str:
    """A pattern for ``word`` in capitals or not: patterns of the Hub tell them apart."""
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in word)


_LEGAL = ("license", "licence", "notice", "copying", "copyright", "policy", "terms_of_use", "citation", "authors")

#: names of files that follow a checkpoint, as patterns
COMPANIONS = (
    *_TOKENIZER,
    "*.jinja",
    "chat_template*",
    "*processor*.json",
    "*feature_extractor*.json",
    "*generation_config*.json",
    ".gitattributes",
    *(f"*{_any_case(word)}*" for word in _LEGAL),
)

#: folders whose files follow it as well
COMPANION_FOLDERS = ("additional_chat_templates", "licenses", "LICENSES")

_WEIGHTS = r"safetensors|bin|pth?|ckpt|h5|msgpack|ot|gguf|ggml|onnx(_data)?|np[yz]|tflite|pdparams|index\.json"
_CODE = r"py[cdoiw]?|so|dll|dylib|sh|bat|exe|js|ipynb|jar|rs|cpp|cu"
_PICKLES = r"pkl|pickle|joblib|dill|dump"
_ARCHIVES = r"zip|tar|t?gz|bz2|xz|zst|7z"
_REFUSED = re.compile(rf".*\.({_WEIGHTS}|{_CODE}|{_PICKLES}|{_ARCHIVES})", re.IGNORECASE)

#: files that an output has of its own, or that describe what it replaces
_WRITTEN = ("config.json", "secateur.json", "README.md", "plan.json", "train.json", "metrics.jsonl")


def vocabulary_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that hold a tokenizer's vocabulary."""
    return [path for path in tokenizer_files(folder) if any(fnmatchcase(path.name, name) for name in _VOCABULARIES)]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that a tokenizer is loaded from, in an order that does not depend on the file system."""
    return list(dict.fromkeys(path for pattern in _TOKENIZER for path in _matches(folder, pattern)))


def sentencepiece_model(folder: Path) -> Path | None:
    """The model of sentencepiece in ``folder``; None where other files hold the vocabulary as well."""
    files = vocabulary_files(folder)
    models = [path for path in files if any(fnmatchcase(path.name, name) for name in _SENTENCEPIECE)]
    return models[0] if models and len(models) == len(files) else None


def copy_companions(source: Path, out: Path) -> None:
    """Copy what a user of the checkpoint in ``source`` needs besides its weights into the existing ``out``.

    These are the files of the tokenizer, templates, processors, generation settings, licences and notices. Weights,
    code and pickles are never copied, whatever their names; what else stays behind is listed in a notice.
    """
    if not source.is_dir():
        return
    folders = [folder for name in COMPANION_FOLDERS for folder in [source / name] if folder.is_dir()]
    files = [path for pattern in COMPANIONS for path in _matches(source, pattern)]
    files += [path for folder in folders for path in sorted(folder.rglob("*")) if _is_companion(path)]
    for path in dict.fromkeys(files):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    names = {path.name for path in files} | set(_WRITTEN)
    rest = [path.name for path in sorted(source.iterdir()) if path.is_file() and path.name not in names]
    rest = [name for name in rest if not re.fullmatch(rf".*\.({_WEIGHTS})", name, re.IGNORECASE)]
    if rest:
        more = f" and {len(rest) - 6} more" if len(rest) > 6 else ""
        notify(f"not copied from {source}: {', '.join(rest[:6])}{more}; copy by hand what the new model needs")


def _matches(folder: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if fnmatchcase(path.name, pattern) and _is_companion(path):
            yield path


def _is_companion(path: Path) -> bool:
    return path.is_file() and path.name not in _WRITTEN and not _REFUSED.fullmatch(path.name)
