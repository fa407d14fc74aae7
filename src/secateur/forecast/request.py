"""Which path to recommend, for which parent and budget: the request that Python and the command line share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.config import Count, Fraction, Positive, spec
from secateur.errors import UserError

__all__ = ["RecommendRequest"]

_Price = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Currency = Annotated[str, Field(pattern=r"^\S{1,8}$")]


@spec
class RecommendRequest:
    """A question: prune or train from scratch, at a budget.

    Attributes:
        ratio: share of the parent to remove.
        tokens: budget after pruning.
        params: parameters of the parent; or ``model``.
        model: the parent's config.json, its directory or a Hub name, for exact FLOPs.
        granularity: of the pruning; None for any.
        method: pruning method; None for any.
        parent: ``have``: the parent exists, its cost sunk; ``must-train``: it has to be trained.
        parent_tokens: tokens that the parent is trained on, or was; None where that is not known.
        children: pruned models that share the parent's cost.
        distill: whether the pruned model learns from the parent's outputs.
        study: folder of a study of the user's own; None for published figures.
        noise: standard deviation of a run's loss between seeds, in nats; None to estimate it from the runs.
        cost_per_hour: price of an accelerator.
        flops_per_second: FLOPs that it sustains in training.
        currency: of the price, as it is to be printed; None for USD.
        pilot: new file for a study that would sharpen the answer.
        like: study file whose corpus, parent and recipe the pilot takes over.

    Raises:
        UserError: if a field is out of range, or fields contradict each other.
    """

    ratio: Fraction
    tokens: Count
    params: Count | None = None
    model: Any = None
    granularity: Literal["depth", "width", "depth+width", "sparse"] | None = None
    method: str | None = None
    parent: Literal["have", "must-train"] = "have"
    parent_tokens: Count | None = None
    children: Positive = 1
    distill: bool = False
    study: Any = None
    noise: _Price | None = None
    cost_per_hour: _Price | None = None
    flops_per_second: _Price | None = None
    currency: _Currency | None = None
    pilot: Any = None
    like: Any = None

    def __post_init__(self) -> None:
        if (self.params is None) == (self.model is None):
            raise UserError("`params`: name the parent's parameters or its `model`, and not both")
        if self.like is not None and self.pilot is None:
            raise UserError("`like`: goes with `pilot`, which writes a study like that one")
        if self.must_train and self.parent_tokens is None:
            raise UserError("`parent`: a parent that must be trained needs its tokens: `parent_tokens`")
        if self.children != 1 and not self.must_train:
            raise UserError("`children`: they share the parent's cost, which is sunk unless `parent` is must-train")
        if (self.cost_per_hour is None) != (self.flops_per_second is None):
            missing = "flops_per_second" if self.flops_per_second is None else "cost_per_hour"
            raise UserError(f"`{missing}`: is missing; money needs both an accelerator's price and its speed")
        if self.currency is not None and self.cost_per_hour is None:
            raise UserError("`currency`: is that of a price; set `cost_per_hour` as well")

    @property
    def must_train(self) -> bool:
        """Whether the parent has to be trained."""
        return self.parent == "must-train"
