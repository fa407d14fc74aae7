"""From a goal to legal shapes: those that reach it, and the one that narrows its spaces most alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UserError
from secateur.formatting import count, join_words, plural
from secateur.model.goal import TOLERANCE, Goal
from secateur.model.shapes import Shape
from secateur.model.solver import largest, prefer_blocks, steps_of
from secateur.progress import notify_once

__all__ = ["Candidate", "check_reachable", "frontier"]

_MOST_SHAPES = 2_000_000  #: combinations of sizes that are counted
_MOST_NARROW = 2.5  #: largest logarithm of a share that a space loses, over that of the balanced shape


@dataclass(frozen=True)
class Candidate:
    """A legal shape at a goal."""

    shape: Shape
    amount: float  #: what it has of the goal's kind
    sizes: Mapping[str, int]  #: sizes that differ from the model's own, as in ``hidden=3072,ffn=9216``

    @property
    def axes(self) -> str:
        """The sizes in one line."""
        return ",".join(f"{name}={size}" for name, size in self.sizes.items())

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {"sizes": dict(self.sizes), "parameters": self.shape.total, "amount": self.amount}


def frontier(
    shape: Shape,
    goal: Goal,
    spaces: Sequence[str],
    *,
    step: int | None = None,
    several: int = 6,
    amounts: Callable[[Shape], Any] | None = None,
    smallest: Mapping[str, int] | None = None,
) -> list[Candidate]:
    """Legal shapes at a goal, the one to take first.

    Of the shapes within half the tolerance of the goal (of memory: below it), the first is the one whose spaces keep
    the most similar shares, as for a ratio (:func:`secateur.model.solver.solve_width`). Each further one is the
    farthest from those before it, by the logarithms of the shares that its spaces keep.

    Args:
        spaces: which of layers, hidden, ffn, kv, experts and expert_ffn may shrink.
        step: hidden and FFN sizes are multiples of it; None for the default steps.
        several: candidates at most.
        amounts: what shapes have of the goal, for a latency; a shape with arrays for sizes gives an array.
        smallest: units of a space that no candidate goes below.

    Raises:
        UserError: if the goal lies above the model's own, below what it cannot lose, or between two steps.
    """
    amounts = amounts or goal.amount_of
    check_reachable(shape, goal)
    steps = steps_of(shape, spaces, step)
    sizes = _coarse([_units(shape, space, steps[space], (smallest or {}).get(space, 1)) for space in spaces], spaces)
    grid = np.ix_(*sizes)
    every: Any = shape
    for space, each in zip(spaces, grid, strict=True):
        every = every.narrowed(space, each)
    amount = np.broadcast_to(np.asarray(amounts(every), dtype=float), tuple(map(len, sizes)))
    legal = np.broadcast_to(~np.asarray(every.refused_by_config), amount.shape).copy()
    legal.flat[-1] = False  # the shape itself
    drift = np.abs(amount / goal.amount - 1)
    fits = legal & ((amount <= goal.amount) if goal.kind == "memory" else True)
    least = float(np.min(drift, initial=np.inf, where=fits))
    tolerance = TOLERANCE[goal.kind]
    if least > tolerance:
        embedding = ""
        if goal.kind in ("params", "active_params") and goal.amount <= shape.embedding:
            embedding = f" (the embeddings have {count(shape.embedding)} of the model's parameters)"
        raise UserError(f"`{goal.kind}`: {_nearest(goal, amount[legal], spaces, steps)}{embedding}")
    near = np.flatnonzero(fits & (drift <= max(least, tolerance / 2)))
    logs = [np.log(each / shape.units(space)) for space, each in zip(spaces, grid, strict=True)]
    unlike = np.broadcast_to(largest(logs) + largest([-part for part in logs]), amount.shape)
    preferred = prefer_blocks(shape, spaces, grid, near, unlike) if step is None else near
    best = min(preferred, key=lambda i: (round(float(unlike.flat[i]), 9), float(drift.flat[i])))
    shares = np.stack([np.broadcast_to(part, amount.shape).reshape(-1)[near] for part in logs], axis=1)
    indices = near[_spread(shares, int(np.flatnonzero(near == best)[0]), several)]
    return [_candidate(shape, spaces, sizes, amount, int(index)) for index in indices]


def check_reachable(shape: Shape, goal: Goal) -> None:
    """Refuse a goal that no cut of a model comes to, and say what is assumed of a context.

    Raises:
        UserError: if the goal lies above the model's own, or what it counts is not in the model.
    """
    whole = float("inf") if goal.kind == "latency" else float(goal.amount_of(shape))
    if goal.amount >= whole:
        raise UserError(f"`{goal.kind}`: {goal.text(goal.amount)}: the model has {goal.text(whole)}, nothing is to go")
    if goal.kind in ("params", "active_params") and goal.amount <= shape.embedding // shape.hidden:
        raise UserError(
            f"`{goal.kind}`: {goal.text(goal.amount)}: less than an embedding with one hidden channel; the model's has "
            f"{count(shape.embedding)} parameters"
        )
    if goal.kind == "active_params" and not shape.experts:
        raise UserError("`active_params`: this model has no routed experts, so a token uses all; use `params`")
    if goal.kind != "memory":
        return
    context, limit = goal.memory_of(shape).serving.context, shape.positions
    if goal.context is None:
        notify_once(f"`context`: none is named; memory is that of {plural(context, 'token')} of each sequence")
    elif limit and context > limit:
        notify_once(f"`context`: the model has {limit:,} positions; memory is that of {plural(context, 'token')} still")
    if shape.carries_state:
        raise UserError(
            "`memory`: some layers of this model carry a state along the text, whose size is not computed; use `params`"
        )


def _units(shape: Shape, space: str, step: int, smallest: int) -> NDArray[np.int64]:
    """The numbers of units that a space may have, its own last."""
    units = shape.units(space)
    least = max(smallest, step, shape.least_experts if space == "experts" else 1)
    return np.array([*(n for n in range(step, units, step) if n >= least), units])


def _coarse(sizes: list[NDArray[np.int64]], spaces: Sequence[str]) -> list[NDArray[np.int64]]:
    """Every other size of the space with the most, until the combinations can be counted."""
    while np.prod([len(each) for each in sizes], dtype=float) > _MOST_SHAPES:
        widest = max(range(len(sizes)), key=lambda i: len(sizes[i]))
        sizes[widest] = sizes[widest][::-1][::2][::-1]
        notify_once(f"{spaces[widest]}: every other size is left out, since there are too many combinations")
    return sizes


def _spread(shares: NDArray[np.float64], first: int, several: int) -> list[int]:
    """Rows of ``shares``: the first one, then the farthest from all before, as far as none is too narrow."""
    bound = _MOST_NARROW * shares[first].min()
    allowed = shares.min(axis=1) >= bound
    rows, distance = [first], np.full(len(shares), np.inf)
    while len(rows) < several:
        distance = np.minimum(distance, np.abs(shares - shares[rows[-1]]).max(axis=1))
        farthest = int(np.argmax(np.where(allowed, np.round(distance, 9), -1.0)))
        if distance[farthest] <= 1e-9 or not allowed[farthest]:
            break
        rows.append(farthest)
    return rows


def _candidate(
    shape: Shape, spaces: Sequence[str], sizes: Sequence[NDArray[np.int64]], amount: NDArray[np.float64], index: int
) -> Candidate:
    narrow, changes = shape, {}
    for space, each, at in zip(spaces, sizes, np.unravel_index(index, amount.shape), strict=True):
        units = int(each[at])
        narrow = narrow.narrowed(space, units)
        if units != shape.units(space):
            changes["kv_heads" if space == "kv" else space] = units
    return Candidate(narrow, float(amount.flat[index]), changes)


def _nearest(goal: Goal, amount: NDArray[np.float64], spaces: Sequence[str], steps: Mapping[str, int]) -> str:
    """Why no shape reaches the goal, with the nearest that there are."""
    what = f"{goal.text(goal.amount)}: cutting {join_words(list(spaces))}"
    if not amount.size:
        return f"{what} leaves no legal shape"
    below, above = amount[amount <= goal.amount], amount[amount > goal.amount]
    if not below.size:
        return f"{what} leaves {goal.text(float(above.min()))} at least; cut more axes with `axes`, or aim higher"
    ends = [goal.text(float(below.max())), *([goal.text(float(above.min()))] if above.size else [])]
    remedy = (
        " or take a smaller `step`" if {"hidden", "ffn", "expert_ffn"} & {*spaces} and max(steps.values()) > 1 else ""
    )
    return f"{what} falls between two steps; the nearest are {join_words(ends)}; aim at one of these{remedy}"
