"""Pruning in several steps with recovery between them: how far each step goes, and the tokens of each recovery."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from secateur.errors import UserError
from secateur.formatting import percent, plural
from secateur.methods.base import LearnedMethod, Method, WeightMethod
from secateur.methods.selection import count_pruned
from secateur.model.shapes import SPACES, Shape, removed
from secateur.model.solver import solve_between
from secateur.pruning.pattern import Pattern
from secateur.pruning.target import Target

__all__ = [
    "IterationSchedule",
    "PruningStep",
    "describe_steps",
    "pruning_steps",
    "shares_removed",
    "split_steps",
    "split_tokens",
]

#: how the share removed grows from step to step
IterationSchedule = Literal["linear", "cubic"]

_DIGITS = 9  #: decimals of the ratio of a step
_SIZE_OF = {"kv": "kv_heads"}  #: spaces whose size has another name


@dataclass(frozen=True)
class PruningStep:
    """One of the steps in which a model is pruned."""

    target: Target  #: of this step, for the model that the step before left
    before: Shape
    after: Shape
    ratio: float  #: the share that is gone after this step, of what the whole target's ratio counts in the parent


def shares_removed(iterations: int, schedule: IterationSchedule = "linear") -> tuple[float, ...]:
    """The share of the whole removal that is done after each step; the last is 1.

    With t of N steps done, ``linear`` has t / N and ``cubic`` 1 - (1 - t / N)^3: the gradual schedule of
    arXiv:1710.01878, ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3``, from an initial sparsity of zero. It
    removes much at first, while there is much to spare, and less and less.
    """
    power = 3 if schedule == "cubic" else 1
    return (*(1 - (1 - step / iterations) ** power for step in range(1, iterations)), 1.0)


def split_tokens(tokens: int, iterations: int, tokens_per_step: int) -> tuple[int, ...]:
    """The tokens of each recovery: equal parts of whole optimizer steps, and the last one with what is left over.

    Raises:
        UserError: if there are fewer optimizer steps than recoveries.
    """
    steps = split_steps(tokens // tokens_per_step, iterations)
    if iterations > 1 and not steps[0]:
        whole = plural(tokens // tokens_per_step, "whole optimizer step")
        raise UserError(
            f"`iterations`: {plural(tokens, 'token')} give {whole} of {tokens_per_step:,}, too few for {iterations} "
            "recoveries; use fewer iterations, more tokens or a smaller tokens_per_step"
        )
    parts = [size * tokens_per_step for size in steps[:-1]]
    return (*parts, tokens - sum(parts))


def split_steps(steps: int, iterations: int) -> tuple[int, ...]:
    """The optimizer steps of each recovery: equal parts, and the last one with what is left over."""
    part = steps // iterations
    return (*[part] * (iterations - 1), steps - part * (iterations - 1))


def describe_steps(request: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Describe the steps of a plan in a line: the share that is gone after each, and the recovery between them."""
    records = summary["iterations"]
    shares = ", ".join(percent(record["ratio"]) for record in records)
    text = f"{len(records)} ({request['iteration_schedule']}), with {shares} gone after each"
    if "reconstruct" not in request:
        return f"{text}; no recovery between them"
    tuning = " + ".join(str(record["reconstruction"]["steps"]) for record in records)
    return f"{text}; {tuning} steps of reconstruction"


def pruning_steps(
    target: Target, method: Method, name: str, before: Shape, iterations: int, schedule: IterationSchedule = "linear"
) -> tuple[PruningStep, ...]:
    """Divide a target into steps; the last one reaches what the target reaches in one step.

    Ratios of all steps count parameters of the model before the first. Sparse methods keep earlier zeros, so that the
    ratio of a step counts those as well; N:M patterns drop one weight more or several in each group, as in 3:4, 2:4.
    Other targets pass through legal shapes (:func:`secateur.model.solver.solve_between`), each step near its ratio.

    Args:
        name: of the method.

    Raises:
        UserError: if the target does not suit the method or the model, cannot be divided, or a step removes nothing.
    """
    after = target.shape(before, method, name)
    if iterations == 1:
        return (PruningStep(target, before, after, _whole_ratio(target, method, before, after)),)
    if isinstance(method, LearnedMethod):
        raise UserError(f"`iterations`: {name} learns what to cut in one training run; leave it out")
    if target.allocates and method.granularity == "sparse":
        raise UserError(f"`iterations`: zeros are allocated ({target.allocation_name}) in one step; leave one out")
    if target.allocation == "global":
        raise UserError("`iterations`: layers of different width cannot be cut in steps; leave out `allocation` global")
    shares = shares_removed(iterations, schedule)
    if method.granularity == "sparse":
        return _sparse_steps(target, cast("WeightMethod", method), name, before, shares)
    return _cutting_steps(target, method, name, before, after, shares)


