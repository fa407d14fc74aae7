"""The contents of a folder of token shards: ``manifest.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import NonNegativeInt

from secateur.config import RUNTIME, IdentityKey, Positive, spec
from secateur.files import sha256_tree, write_json

__all__ = ["FORMAT", "Column", "Manifest", "Shard", "Split", "smallest_dtype", "write_manifest"]

FORMAT = 2  #: version of the folder's format; other versions are refused


@spec
class Column:
    """A file with one number for each document, or for each token of a shard."""

    file: str
    sha256: str


@spec
class Shard:
    """A file of token ids and its length."""

    file: str
    tokens: Positive
    sha256: str
    targets: Annotated[Column | None, IdentityKey(omit=None)] = None  #: bool; None where every token is a target


@spec
class Split:
    """The shards of a split in order, and columns that describe its documents."""

    tokens: Positive
    documents: Positive
    offsets: Column  #: int64, each document's first token
    hashes: Column  #: uint64, the first eight bytes of each document's SHA-256, the most significant first
    domains: Column | None = None  #: uint16, index into the manifest's ``domains``
    shards: tuple[Shard, ...]
    #: of all tokens; a tokenizer may have more ids than its model has rows. It follows from the shards; older manifests
    #: lack it
    largest_id: Annotated[NonNegativeInt | None, RUNTIME] = None
    #: tokens that are targets; None where all are. It follows from the shards
    targets: Annotated[NonNegativeInt | None, RUNTIME] = None


@spec
class Manifest:
    """The contents of a folder of shards; every id is below ``vocabulary``.

    ``provenance`` describes how the folder was built; it is not part of the data's identity.
    """

    version: int = FORMAT
    dtype: Literal["uint16", "uint32"]
    vocabulary: Positive
    splits: dict[str, Split]
    domains: tuple[str, ...] = ()  #: names; empty if all documents belong to one domain
    tokenizer_sha256: str | None = None  #: of the files in ``tokenizer/``; None without any
    provenance: Annotated[dict[str, Any], RUNTIME] = dataclasses.field(default_factory=dict)


def smallest_dtype(vocabulary: int) -> Literal["uint16", "uint32"]:
    """Smallest dtype for ids below ``vocabulary``."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def write_manifest(
    folder: Path,
    vocabulary: int,
    splits: dict[str, Split],
    *,
    domains: Sequence[str] = (),
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write the manifest, which makes ``folder`` a store; call this after closing every split.

    Args:
        folder: contains the files of the splits, and optionally the tokenizer in ``tokenizer/``.
        vocabulary: every id is below it.
        splits: entries returned by the writers.
        domains: names of the documents' domains; empty if there is only one.
    """
    tokenizer = folder / "tokenizer"
    manifest = Manifest(
        dtype=smallest_dtype(vocabulary),
        vocabulary=vocabulary,
        splits=splits,
        domains=tuple(domains),
        tokenizer_sha256=sha256_tree(tokenizer) if tokenizer.is_dir() else None,
        provenance=provenance or {},
    )
    write_json(folder / "manifest.json", dataclasses.asdict(manifest))
