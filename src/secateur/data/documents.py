"""Documents, the records that they come from, and what becomes of a record without text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.data.conversations import COMPLETION, PROMPT, TOOLS, RowFormat, conversation_text
from secateur.errors import UserError
from secateur.formatting import plural
from secateur.progress import notify

__all__ = [
    "INVALID_UTF8",
    "MALFORMED",
    "BadRow",
    "Document",
    "Fields",
    "OnBadRow",
    "select_documents",
    "skip_summary",
    "text_of",
]

OnBadRow = Literal["error", "skip"]

#: reasons of a ``BadRow``, as the count of skipped documents names them; the first two never raise
NULL, EMPTY = "null", "empty"
MISSING, WRONG_TYPE, MALFORMED, INVALID_UTF8 = "without the field", "not text", "malformed", "not UTF-8"
NOT_CHAT = "not a conversation"

_CHAT_FIELDS = ("messages", "conversations", "conversation")
_COLUMNS, _LETTERS = 30, 40  # of a list of columns in a message: at most so many names, each so long


@dataclass(frozen=True)
class Document:
    """A text, a conversation, or token ids."""

    id: str  #: position in the source: file, file and line, or row
    text: str  #: empty for a document of ids; JSON for a conversation (:mod:`secateur.data.conversations`)
    domain: str = ""
    ids: NDArray[np.integer] | None = None  #: [tokens]
    format: RowFormat = "text"


class BadRow(UserError):
    """A record without a document. Readers yield it, so that a source can skip and count it.

    Attributes:
        reason: why, as the count of skipped documents names it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields, and what becomes of records without text."""

    text: str = "text"
    domain: str | None = None  #: None if records do not name their domain
    blank: bool = False  #: whether to include texts of white space only
    on_bad_row: OnBadRow = "error"  #: null and empty texts are skipped in both cases
    format: RowFormat = "text"  #: of a record; ``text`` names the field of messages, or of prompts, in other formats

    @property
    def names(self) -> list[str]:
        """The fields that a record must have."""
        pair = [COMPLETION] if self.format == "prompt-completion" else []
        return [*dict.fromkeys([self.text, *pair, *([self.domain] if self.domain is not None else [])])]

    def columns(self, names: Collection[str]) -> list[str]:
        """The columns to read of a table with columns ``names``."""
        return [*self.names, *([TOOLS] if self.format != "text" and TOOLS in names else [])]

    def require(self, names: Collection[str], at: str, kind: Literal["field", "column"] = "field") -> None:
        """Check that a record or a table at position ``at`` has the fields.

        Raises:
            BadRow: for the first that is missing.
            UserError: for a column that a table has twice.
        """
        for field in self.names:
            if kind == "column" and list(names).count(field) > 1:
                raise UserError(f"{at}: several columns have the name {field!r}; rename all but one")
            if field not in names:
                listing = f"the {kind}s are {_list(names)}"
                remedy = self._chat_remedy(names) or f"{listing}: name one of them"
                raise BadRow(MISSING, f"{at}: no {kind} {field!r}; {remedy}")

    def _chat_remedy(self, names: Collection[str]) -> str:
        """What to do about records of chat data that are read as text; empty if they are not."""
        if self.format != "text":
            return ""
        if chat := next((name for name in _CHAT_FIELDS if name in names), None):
            field = f" and `field` to {chat}" if chat != "messages" else ""
            return f"{chat!r} is chat data: set `format` to messages{field} to read it"
        pair = PROMPT in names and COMPLETION in names
        return f"{PROMPT!r} and {COMPLETION!r} are chat data: set `format` to prompt-completion" if pair else ""

    def document(self, row: object, where: str, at: str, domain: str) -> Document | BadRow:
        """Make a document of a record.

        Args:
            at: position of the record, for errors.
            domain: of the document, unless the record has a field for it.
        """
        try:
            if isinstance(row, dict):
                self.require(row, at)
            text = text_of(row, self.text, at) if self.format == "text" else self._conversation(row, at)
        except BadRow as error:
            return error
        if not text.strip() and not self.blank:
            return BadRow(EMPTY, f"{at}: the field {self.text!r} is empty")
        try:
            label = domain if self.domain is None else text_of(row, self.domain, at)
        except BadRow as error:
            return BadRow(WRONG_TYPE, str(error))  # a domain that is null is no empty text
        return Document(where, text, label, format=self.format)

    def _conversation(self, row: object, at: str) -> str:
        """The JSON text of a record of chat data.

        Raises:
            BadRow: if the record holds no conversation.
        """
        if not isinstance(row, dict):
            message = f"{at}: expected an object with the field {self.text!r}, got {type(row).__name__}"
            raise BadRow(MALFORMED, message)
        if row[self.text] is None:
            raise BadRow(NULL, f"{at}: the field {self.text!r} is null")
        try:
            return conversation_text(row, self.text, self.format)
        except ValueError as error:
            raise BadRow(NOT_CHAT, f"{at}: {error}; fix or remove the row") from None


def select_documents(rows: Iterable[Document | BadRow], name: str, fields: Fields, remedy: str) -> Iterator[Document]:
    """Yield the documents of a source, and report the number of skipped records at the end.

    Args:
        remedy: what to do if there is no text.

    Raises:
        UserError: at the first bad record, unless it is to be skipped; at the end if there was no document with text.
    """
    skipped: Counter[str] = Counter()
    first: BadRow | None = None
    empty = True
    try:
        for row in rows:
            if isinstance(row, BadRow):
                if fields.on_bad_row == "error" and row.reason not in (NULL, EMPTY):
                    # Where no row has text so far, the field may be the wrong one for all.
                    raise row if empty else UserError(f"{row}, or set `on_bad_row` to skip such rows")
                first = first or row
                skipped[row.reason] += 1
                continue
            full = bool(len(row.ids) if row.ids is not None else row.text.strip())
            empty &= not full
            if full or fields.blank:
                yield row
    finally:
        if skipped:
            notify(f"{name}: {skip_summary(skipped)}")
    if empty:
        reason = f"{skip_summary(skipped)}, the first: {first}" if first else remedy
        raise UserError(f"{name}: holds no text; {reason}")


def skip_summary(skipped: Counter[str]) -> str:
    """E.g. ``3 documents skipped (2 null, 1 malformed)``, from the number of each reason."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return f"{plural(skipped.total(), 'document')} skipped ({reasons})"


