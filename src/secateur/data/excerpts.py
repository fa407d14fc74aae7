"""A short stretch of each document, so that a small budget of tokens reads many documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from secateur.data.documents import Document
from secateur.data.sources import Source

__all__ = ["Excerpts", "excerpt"]


@dataclass(frozen=True)
class Excerpts:
    """A source whose documents are stretches of at most ``characters`` of those of ``source``."""

    source: Source
    characters: int

    @property
    def name(self) -> str:
        """The name of the whole documents' source."""
        return self.source.name

    def digest(self) -> str:
        """The digest of the whole documents."""
        return self.source.digest()

    def size(self) -> int | None:
        """Unknown: the source's size is that of the whole documents."""
        return None

    def documents(self) -> Iterator[Document]:
        """Iterate over the stretches, in the source's order."""
        for document in self.source.documents():
            yield replace(document, text=excerpt(document.text, self.characters))


def excerpt(text: str, characters: int) -> str:
    """Return a stretch of ``text`` of at most ``characters``; the hash of the text decides where it begins."""
    spare = len(text) - characters
    if spare <= 0:
        return text
    start = int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16], "big") % (spare + 1)
    return text[start : start + characters]