def _whole_ratio(target: Target, method: Method, before: Shape, after: Shape) -> float:
    """The ratio of a target, or the share that its shape or pattern comes to."""
    if method.granularity == "sparse":
        return target.sparsity
    return _removed(before, after, target.basis(method)) if target.ratio is None else target.ratio


def _removed(before: Shape, after: Shape, basis: str) -> float:
    """The share that a smaller shape lacks, counted as a target's ratio is."""
    return 1 - after.experts / before.experts if basis == "experts" else removed(before, after)[basis]


def _sparse_steps(
    target: Target, method: WeightMethod, name: str, before: Shape, shares: Sequence[float]
) -> tuple[PruningStep, ...]:
    """Steps of a sparse method: a ratio, or a pattern, for all the zeros that there are after each."""
    steps: list[PruningStep] = []
    groups = (
        {target.pattern.group} if target.pattern else {method.group_size(*s) for s in before.linear_sizes().values()}
    )
    zeros = dict.fromkeys(groups, 0)
    for number, share in enumerate(shares, start=1):
        now = target if share == 1 else _sparse_target(target, share)
        counts = {size: count_pruned(size, now.sparsity) for size in groups}
        if counts == zeros:
            raise UserError(_idle_step(number, len(shares), f"{name} compares {max(groups):,} weights at a time"))
        steps.append(PruningStep(now, before, before, now.sparsity))
        zeros = counts
    return tuple(steps)


def _sparse_target(target: Target, share: float) -> Target:
    """The target with a share of its zeros, rounded down to whole weights of a pattern's group."""
    ratio = round(target.sparsity * share, _DIGITS)
    if target.pattern is None:
        return dataclasses.replace(target, ratio=ratio)
    group = target.pattern.group
    return dataclasses.replace(target, ratio=None, pattern=Pattern(group - count_pruned(group, ratio), group))


def _cutting_steps(
    target: Target, method: Method, name: str, before: Shape, after: Shape, shares: Sequence[float]
) -> tuple[PruningStep, ...]:
    """Steps that cut layers, channels, heads or experts: sizes for each."""
    spaces, basis = [space for space in SPACES if before.units(space) != after.units(space)], target.basis(method)
    whole = _whole_ratio(target, method, before, after)
    steps: list[PruningStep] = []
    now = goal = before
    for number, share in enumerate(shares, start=1):
        ratio = round(whole * share, _DIGITS)
        narrow = solve_between(before, goal, after, ratio, spaces, basis, target.step) if share < 1 else after
        if narrow is None:
            reason = "there is no legal shape between this one and the target"
            raise UserError(_idle_step(number, len(shares), reason))
        goal = narrow
        sizes = {_SIZE_OF.get(space, space): goal.units(space) for space in spaces}
        step = Target(sizes=sizes, keep_pattern=target.keep_pattern, propagate=target.propagate)
        smaller = step.shape(now, method, name)
        steps.append(PruningStep(step, now, smaller, whole if share == 1 else _removed(before, goal, basis)))
        now = smaller
    if now != after:
        raise UserError(f"`iterations`: steps lead to {now}, not to {after} as one step does; prune in one step")
    return tuple(steps)


def _idle_step(number: int, iterations: int, reason: str) -> str:
    return (
        f"`iterations`: step {number} of {iterations} would remove nothing: {reason}; use fewer iterations or a larger "
        "ratio"
    )
