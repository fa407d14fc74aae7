"""Successive halving at matched FLOPs (Jamieson and Talwalkar, arXiv:1502.07943): who trains how long in each rung.

Every rung trains its models from the cut weights on, with the whole schedule of the recipe. The better half goes to the
next one, which has twice the FLOPs for each model. So the losses that are compared belong to finished schedules, and
no run inherits a learning rate that had already fallen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import UserError
from secateur.formatting import count, plural, scientific

__all__ = ["Rung", "plan_rungs"]


@dataclass(frozen=True)
class Rung:
    """One round of training."""

    models: int
    flops: float  #: of each model
    tokens: tuple[int, ...]  #: that every candidate would be trained on: as many as have these FLOPs

    @property
    def most_tokens(self) -> int:
        """Tokens of the whole rung, if the cheapest candidates are in it."""
        return sum(sorted(self.tokens)[-self.models :])

    def record(self) -> dict[str, Any]:
        """Plain values."""
        ends = [min(self.tokens), max(self.tokens)]
        return {"models": self.models, "tokens_each": ends, "flops_each": self.flops, "flops": self.models * self.flops}

    def __str__(self) -> str:
        low, high = (count(end) for end in (min(self.tokens), max(self.tokens)))
        each = low if low == high else f"{low} to {high}"
        return (
            f"{plural(self.models, 'model')}, {each} tokens each, {scientific(self.models * self.flops)} FLOPs together"
        )


def plan_rungs(budget: int, costs: Sequence[float], finalists: int, step: int) -> list[Rung]:
    """Divide a budget of tokens among rungs, each of half the models and twice the FLOPs for each.

    Args:
        budget: tokens of all models in all rungs, at most.
        costs: FLOPs of a token, for each candidate.
        finalists: models of the last rung; where there are no more candidates, there is one rung.
        step: tokens of an optimizer step, of which each model takes at least one in each rung.

    Raises:
        UserError: if the budget is too small for that.
    """
    sizes = [len(costs)]
    while sizes[-1] > finalists:
        sizes.append(max(finalists, math.ceil(sizes[-1] / 2)))
    shares = sum(size * 2**number for number, size in enumerate(sizes))
    first, spread = budget // shares, max(costs) / min(costs)
    smallest = int(first / spread)
    if smallest < step:
        enough = shares * (math.ceil(step * spread) + 1)
        raise UserError(
            f"`budget`: {plural(budget, 'token')} leave the first of {plural(len(sizes), 'rung')} {smallest:,} for "
            f"each model, less than one step of {step:,}; give {enough:,} or more, or fewer `candidates`"
        )
    flops = [first * 2**number * min(costs) for number in range(len(sizes))]
    return [
        Rung(size, each, tuple(int(each / cost + 1e-6) for cost in costs))
        for size, each in zip(sizes, flops, strict=True)
    ]
