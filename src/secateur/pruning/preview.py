"""What a configuration would be after pruning: legal shapes near a target, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from secateur.config import Positive, spec
from secateur.errors import UserError
from secateur.hub import local_checkpoint
from secateur.model.config_file import read_shape
from secateur.model.description import describe_shape, flops_context
from secateur.model.frontier import check_reachable, frontier
from secateur.model.goal import Goal
from secateur.model.shapes import SPACES, Shape, removed
from secateur.model.solver import solve_depth, solve_experts, solve_width
from secateur.pruning.goals import complete_target, describe_candidates
from secateur.pruning.target import Target

__all__ = ["Preview", "ShapesRequest", "preview_shapes"]

#: The ways to a ratio that stand side by side -> the spaces that are narrowed; none: layers are removed.
_WAYS = {"depth": (), "width": ("hidden", "ffn"), "heads": ("ffn", "kv")}


@spec
class ShapesRequest:
    """A configuration, and the target that it would be pruned to.

    Attributes:
        model: config.json, a directory that has one, or a Hub name.
        ratio: share to remove, or several.
        of: parameters that the ratio counts; None for those outside the embeddings.
        shape: sizes to reach instead: ``"hidden=3072,ffn=9216"``.
        axes: spaces to narrow.
        step: multiple that hidden and FFN sizes are rounded to; None for the default steps.
        method: the shape that this method would reach.
        params, active_params, memory: what to reach instead of a ratio, as in ``PruneRequest``.
        sequences, weights: how the model is served, for ``memory``.
        context: window that FLOPs per token are averaged over, and the tokens of each sequence for ``memory``; None
            for 2048, or the model's limit if less.

    Raises:
        UserError: if a field is out of range, or fields contradict each other or the method.
    """

    model: Any
    ratio: Any = None  # checked by Target
    of: Literal["total", "non-embedding"] | None = None
    shape: str | None = None
    axes: str | None = None
    step: Positive | None = None
    method: str | None = None
    params: Any = None  # read by Goal, as the next two
    active_params: Any = None
    memory: Any = None
    sequences: Positive | None = None
    weights: str | None = None
    context: Positive | None = None

    def __post_init__(self) -> None:
        target = self.targets[0]
        if target.ratio is None and not target.sizes and not target.goal and (self.method or target.axes):
            field = "method" if self.method else "axes"
            raise UserError(f"`{field}`: goes with a `ratio`; say how much to remove")
        if self.prototype is not None:
            target.check(self.prototype, str(self.method))

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """One target for each ratio."""
        fields = {"of": self.of, "shape": self.shape, "axes": self.axes, "step": self.step}
        return Target.parse_several(self.ratio, goal=self.goal, **fields)

    @cached_property
    def goal(self) -> Goal | None:
        """Parameters or memory to reach; None where the request names none."""
        names = ("params", "active_params", "memory", "sequences", "weights", "context")
        return Goal.parse(**{name: getattr(self, name) for name in names})

    @cached_property
    def prototype(self) -> Any:
        """The method; None where the request names none."""
        from secateur.methods.registry import get_method

        return get_method(self.method) if self.method else None


@dataclass(frozen=True)
class Preview:
    """A model's description, and those of what it would be pruned to."""

    model: str
    context: int  #: window that FLOPs per token are averaged over
    before: dict[str, Any]  #: the model's own description (:func:`describe_shape`)
    #: one entry for each target: a description with ``removed``, ``asked``, ``of``, ``drift`` and ``note``; or, where
    #: several ways to the ratio are open, ``targets``: way -> such a description, or its ``error``
    outputs: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur shapes --json`` prints them."""
        if not self.outputs:
            return {"model": self.model, **self.before}
        if len(self.outputs) == 1:
            return {"model": self.model, **self.outputs[0]}
        return {"model": self.model, "outputs": self.outputs}


def preview_shapes(request: ShapesRequest) -> Preview:
    """Count parameters, FLOPs and KV cache of a model and of each target.

    Raises:
        UserError: if there is no such configuration, or no legal shape near a target.
    """
    path = Path(request.model)
    if not path.is_file() and path.suffix != ".json":
        path = local_checkpoint(request.model, weights=False) / "config.json"
    before, positions = read_shape(path)
    context = flops_context(request.context, positions)
    description = describe_shape(before, context)
    first = request.targets[0]
    outputs = []
    if first.ratio is not None or first.sizes or first.goal:
        outputs = [_preview(before, description, target, request, context) for target in request.targets]
    return Preview(str(request.model), context, description, outputs)


def _preview(
    before: Shape, description: Mapping[str, Any], target: Target, request: ShapesRequest, context: int
) -> dict[str, Any]:
    """Describe one target, or each way to it where several are open."""
    if target.sizes or target.axes or request.prototype is not None:
        return {**_single(before, target, request, context), "before": description}
    if target.goal:
        check_reachable(before, target.goal)
    ways = _ways(before, target, context)
    return {**description, **_request(target), "targets": ways}


def _single(before: Shape, target: Target, request: ShapesRequest, context: int) -> dict[str, Any]:
    if (method := request.prototype) is not None:
        target = complete_target(target, before, method, str(request.method))
        after = target.shape(before, method, str(request.method))
        sparse = method.granularity == "sparse"
        if sparse:
            return _zeroed(before, target, context)
        return _describe(before, after, target, context, target.basis(method))
    if target.sizes:
        return _describe(before, target.explicit_shape(before), target, context)
    spaces = [space for space in SPACES if space in target.axes]
    if target.goal:
        return _at_goal(before, target, spaces, context)
    assert target.ratio is not None
    after = solve_width(before, target.ratio, spaces, target.of or "non_embedding", target.step)
    return _describe(before, after, target, context)


def _describe(before: Shape, after: Shape, target: Target, context: int, basis: str | None = None) -> dict[str, Any]:
    """Describe what a model becomes.

    Args:
        basis: what the ratio is a share of, where the method decides it.
    """
    note = None
    try:
        opened = after.openable(where="note")
    except UserError as error:  # transformers does not open it, and it can be counted all the same
        opened, note = after, str(error).removeprefix("note: ")
    if opened.family != before.family:
        note = (
            f"transformers refuses a {before.family.name} of hidden size {after.hidden} with {after.heads} heads of "
            f"{after.head_dim}: such a checkpoint is written with model_type {opened.family.model_types[0]}"
        )
    shares = removed(before, after)
    of = None if target.ratio is None else basis or target.of or "non_embedding"
    goal = target.goal
    memory = {"memory": goal.memory_of(opened).record()} if goal and goal.kind == "memory" else {}
    if of == "experts":
        shares["experts"] = 1 - after.experts / before.experts
        note = note or "experts: the ratio is a share of the routed experts"
    return {
        **describe_shape(opened, context),
        **memory,
        "removed": shares,
        "asked": goal.record() if goal else target.ratio if of else dict(target.sizes),
        "of": of,
        "drift": shares[of] - target.ratio if of and target.ratio is not None else None,
        "note": note,
    }


def _zeroed(before: Shape, target: Target, context: int) -> dict[str, Any]:
    """Describe zeroing single weights: the shape stays."""
    zeros = target.sparsity * before.block_weights
    return {
        **describe_shape(before, context),
        "removed": {"total": zeros / before.total, "non_embedding": zeros / before.non_embedding},
        "asked": target.ratio,
        "of": "block_weights",
        "drift": None,
        "note": "single weights are zeroed: shape, FLOPs and KV cache stay; shares before rounding to whole weights",
    }


def _ways(before: Shape, target: Target, context: int) -> dict[str, dict[str, Any]]:
    """Each way to the ratio, or its ``error``.

    Raises:
        UserError: if there is no way at all.
    """
    of = target.of or "non_embedding"
    ways: dict[str, dict[str, Any]] = {}
    experts = {"experts": ("experts",)} if before.layers_with("experts") else {}
    all_spaces = {"all": ("layers", "hidden", "ffn", "kv", "experts")} if target.goal else {}
    what = f"`{target.goal.kind}`" if target.goal else f"`ratio` {target.ratio:g}"
    for way, spaces in {**_WAYS, **experts, **all_spaces}.items():
        spaces = tuple(space for space in spaces if space in ("layers", "hidden") or before.layers_with(space))
        if way == "heads" and "kv" not in spaces:
            continue
        try:
            if target.goal:
                ways[way] = _at_goal(before, target, spaces or ("layers",), context)
                continue
            assert target.ratio is not None
            if way == "experts":
                after = solve_experts(before, target.ratio)
                ways[way] = _describe(before, after, target, context, "experts")
                continue
            if spaces:
                after = solve_width(before, target.ratio, spaces, of, target.step)
            else:
                after = solve_depth(before, target.ratio, of)
            ways[way] = _describe(before, after, target, context)
        except UserError as error:
            ways[way] = {"error": str(error).removeprefix(f"{what}: ")}
    if all("error" in result for result in ways.values()):
        reasons = "; ".join(f"{way}: {result['error']}" for way, result in ways.items())
        raise UserError(f"{what}: {reasons}")
    return ways


def _at_goal(before: Shape, target: Target, spaces: Sequence[str], context: int) -> dict[str, Any]:
    """Describe what the model becomes at a goal, with the other shapes that reach it."""
    assert target.goal is not None
    spaces = [space for space in spaces if not before.family.uncut_reason(space)]
    if not spaces:
        raise UserError(f"`{target.goal.kind}`: of {before.family.name} none of these axes can be cut")
    candidates = frontier(before, target.goal, spaces, step=target.step)
    first, goal = candidates[0].shape, target.goal
    text = describe_candidates(before, goal, candidates)
    text += goal.memory_of(first).formula(first) if goal.kind == "memory" else []
    records = [candidate.record() for candidate in candidates]
    return {**_describe(before, first, target, context), "candidates": records, "text": text}


def _request(target: Target) -> dict[str, Any]:
    """What was asked for, as plain values."""
    if target.goal:
        return {"asked": target.goal.record(), "of": None}
    return {"asked": target.ratio, "of": target.of or "non_embedding"}
