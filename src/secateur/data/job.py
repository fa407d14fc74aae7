"""Run a corpus request: from text, or from ids, to a folder of token shards that training reads."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from secateur.data.build import BuildResult, Holdout, hash_splits, write_splits
from secateur.data.chat import check_format
from secateur.data.conversations import field_name
from secateur.data.encode import Encoder
from secateur.data.manifest import FORMAT, smallest_dtype, write_manifest
from secateur.data.request import CorpusRequest
from secateur.data.shards import SHARD_TOKENS, TokenStore
from secateur.data.sources import Source, open_source
from secateur.data.token_sources import TOKEN_SOURCE_FORMS, is_tokenized, open_tokenized
from secateur.data.tokenizer import id_bound, load_tokenizer
from secateur.errors import RunError, UserError
from secateur.files import partial_directories, require_new_directory, resumable_directory, sha256_tree
from secateur.hub import local_checkpoint
from secateur.progress import notify
from secateur.runtime import configure_threads, core_count, environment
from secateur.version import __version__

__all__ = ["Corpus", "build"]


@dataclass(frozen=True)
class Corpus:
    """A folder of token shards. ``str`` gives ``shards:DIR``, the spelling that training and evaluation take."""

    path: Path
    record: dict[str, Any]  #: plain values, as ``secateur data --json`` prints them

    def __str__(self) -> str:
        return f"shards:{self.path}"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each split."""
        return self.record["tokens"]


#: fields of a request by the keys that identify an unfinished run
_LABELS = {
    "format": "another version of secateur",
    "source_sha256": "the content of `source`",
    "tokenizer_sha256": "`tokenizer`",
    **{
        key: f"`{key}`"
        for key in ("source", "field", "on_bad_row", "split", "domain", "documents", "holdout", "seed", "shard_tokens")
    },
    "rows": "`format`",
}


def build(request: CorpusRequest) -> Corpus:
    """Encode the documents of a source and write them as shards in a shuffled order; resumes after a kill.

    Raises:
        UserError: if the source or the tokenizer cannot be read, or ``out`` is no new directory.
        RunError: if the disk is full; finished work stays.
    """
    started = time.perf_counter()
    out = Path(request.out)
    require_new_directory(out)
    tokenizer = load_tokenizer(local_checkpoint(request.tokenizer, weights=False))
    if _is_chat(request):
        check_format(tokenizer, request.format)
    source = _open_source(request, out)
    identity = _identity(request, source, tokenizer)
    configure_threads(threads=1)  # a worker is a process; threads inside would only fight the other workers
    vocabulary = id_bound(tokenizer)
    chat, on_bad_row = _is_chat(request), request.on_bad_row or "error"
    encoder = Encoder(tokenizer, vocabulary, smallest_dtype(vocabulary), request.seed, chat, on_bad_row)
    with _report_full_disk(out), resumable_directory(out, identity, resume=True, labels=_LABELS) as (fresh, work):
        tokenizer.save_pretrained(fresh / "tokenizer")
        built = write_splits(
            source,
            encoder,
            fresh,
            work,
            holdout=Holdout(request.holdout),
            documents=request.documents,
            workers=request.workers or core_count(),
            shard_tokens=identity["shard_tokens"],
        )
        skipped = ("format", "tokenizer_sha256", "shard_tokens")
        provenance = {key: value for key, value in identity.items() if key not in skipped}
        counts = {"duplicates": built.duplicates, "bytes": built.bytes, "domains": _by_domain(built)}
        provenance |= {**counts, "secateur": __version__, "versions": environment()}
        write_manifest(fresh, vocabulary, built.splits, domains=built.domains, provenance=provenance)
        sha256 = hash_splits(TokenStore(fresh))
    return Corpus(out, _record(out, identity, built, sha256, time.perf_counter() - started))


def _open_source(request: CorpusRequest, out: Path) -> Source:
    """Open the source, and report fields that have no effect on it."""
    name, field, split, domain = request.source, request.field, request.split, request.domain
    scheme, _, rest = name.partition(":")
    texts = [("field", field), ("format", request.format), ("on_bad_row", request.on_bad_row)]
    idle = texts if is_tokenized(name) else []
    idle += [("split", split)] if scheme not in ("hf", "arrow") else []
    for option, value in idle:
        if value is not None:
            notify(f"`{option}` {value}: does not apply to {name}")
    if is_tokenized(name):
        source = open_tokenized(name, split=split or "train", domain=domain)
    else:
        source = open_source(
            name,
            field=field,
            split=split or "train",
            domain=domain,
            format=request.format,
            on_bad_row=request.on_bad_row,
            besides=TOKEN_SOURCE_FORMS,
        )
    folder = Path(rest).expanduser()
    if rest and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out}: lies inside the source; name a directory elsewhere")
    return source


def _is_chat(request: CorpusRequest) -> bool:
    """Whether the source's records are conversations or pairs."""
    return request.format not in (None, "text") and not is_tokenized(request.source)


def _identity(request: CorpusRequest, source: Source, tokenizer: Any) -> dict[str, Any]:
    """Everything that decides what is written."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenizer_sha256 = sha256_tree(Path(folder))
    return {
        "format": FORMAT,
        "source": source.name,
        "source_sha256": source.digest(),
        "field": request.field or field_name(request.format or "text"),
        # Defaults have no key, so that they leave older unfinished runs their identity.
        **({"rows": request.format} if _is_chat(request) else {}),
        **({"on_bad_row": "skip"} if request.on_bad_row == "skip" else {}),
        "split": request.split or "train",
        "domain": request.domain,
        "documents": request.documents,
        "holdout": request.holdout,
        "seed": request.seed,
        "shard_tokens": request.shard_tokens or SHARD_TOKENS,
        "tokenizer_sha256": tokenizer_sha256,
    }


@contextlib.contextmanager
def _report_full_disk(out: Path) -> Iterator[None]:
    """Turn a full disk into one line; finished work stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        work = partial_directories(out)[0].parent
        raise RunError(
            f"{work}: the disk is full; make room, about twice what is there, and run the same command again to go on"
        ) from None


def _by_domain(built: BuildResult) -> dict[str, dict[str, dict[str, int]]]:
    """domain -> split -> documents, tokens and bytes; empty where there is only one domain."""
    return {
        name: {
            split: dict(zip(("documents", "tokens", "bytes"), counts[i].tolist(), strict=True))
            for split, counts in built.counts.items()
        }
        for i, name in enumerate(built.domains)
    }


def _record(
    out: Path, identity: dict[str, Any], built: BuildResult, sha256: dict[str, str], seconds: float
) -> dict[str, Any]:
    store = TokenStore(out)
    tokens = {split: entry.tokens for split, entry in built.splits.items()}
    targets = {split: entry.targets for split, entry in built.splits.items()}
    return {
        "out": str(out),
        **{key: identity[key] for key in ("source", "source_sha256")},
        "documents": {split: entry.documents for split, entry in built.splits.items()},
        "duplicates": built.duplicates,
        "tokens": tokens,
        # Tokens that the loss is on, where these are not all.
        **({"targets": targets} if any(targets.values()) else {}),
        "bytes": built.bytes,
        # None, not 0, where the documents came as ids: their text is unknown.
        "bytes_per_token": {split: size / tokens[split] if size else None for split, size in built.bytes.items()},
        "sha256": sha256,
        "domains": _by_domain(built),
        "vocabulary": store.vocabulary,
        "dtype": store.manifest.dtype,
        "tokenizer_sha256": store.manifest.tokenizer_sha256,
        "fingerprint": store.fingerprint,
        "disk": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "seconds": seconds,
    }
