"""What to search for, and how: the request that Python and the command line share."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.config import AnyPath, Count, Offset, Positive, spec
from secateur.errors import UserError
from secateur.methods.base import LearnedMethod
from secateur.model.goal import Goal
from secateur.pruning.request import PruneRequest
from secateur.training.recipe import Recipe
from secateur.training.request import TrainRequest

__all__ = ["SearchRequest"]

_PRUNING = (
    *("model", "method", "params", "active_params", "memory", "context", "sequences", "weights", "axes", "step"),
    *("calibration", "windows", "seqlen", "batch", "device", "dtype"),
)
_TRAINING = ("data", "skip", "recipe", "teacher", "heldout_windows", "device", "dtype")


@spec
class SearchRequest:
    """A search: which model, down to what, by which method, with how much training.

    Attributes:
        model: a checkpoint directory or a Hub name.
        out: new directory to write.
        budget: tokens that all candidates in all rungs are trained on together, at most: ``"200M"``.
        data: ``shards:DIR``, as ``secateur data`` writes it, with a held-out split.
        method: a pruning method that changes the shape.
        params, active_params, memory, context, sequences, weights: the goal, as in ``PruneRequest``.
        axes, step: what is narrowed, and in which steps, likewise.
        candidates: shapes that are cut, at most.
        finalists: models that the last rung trains.
        calibration, windows, seqlen, batch: of the scoring, as in ``PruneRequest``.
        recipe: of every training, as in ``TrainRequest``.
        teacher: checkpoint to distil from, or ``logits:DIR``, likewise.
        skip: tokens of the data to leave out before the first.
        heldout_windows: windows that losses are measured on, at most.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of what is computed.

    Raises:
        UserError: if a field is out of range, or fields contradict each other or the method.
    """

    model: Any
    out: AnyPath
    budget: Count
    data: str
    method: str = "minitron-width"
    params: Any = None  # read by Goal, as the next five
    active_params: Any = None
    memory: Any = None
    context: Positive | None = None
    sequences: Positive | None = None
    weights: str | None = None
    axes: str | tuple[str, ...] | None = None
    step: Positive | None = None
    candidates: Annotated[int, Field(ge=2)] = 12
    finalists: Positive = 3
    calibration: Any = None
    windows: Positive | None = None
    seqlen: Positive | None = None
    batch: Positive | None = None
    recipe: Any = dataclasses.field(default_factory=Recipe)
    teacher: Any = None
    skip: Offset = 0
    heldout_windows: Positive = 256
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if self.finalists > self.candidates:
            raise UserError(f"`finalists`: {self.finalists} of {self.candidates} `candidates`; lower it")
        if self.params is self.active_params is self.memory is None:
            raise UserError("`params`: what should the shapes reach? Name `params`, `active_params` or `memory`")
        if isinstance(self.pruning.prototype, LearnedMethod):
            raise UserError(f"`method`: {self.method} learns each shape in a training of its own; use minitron-width")
        object.__setattr__(self, "recipe", self.training("model", "out", self.budget).recipe)

    @cached_property
    def pruning(self) -> PruneRequest:
        """The pruning that all candidates share."""
        return PruneRequest(out=self.out, **{name: getattr(self, name) for name in _PRUNING})

    @property
    def goal(self) -> Goal:
        """What the shapes reach."""
        assert self.pruning.goal is not None
        return self.pruning.goal

    def training(self, init: Path | str, out: Path | str, tokens: int) -> TrainRequest:
        """The training of one candidate in one rung."""
        fields = {name: getattr(self, name) for name in _TRAINING}
        return TrainRequest(init=init, out=out, tokens=tokens, points=1, **fields)
