"""From a goal to the sizes of a target, and what a plan reached of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError
from secateur.formatting import count, percent
from secateur.methods.base import Method
from secateur.model.frontier import Candidate, frontier
from secateur.model.goal import Goal
from secateur.model.shapes import Shape
from secateur.progress import notify_once
from secateur.pruning.default_axes import with_default_axes
from secateur.pruning.target import Target

if TYPE_CHECKING:
    from secateur.model.plan import Plan

__all__ = ["complete_target", "describe_candidates", "describe_reached", "goal_spaces", "reached"]


def complete_target(
    target: Target,
    before: Shape,
    method: Method,
    name: str,
    *,
    amounts: Callable[[Shape], Any] | None = None,
    smallest: Mapping[str, int] | None = None,
) -> Target:
    """A target with the axes that suit a model and, for a goal, the sizes that reach it.

    The candidates and the one that is taken are printed. A target without a goal, or with sizes, gets no sizes.

    Args:
        amounts: what shapes have of a latency goal; see :func:`secateur.model.frontier.frontier`.
        smallest: units of a space that no candidate goes below.

    Raises:
        UserError: if the target does not suit the method, or no legal shape reaches the goal.
    """
    target = with_default_axes(target, before, method, name)
    goal = target.goal
    if goal is None or target.sizes:
        return target
    if goal.kind == "latency" and amounts is None:
        raise UserError("`latency`: is measured on a device, so that no shape follows from it here; use `shape`")
    target.check(method, name)
    target.check_family(before, method, name)
    spaces = goal_spaces(target, method)
    candidates = frontier(before, goal, spaces, step=target.step, amounts=amounts, smallest=smallest)
    lines = [f"goal: {goal.description}", *describe_candidates(before, goal, candidates)]
    if goal.kind == "memory":
        first = candidates[0].shape
        lines += goal.memory_of(first).formula(first)
    for line in lines:
        notify_once(line)
    if goal.kind == "latency":
        goal = dataclasses.replace(goal, predicted=candidates[0].amount)
    return dataclasses.replace(target, sizes=candidates[0].sizes, axes=(), goal=goal)


def goal_spaces(target: Target, method: Method) -> tuple[str, ...]:
    """The spaces that a method may cut to reach a goal."""
    fixed = {"depth": ("layers",), "experts": ("experts",)}
    return fixed.get(method.granularity) or target.spaces(method)


def describe_candidates(before: Shape, goal: Goal, candidates: Sequence[Candidate]) -> list[str]:
    """One line for each candidate, after one that says why the first is taken."""
    lines = ["legal shapes that reach it; the first is taken, since its axes keep the most similar shares:"]
    for candidate in candidates:
        total = candidate.shape.total
        figures = f"{count(total)} parameters ({percent(total / before.total)})"
        if goal.kind != "params":
            figures += f", {goal.text(candidate.amount)}"
        lines.append(f"  {candidate.axes}: {figures}")
    return lines


def reached(plan: Plan, measured: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The goal of a plan and what its shape has of it; None for a plan without a goal.

    Args:
        measured: of a latency, what was predicted and measured.

    Returns:
        The fields of the goal, and ``reached``: parameters, bytes, or the measured share; of memory also the parts.
    """
    if "goal" not in plan.request:
        return None
    goal, shape = Goal(**plan.request["goal"]), plan.after
    if shape.windows and len(shape.windows) != shape.layers:
        windows = tuple(shape.windows[layer] for layer in plan.keep_layers.tolist())
        shape = dataclasses.replace(shape, windows=windows)
    record = goal.record()
    if goal.kind == "latency":
        return {**record, "reached": None, **(measured or {})}
    record["reached"] = int(goal.amount_of(shape))
    return record | ({"memory": goal.memory_of(shape).record()} if goal.kind == "memory" else {})


def describe_reached(record: Mapping[str, Any]) -> str:
    """What was reached of a goal (:func:`reached`), in words."""
    goal = Goal(**{key: record[key] for key in record if key in {field.name for field in dataclasses.fields(Goal)}})
    if record["reached"] is None:
        return "not measured"
    return goal.text(record["reached"]) + (f" ({record['how']})" if "how" in record else "")
