"""What to measure of which models: the request that Python and the command line share."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from secateur.config import AnyPath, Positive, spec
from secateur.data.conversations import RowFormat
from secateur.data.documents import OnBadRow
from secateur.errors import UserError
from secateur.evaluation.names import check_names
from secateur.model.quantisation import WeightKind

if TYPE_CHECKING:
    from secateur.evaluation.suite import Suite

__all__ = ["EvaluateRequest"]


@spec
class EvaluateRequest:
    """An evaluation: models, held-out text, a suite of further figures, and how to compute.

    Attributes:
        models: checkpoints (directories, Hub names, pruned or trained results), measured alike.
        data: held-out text: a source of text, ``tokens:FILE.npy`` or ``shards:DIR``.
        suite: names of what to measure besides: suites, tasks, groups, patterns.
        tasks_data: folder with <task>.jsonl; None for the Hugging Face Hub.
        task_limit: documents of each task, from the first.
        few_shot: examples in each prompt of a task; None for as many as the task says.
        text_data: folder with c4.jsonl ...; None for the Hugging Face Hub.
        protocol: of the perplexities: ``heldout`` or ``paper-train-split``.
        field: the field of the text, or of the messages, where records have fields; None for ``text`` or ``messages``.
        format: of the records of ``data``: ``text`` (also for None), ``messages`` or ``prompt-completion``. The loss of
            the last two is on what the assistant says alone.
        on_bad_row: what becomes of a record that is malformed or not text: ``error`` (also for None) or ``skip``.
        windows: windows at most.
        seqlen: tokens in a window.
        stride: tokens from window to window; None for windows side by side.
        out: folder for results and items; None to keep them in memory.
        names: of the models in tables and files, in order; None for the shortest ends of their paths that differ.
        device: ``auto``, ``cpu`` or ``cuda``.
        batch: windows at once.
        dtype: of weights and products.
        weights: ``bf16``, ``int8`` or ``int4``: measure the models as they would be served with such weights
            (:mod:`secateur.model.quantisation`); None for the stored ones.

    Raises:
        UserError: if a field is out of range, or a field is set that no figure of the request reads.
    """

    models: Annotated[tuple[Any, ...], Field(min_length=1)]
    data: str | None = None
    suite: str | tuple[str, ...] | None = None
    tasks_data: str | None = None
    task_limit: Positive | None = None
    few_shot: Annotated[int, Field(ge=0)] | None = None
    text_data: str | None = None
    protocol: str = "heldout"
    field: str | None = None
    format: RowFormat | None = None
    on_bad_row: OnBadRow | None = None
    windows: Positive | None = None
    seqlen: Positive | None = None
    stride: Positive | None = None
    out: AnyPath = None
    names: str | tuple[str, ...] | None = None
    device: str = "auto"
    batch: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: WeightKind | None = None

    def __post_init__(self) -> None:
        if self.names is not None:
            object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else self.names)
            check_names(self.names, len(self.models))
        suite = self.measured
        if suite.loss and not self.data:
            reason = "the suite paper measures the held-out loss too" if self.suite else "there is nothing to measure"
            raise UserError(
                f"`data`: {reason}; name held-out text, e.g. shards:DIR or text:FILE, or a `suite` without it"
            )
        for name, readers in (
            ("text_data", suite.texts),
            ("tasks_data", suite.tasks),
            ("task_limit", suite.tasks),
            ("few_shot", suite.tasks),
        ):
            if getattr(self, name) is not None and not readers:
                raise UserError(f"`{name}`: nothing that is measured reads it; name a `suite` that does")

    @cached_property
    def measured(self) -> Suite:
        """The figures to measure."""
        from secateur.evaluation.suite import Suite

        if not self.suite:
            return Suite(loss=True)
        return Suite.parse(self.suite if isinstance(self.suite, str) else ",".join(self.suite), self.protocol)
