"""Which text becomes token shards, and how: the request that Python and the command line share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from secateur.config import AnyPath, Count, Positive, Proportion, spec
from secateur.data.conversations import RowFormat
from secateur.data.documents import OnBadRow

__all__ = ["CorpusRequest"]


@spec
class CorpusRequest:
    """A corpus of token shards to build.

    Attributes:
        source: text (``stdlib``, ``python``, ``text:PATH``, ``hf:NAME``) or ids (``arrow:DIR``, ``array_record:DIR``).
        out: new directory to write.
        tokenizer: directory with the tokenizer, or a checkpoint.
        field: the field of the text, or of the messages, where records have fields; None for ``text`` or ``messages``.
        format: of the records: ``text`` (also for None); ``messages``, conversations; or ``prompt-completion``, pairs.
            The last two go through the tokenizer's chat template, and their targets are marked.
        on_bad_row: what becomes of a record that is malformed, or not of the format: ``error`` (also for None) or
            ``skip``.
        split: split to read of hf: and arrow: sources; None for ``train``.
        domain: field that names a document's domain; None for the first subfolder that its file lies in.
        holdout: share of the documents held out; 0 for none.
        documents: documents to read at most.
        seed: of the order of documents.
        workers: processes; None for one a core.
        shard_tokens: tokens in a file; None for the default.

    Raises:
        UserError: if a field is out of range.
    """

    source: str
    out: AnyPath
    tokenizer: Any
    field: str | None = None
    format: RowFormat | None = None
    on_bad_row: OnBadRow | None = None
    split: str | None = None
    domain: str | None = None
    holdout: Annotated[Proportion, Field(lt=1)] = 0.05
    documents: Count | None = None
    seed: int = 0
    workers: Positive | None = None
    shard_tokens: Count | None = None
