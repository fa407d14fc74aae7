"""data: from text, or from ids, to a folder of token shards that training reads."""

from __future__ import annotations

import contextlib
import errno
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from secateur.cli.verbs.answer import Answer
from secateur.data.build import Built, Holdout, hash_splits, write_splits
from secateur.data.encode import Encoder
from secateur.data.manifest import FORMAT, smallest_dtype, write_manifest
from secateur.data.shards import SHARD_TOKENS, TokenStore
from secateur.data.sources import Source, open_source
from secateur.data.token_sources import TOKEN_SOURCE_FORMS, is_tokenized, open_tokenized
from secateur.data.tokenizer import id_bound, load_tokenizer
from secateur.errors import RunError, UserError
from secateur.files import check_free, partial_directories, resumable_directory, sha256_tree
from secateur.formatting import byte_size, count, percent
from secateur.progress import clock_time, notify
from secateur.runtime import calm_environment, core_count, environment
from secateur.version import __version__

__all__ = ["data"]


#: what an unfinished run was asked for, as the command line has it
_WORDS = {
    "format": "another version of secateur",
    "source": "SOURCE",
    "source_sha256": "what SOURCE holds",
    "tokenizer_sha256": "--tokenizer",
    **{key: f"--{key}" for key in ("field", "split", "domain", "documents", "holdout", "seed")},
    "shard_tokens": "--shard-tokens",
}


def data(arguments: Namespace) -> Answer:
    """``secateur data SOURCE OUT``."""
    started = time.perf_counter()
    out = Path(arguments.out)
    check_free(out)
    tokenizer = load_tokenizer(Path(arguments.tokenizer))
    source = _source(arguments, out)
    asked = _asked(arguments, source, tokenizer)
    calm_environment(threads=1)  # a worker is a process; threads inside would only fight the other workers
    vocabulary = id_bound(tokenizer)
    encoder = Encoder(tokenizer, vocabulary, smallest_dtype(vocabulary), arguments.seed)
    with _disk(out), resumable_directory(out, asked, resume=True, words=_WORDS) as (fresh, work):
        tokenizer.save_pretrained(fresh / "tokenizer")
        built = write_splits(
            source,
            encoder,
            fresh,
            work,
            holdout=Holdout(arguments.holdout),
            documents=arguments.documents,
            workers=arguments.workers or core_count(),
            shard_tokens=asked["shard_tokens"],
        )
        told = {key: value for key, value in asked.items() if key not in ("format", "tokenizer_sha256", "shard_tokens")}
        counted = {"duplicates": built.duplicates, "bytes": built.bytes, "domains": _by_domain(built)}
        told |= {**counted, "secateur": __version__, "versions": environment()}
        write_manifest(fresh, vocabulary, built.splits, domains=built.domains, provenance=told)
        sha256 = hash_splits(TokenStore(fresh))
    return _answer(arguments, asked, built, sha256, time.perf_counter() - started)


def _source(arguments: Namespace, out: Path) -> Source:
    """The source; options that it has no use for are said aloud."""
    named, field, split, domain = arguments.source, arguments.field, arguments.split, arguments.domain
    scheme, _, rest = named.partition(":")
    unused = [("--field", field)] if is_tokenized(named) or scheme in ("stdlib", "python") else []
    unused += [("--split", split)] if scheme not in ("hf", "arrow") else []
    for option, value in unused:
        if value is not None:
            notify(f"{option} {value}: does not apply to {named}")
    if is_tokenized(named):
        source = open_tokenized(named, split=split or "train", domain=domain)
    else:
        source = open_source(
            named, field=field or "text", split=split or "train", domain=domain, besides=TOKEN_SOURCE_FORMS
        )
    folder = Path(rest).expanduser()
    if rest and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out}: lies inside the source; name a directory elsewhere")
    return source


def _asked(arguments: Namespace, source: Source, tokenizer: Any) -> dict[str, Any]:
    """Everything that decides what is written."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        known = sha256_tree(Path(folder))
    return {
        "format": FORMAT,
        "source": source.name,
        "source_sha256": source.digest(),
        "field": arguments.field or "text",
        "split": arguments.split or "train",
        "domain": arguments.domain,
        "documents": arguments.documents,
        "holdout": arguments.holdout,
        "seed": arguments.seed,
        "shard_tokens": arguments.shard_tokens or SHARD_TOKENS,
        "tokenizer_sha256": known,
    }


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Turn a full disk into one line; what is done stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        work = partial_directories(out)[0].parent
        raise RunError(
            f"{work}: the disk is full; make room, about twice what is there, and run the same command again to go on"
        ) from None


def _by_domain(built: Built) -> dict[str, dict[str, dict[str, int]]]:
    """domain -> split -> documents, tokens and bytes; empty where there is only one domain."""
    return {
        name: {
            split: dict(zip(("documents", "tokens", "bytes"), counts[i].tolist(), strict=True))
            for split, counts in built.counts.items()
        }
        for i, name in enumerate(built.domains)
    }


def _answer(
    arguments: Namespace, asked: dict[str, Any], built: Built, sha256: dict[str, str], seconds: float
) -> Answer:
    out = Path(arguments.out)
    store = TokenStore(out)
    tokens = {split: entry.tokens for split, entry in built.splits.items()}
    answer = {
        "out": str(out),
        **{key: asked[key] for key in ("source", "source_sha256")},
        "documents": {split: entry.documents for split, entry in built.splits.items()},
        "duplicates": built.duplicates,
        "tokens": tokens,
        "bytes": built.bytes,
        # None, not 0, where the documents came as ids: nobody knows their text.
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
    return answer, "\n".join(_lines(answer)), 0


def _lines(answer: dict[str, Any]) -> list[str]:
    kept, repeated = sum(answer["documents"].values()), answer["duplicates"]
    total = sum(answer["tokens"].values())
    lines = [f"{answer['out']}: {kept:,} documents, {repeated:,} repeated ones left out, {total:,} tokens"]
    for split, tokens in answer["tokens"].items():
        rate = answer["bytes_per_token"][split]
        told = f", {rate:.3f} bytes of text a token" if rate else ""
        hashed = answer["sha256"][split][:16]
        lines.append(f"{split:12} {answer['documents'][split]:,} documents, {tokens:,} tokens{told}, hash {hashed}")
    if answer["domains"]:
        sums = {name: sum(found["tokens"] for found in of.values()) for name, of in answer["domains"].items()}
        largest = sorted(sums, key=lambda name: -sums[name])
        shown = [f"{name} {percent(sums[name] / total)} ({count(sums[name])})" for name in largest[:12]]
        more = f" and {len(largest) - 12} more" if len(largest) > 12 else ""
        lines.append(f"domains      {', '.join(shown)}{more}, by tokens")
    return [
        *lines,
        f"vocabulary   {answer['vocabulary']:,}, ids as {answer['dtype']}",
        f"identity     {answer['fingerprint']}",
        f"used         {clock_time(answer['seconds'])}, {byte_size(answer['disk'])} of disk",
    ]