def text_of(row: object, field: str, where: str) -> str:
    """Return the text in ``field``, which a record that is an object must have.

    Lone surrogates, valid in JSON but not in UTF-8, become U+FFFD.

    Raises:
        BadRow: if there is none.
    """
    if not isinstance(row, dict):
        message = f"{where}: expected an object with the field {field!r}, got {type(row).__name__}"
        raise BadRow(MALFORMED, message)
    text = row[field]
    if text is None:
        raise BadRow(NULL, f"{where}: the field {field!r} is null, not text; name a field of strings")
    if isinstance(text, list) and text and isinstance(text[0], dict):
        raise BadRow(
            WRONG_TYPE,
            f"{where}: the field {field!r} is chat data (a list of objects), not text: set `format` to messages to "
            "read it",
        )
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BadRow(WRONG_TYPE, f"{where}: the field {field!r} is {kind}, not text; name a field of strings")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _list(columns: Iterable[object]) -> str:
    """List names of columns on one line, shortened where they are long or many."""
    names = ["".join(letter if letter.isprintable() else "?" for letter in str(column)) for column in columns]
    short = [name if len(name) <= _LETTERS else f"{name[:_LETTERS]}..." for name in names[:_COLUMNS]]
    more = [f"{len(names) - _COLUMNS} more"] if len(names) > _COLUMNS else []
    return ", ".join([*short, *more]) or "none"
