"""The target of pruning: a share of the parameters, a shape, an N:M pattern of zeros, or a goal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from secateur.calibration.statistics import GradientStatistic
from secateur.config import as_share
from secateur.errors import UserError, did_you_mean
from secateur.formatting import plural
from secateur.methods.selection import count_pruned
from secateur.model.goal import Goal
from secateur.model.shapes import SIZES, SPACES, Shape, Share
from secateur.model.solver import explicit, solve_depth, solve_experts, solve_width
from secateur.pruning.pattern import Pattern

if TYPE_CHECKING:
    from secateur.methods.base import Method, WeightMethod

__all__ = ["Allocation", "Propagate", "Target"]

#: how channels, or the zeros of sparse methods, are distributed over layers
Allocation = Literal["uniform", "global", "owl", "alpha", "evolve"]
Propagate = Literal["unpruned", "pruned"]  #: which outputs of a block the next one is scored on


@dataclass(frozen=True)
class Target:
    """How much to prune: a ratio, sizes, a pattern, or a goal.

    Attributes:
        ratio: share to remove, in (0, 1): of parameters for depth and width, of the block linears' weights for sparse
            methods.
        of: parameters that the ratio counts; None for those outside the embeddings.
        sizes: sizes of the shape to reach, e.g. ``{"hidden": 3072}``.
        pattern: of the zeros, for sparse methods; it implies the ratio.
        axes: spaces to shrink, for methods that score several; empty for the method's default.
        allocation: ``uniform``: every layer keeps as many units; ``global``: layers compete. For sparse methods also
            ``owl``, ``alpha`` and ``evolve`` (:mod:`secateur.pruning.allocation`).
        step: hidden and FFN sizes are rounded to multiples of it; None for the default steps.
        keep_pattern: whether depth methods keep the period of the layer kinds; None for yes, where the family has one
            and the model follows it.
        propagate: for methods that remove experts: whether a block is scored on the outputs of the blocks before it as
            they are (``unpruned``), or with their kept experts alone (``pruned``).
        layer_ratios: share of zeros of each layer, for sparse methods, in place of a ratio; empty for none. Messages
            call it ``ratios_by_layer``.
        goal: parameters, memory or latency to reach; with ``sizes``, those that it came to for a model
            (:func:`secateur.pruning.goals.complete_target`).

    Raises:
        UserError: on a value out of range or a contradiction between fields. Messages call ``sizes`` ``shape``, the
            name that requests use.
    """

    ratio: float | None = None
    of: Share | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    pattern: Pattern | None = None
    axes: tuple[str, ...] = ()
    allocation: Allocation = "uniform"
    step: int | None = None
    keep_pattern: bool | None = None
    propagate: Propagate = "unpruned"
    goal: Goal | None = None
    layer_ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", dict(self.sizes))
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "layer_ratios", tuple(self.layer_ratios))
        if self.ratio is not None and not (isinstance(self.ratio, Real) and 0 < self.ratio < 1):
            raise UserError(f"`ratio` must be between 0 and 1, got {self.ratio!r}")
        for name, choice, choices in (
            ("of", self.of, (None, *get_args(Share))),
            ("allocation", self.allocation, get_args(Allocation)),
            ("propagate", self.propagate, get_args(Propagate)),
        ):
            if choice not in choices:
                raise UserError(f"`{name}`: {choice!r} is not known{did_you_mean(choice, filter(None, choices))}")
        if self.pattern is not None and not isinstance(self.pattern, Pattern):
            raise UserError(f"`pattern` must be a Pattern, e.g. Pattern(2, 4), got {self.pattern!r}")
        _check_sizes(self.sizes)
        _check_axes(self.axes)
        self._check_consistent()

    def _check_consistent(self) -> None:
        """Refuse fields that contradict each other for every method."""
        if self.ratio is not None and self.sizes:
            raise UserError("`shape` and `ratio` both say how much to remove; leave one out")
        if self.pattern and self.sizes:
            raise UserError("`shape` and `pattern` both say how much to remove; leave one out")
        if self.pattern and self.ratio is not None and abs(self.sparsity - self.ratio) > 1e-9:
            raise UserError(
                f"`ratio` {self.ratio:g}: `pattern` {self.pattern} removes {self.sparsity:g}; leave one out"
            )
        if self.layer_ratios:
            self._check_layer_ratios()
        for name, value in (("ratio", self.ratio), ("pattern", self.pattern)):
            if self.goal and value is not None:
                raise UserError(f"`{self.goal.kind}` and `{name}` both say how much to remove; leave one out")
        if self.of and self.ratio is None:
            raise UserError("`of` says what a `ratio` counts, and there is no ratio; leave it out")
        if self.axes and self.sizes:
            raise UserError("`axes`: `shape` already says what to narrow; leave it out")
        if self.step is not None and self.step < 1:
            raise UserError(f"`step` must be a whole number above zero, got {self.step}")
        if self.step and self.ratio is None and self.goal is None:
            raise UserError("`step` rounds the sizes that a `ratio` comes to, and there is no ratio; leave it out")

    def _check_layer_ratios(self) -> None:
        """Refuse ratios of layers that are out of range, or beside another amount."""
        others = {"ratio": self.ratio, "shape": self.sizes, "pattern": self.pattern, "goal": self.goal}
        for name, value in others.items():
            if value:
                name = self.goal.kind if self.goal and name == "goal" else name
                raise UserError(f"`ratios_by_layer` and `{name}` both say how much to remove; leave one out")
        if self.allocation != "uniform":
            raise UserError(f"`allocation` {self.allocation}: `ratios_by_layer` allocates the zeros; leave one out")
        for ratio in self.layer_ratios:
            if not (isinstance(ratio, Real) and not isinstance(ratio, bool) and 0 <= ratio < 1):
                raise UserError(f"`ratios_by_layer`: {ratio!r} is not a share of at least 0 and below 1")
        if not any(self.layer_ratios):
            raise UserError("`ratios_by_layer`: all are 0, so nothing would go")

    @classmethod
    def parse(
        cls,
        *,
        ratio: float | None = None,
        of: str | None = None,
        shape: str | Mapping[str, int] | None = None,
        pattern: str | None = None,
        axes: str | Sequence[str] | None = None,
        allocation: Allocation = "uniform",
        step: int | None = None,
        keep_pattern: bool | None = None,
        propagate: Propagate = "unpruned",
        goal: Goal | None = None,
        layer_ratios: Sequence[float] = (),
    ) -> Target:
        """Read a target from the texts of a command line or a study file, or from plain values.

        Args:
            shape: e.g. ``hidden=3072,ffn=9216``, or a mapping.
            pattern: e.g. ``2:4``.
            axes: e.g. ``kv,ffn``, or a sequence.

        Raises:
            UserError: if a field cannot be read, or contradicts another one.
        """
        if goal and shape:
            raise UserError(f"`{goal.kind}` and `shape` both say how much to remove; leave one out")
        return cls(
            ratio,
            cast("Share | None", of and of.replace("-", "_")),
            _parse_sizes(shape) if isinstance(shape, str) else shape or {},
            Pattern.parse(pattern) if pattern is not None else None,
            tuple(part.strip() for part in axes.split(",")) if isinstance(axes, str) else tuple(axes or ()),
            allocation,
            step,
            keep_pattern,
            propagate,
            goal,
            tuple(layer_ratios),
        )

    @classmethod
    def parse_several(cls, ratio: Any, **fields: Any) -> tuple[Target, ...]:
        """Read a target for a ratio, or one for each of several; ``fields`` are the other fields of :meth:`parse`."""
        ratios = ratio if isinstance(ratio, tuple | list) else (ratio,)
        try:
            ratios = [as_share(value) for value in ratios]
        except ValueError as error:
            raise UserError(f"`ratio` {error}") from None
        if not ratios:
            raise UserError("`ratio`: is empty; name one ratio or several")
        if len(set(ratios)) < len(ratios):
            raise UserError("`ratio`: names a ratio twice")
        return tuple(cls.parse(ratio=value, **fields) for value in ratios)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values; part of the identity of a study's stages.

        ``step``, ``keep_pattern``, ``propagate`` and ``goal`` have no entry where they have their defaults, as in older
        identities.
        """
        late = {"step": self.step, "keep_pattern": self.keep_pattern}
        late |= {"goal": self.goal.record() if self.goal else None}
        late |= {"layer_ratios": list(self.layer_ratios) or None}
        late |= {"propagate": self.propagate if self.propagate != "unpruned" else None}
        return {
            "ratio": self.ratio,
            "of": self.of,
            "sizes": dict(self.sizes),
            "pattern": str(self.pattern) if self.pattern else None,
            "axes": list(self.axes),
            "allocation": self.allocation,
            **{key: value for key, value in late.items() if value is not None},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Target:
        """Rebuild the target that :meth:`as_dict` describes."""
        pattern = Pattern.parse(fields["pattern"]) if fields["pattern"] else None
        goal = {"goal": Goal(**fields["goal"])} if fields.get("goal") else {}
        return cls(**{**fields, "pattern": pattern, **goal})

    def check(self, method: Method, name: str) -> None:
        """Refuse a target that does not suit the method.

        Raises:
            UserError: naming the field at fault.
        """
        kind, sparse = method.granularity, method.granularity == "sparse"
        if kind == "experts" and self.of:
            raise UserError(f"`of`: a ratio for {name} always counts routed experts; leave it out")
        if sparse and self.sizes:
            raise UserError(f"`shape`: {name} zeroes single weights and keeps the shape; pass `ratio` or `pattern`")
        if sparse and self.of:
            raise UserError(f"`of`: a ratio for {name} always counts the weights of the blocks' linears; leave it out")
        if sparse and self.goal:
            raise UserError(
                f"`{self.goal.kind}`: {name} zeroes single weights, which are stored and computed all the same; use a "
                "method that removes layers, channels or experts, or pass `ratio`"
            )
        if self.goal and self.allocation == "global":
            raise UserError(
                f"`allocation` global: pads layers with zeros, which count in `{self.goal.kind}`; leave it out"
            )
        if self.pattern and not sparse:
            raise UserError(f"`pattern`: {name} removes {_UNITS.get(kind, 'channels')}, not weights")
        if self.layer_ratios and not sparse:
            raise UserError(f"`ratios_by_layer`: goes with sparse methods, and {name} is none; leave it out")
        if self.ratio is None and not (self.sizes or self.pattern or self.goal or self.layer_ratios):
            raise UserError(f"`ratio`: how much should {name} remove? Pass `ratio`, or {_ALTERNATIVES[kind]}")
        if self.keep_pattern is not None and kind != "depth":
            raise UserError(f"`keep_pattern`: goes with depth methods, and {name} is none; leave it out")
        if self.propagate == "pruned" and not (kind == "experts" and method.calibrated):
            raise UserError(
                f"`propagate` pruned: goes with methods that score experts on text, and {name} is none; leave it out"
            )
        self._check_allocation(cast("WeightMethod", method), name)
        self._check_width(method, name)

    def _check_width(self, method: Method, name: str) -> None:
        """Check the fields that concern channels."""
        if not method.scores:
            fields = {"axes": self.axes, "step": self.step}
            fields |= {"allocation": self.allocation != "uniform" and method.granularity != "sparse"}
            for field_name, is_set in fields.items():
                if is_set:
                    raise UserError(f"`{field_name}`: {name} prunes no channels; leave it out")
            unsupported = set(self.sizes) - {"experts" if method.granularity == "experts" else "layers"}
        else:
            unsupported = {"layers"} & set(self.sizes) - set(method.scores)
        if unsupported:
            raise UserError(f"`shape`: {name} does not change {', '.join(sorted(unsupported))}")
        for axis in self.axes:
            if axis not in method.scores:
                raise UserError(f"`axes`: {name} scores {', '.join(method.scores)}, not {axis}")
        for space in self.spaces(method) if method.scores else ():
            if space not in method.scores:
                raise UserError(f"`shape`: {name} scores {', '.join(method.scores)}, so it cannot narrow {space}")
        if self.allocation == "global" and "layers" in method.scores:
            raise UserError(f"`allocation` global: {name} learns as many units in every layer; leave it out")
        wide = bool(self.sizes or {"hidden", "expert_ffn"} & {*self.spaces(method)})
        if self.allocation == "global" and method.granularity != "sparse" and wide:
            raise UserError("`allocation` global: needs a `ratio`, and `axes` of ffn and kv alone")

    def _check_allocation(self, method: WeightMethod, name: str) -> None:
        """Refuse an allocation of zeros that does not suit the pattern or the method."""
        where, sparse = self.allocation_field, method.granularity == "sparse"
        if self.allocation in ("owl", "alpha", "evolve") and not sparse:
            raise UserError(f"{where}: goes with sparse methods, and {name} is none; leave it out")
        if self.allocation == "uniform" or not sparse:
            return
        if self.pattern:
            raise UserError(f"{where}: `pattern` {self.pattern} fixes the zeros of every group; leave one out")
        if self.allocation == "global" and (method.updates or method.stochastic):
            reason = "changes the weights that stay" if method.updates else "draws its scores"
            raise UserError(
                f"{where}: needs scores that all linears share, and {name} {reason}; use owl, alpha or evolve"
            )
        if self.allocation in ("owl", "evolve") and not method.calibrated:
            raise UserError(f"{where}: reads text, and {name} reads none; use alpha or global, or wanda")

    @property
    def allocates(self) -> bool:
        """Whether layers of a sparse model differ in their zeros."""
        return self.allocation != "uniform" or bool(self.layer_ratios)

    @property
    def allocation_field(self) -> str:
        """The field that allocates the zeros, as messages call it."""
        return "`ratios_by_layer`" if self.layer_ratios else f"`allocation` {self.allocation}"

    @property
    def allocation_name(self) -> str:
        """The allocation in words."""
        return "by layer" if self.layer_ratios else self.allocation

    def basis(self, method: Method) -> Any:
        """What the ratio is a share of: ``non_embedding`` or ``total`` parameters, ``block_weights`` or ``experts``."""
        counted = {"sparse": "block_weights", "experts": "experts"}
        return counted.get(method.granularity, self.of or "non_embedding")

    def record(self, method: Method) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values."""
        record: dict[str, Any] = {}
        if self.ratio is not None:
            record["ratio"] = self.ratio
            record["of"] = self.basis(method)
        if self.goal:
            record["goal"] = self.goal.record()
        if self.layer_ratios:
            record["layer_ratios"] = list(self.layer_ratios)
        if self.sizes:
            record["shape"] = dict(self.sizes)
        if self.pattern:
            record["pattern"] = str(self.pattern)
        if self.axes:
            record["axes"] = list(self.axes)
        if self.allocation != "uniform":
            record["allocation"] = self.allocation
        if self.step is not None:
            record["step"] = self.step
        if self.keep_pattern is not None:
            record["keep_pattern"] = self.keep_pattern
        if self.propagate != "unpruned":
            record["propagate"] = self.propagate
        return record

    def spaces(self, method: Method) -> tuple[str, ...]:
        """The spaces that shrink, in the order of :data:`secateur.model.shapes.SPACES`."""
        if self.sizes:
            names = {"kv" if name in ("heads", "kv_heads") else name for name in self.sizes}
        else:
            names = set(self.axes or method.axes)
        return tuple(space for space in SPACES if space in names)

    @property
    def sparsity(self) -> float:
        """The share of zeros that a sparse method makes."""
        if self.pattern:
            return 1 - self.pattern.keep / self.pattern.group
        if self.layer_ratios:
            return sum(self.layer_ratios) / len(self.layer_ratios)
        assert self.ratio is not None
        return self.ratio

    def shape(self, before: Shape, method: Method, name: str) -> Shape:
        """The shape after pruning, computed before anything is scored; a global allocation may stay wider.

        Raises:
            UserError: if the target does not suit the method, or the model has no such shape.
        """
        self.check(method, name)
        self.check_family(before, method, name)
        if method.granularity == "sparse":
            if self.allocates and before.layers_with("experts"):
                raise UserError(f"{self.allocation_field}: not of mixtures of experts; leave it out")
            if self.layer_ratios and len(self.layer_ratios) != before.layers:
                raise UserError(
                    f"`ratios_by_layer`: has {plural(len(self.layer_ratios), 'ratio')}, and the model has "
                    f"{plural(before.layers, 'layer')}; name one for each"
                )
            self._check_groups(before, cast("WeightMethod", method), name)
            return before
        if self.sizes:
            after = self.explicit_shape(before).openable(where="`shape`")
        elif method.granularity == "depth":
            assert self.ratio is not None
            after = solve_depth(before, self.ratio, self.of or "non_embedding")
        elif method.granularity == "experts":
            assert self.ratio is not None
            after = solve_experts(before, self.ratio)
        else:
            assert self.ratio is not None
            after = solve_width(before, self.ratio, self.spaces(method), self.of or "non_embedding", self.step)
            after = after.openable(where="`axes`")
        if after.layers < before.layers:
            _check_kinds(before, after.layers, method, name)
        return after.switched_on(method.config_switches(after, self.spaces(method)))

    def check_family(self, before: Shape, method: Method, name: str) -> None:
        """Refuse to cut an axis that the family's row excludes, or that the model has nothing of."""
        axes = {"depth": ("layers",), "experts": ("experts",)}.get(method.granularity) or self.spaces(method)
        field_name = "shape" if self.sizes else "method" if method.granularity == "experts" else "axes"
        for axis in () if method.granularity == "sparse" else axes:
            if reason := before.family.uncut_reason(axis):
                possible = [space for space in method.scores if space in before.family.axes]
                remedy = f"; pass `axes` {','.join(possible)}" if possible and not self.sizes else ""
                raise UserError(
                    f"`{field_name}`: {name} cuts {axis}, but of {before.family.name} only "
                    f"{', '.join(before.family.axes)} can be cut: {reason}{remedy}"
                )
            if axis not in ("layers", "hidden") and not before.layers_with(axis):
                raise UserError(f"`{field_name}`: {name} cuts {axis}, but no layer of this model has any")
        self._check_experts(before, method, name, axes)

    def _check_experts(self, before: Shape, method: Method, name: str, axes: Sequence[str]) -> None:
        """Refuse methods that need the routed experts' weights together with their gradients."""
        if not before.layers_with("experts"):
            return
        remedy = "use a method without gradients, e.g. minitron-width, shortgpt or reap"
        if "layers" in method.scores:  # it trains the model under gates
            raise UserError(f"{name}: has no gates for routed experts; {remedy}")
        if any(issubclass(need, GradientStatistic) for need in method.needs) and not {"kv", "ffn"}.issuperset(axes):
            raise UserError(
                f"{name}: scores {' and '.join(axes)} by gradients of all weights, and those of routed experts are not "
                f"computed; {remedy}"
            )

    def explicit_shape(self, before: Shape) -> Shape:
        """The shape with ``sizes``, whether or not transformers can open it.

        Raises:
            UserError: if the model has no such shape, or has it already.
        """
        after = explicit(before, self.sizes)
        if after == before:
            raise UserError("`shape`: is the model's own shape; nothing would be removed")
        return after

    def _check_groups(self, shape: Shape, method: WeightMethod, name: str) -> None:
        """Check that a pattern divides the rows of every linear, and that a ratio removes a weight of some group."""
        sizes = shape.linear_sizes()
        if self.pattern:
            for linear, (_, row) in sizes.items():
                if row % self.pattern.group:
                    raise UserError(
                        f"`pattern` {self.pattern}: the rows of {linear} have {row} weights, not a multiple of "
                        f"{self.pattern.group}"
                    )
            return
        largest = max(method.group_size(out, row) for out, row in sizes.values())
        if not count_pruned(largest, self.sparsity):
            digits = 10 ** (len(str(largest)) + 2)
            smallest_ratio = math.ceil(digits / largest) / digits  # rounded up, so that it removes a weight
            raise UserError(
                f"`ratio` {self.ratio:g}: removes nothing: {name} compares {largest:,} weights at a time; "
                f"the smallest ratio is {smallest_ratio:g}"
            )


def _check_kinds(before: Shape, layers: int, method: Method, name: str) -> None:
    """Refuse numbers of layers whose choice may leave kinds of layers that config.json cannot describe.

    Ernie 4.5 MoE says by an interval which layers have experts.
    """
    if not before.family.kind_keys:
        return
    length = before.layers - layers if getattr(method, "contiguous", False) else 1
    for first in range(before.layers - length + 1):
        try:
            before.family.kind_keys([*before.kinds[:first], *before.kinds[first + length :]])
        except UserError as error:
            raise UserError(f"`method`: {name} may remove layers {first} to {first + length - 1}: {error}") from None


_UNITS = {"depth": "layers", "experts": "experts"}
_ALTERNATIVES = {
    "experts": "`shape` experts=N",
    "sparse": "`pattern` N:M",
    "depth": "`shape` layers=N",
    "width": "`shape` hidden=N,ffn=N",
    "depth+width": "`shape` layers=N,hidden=N,ffn=N,heads=N",
}


def _parse_sizes(text: str) -> dict[str, int]:
    """Read ``hidden=3072,ffn=9216``."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not re.fullmatch(r"\d{1,12}", size, re.ASCII):
            raise UserError(f"`shape`: {part.strip()!r} is not SIZE=NUMBER, as in hidden=3072,ffn=9216")
        if name in sizes:
            raise UserError(f"`shape`: {name} appears twice")
        sizes[name] = int(size)
    return sizes


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if name not in SIZES:
            raise UserError(f"`shape`: {name!r} is not a size{did_you_mean(name, SIZES)}")
        if not isinstance(size, int) or size < 1:
            raise UserError(f"`shape`: {name} must be a whole number above zero, got {size!r}")


def _check_axes(axes: tuple[str, ...]) -> None:
    for axis in axes:
        if axis not in SPACES:
            raise UserError(f"`axes`: {axis!r} is not one of {', '.join(SPACES)} (kv: KV heads with their query heads)")
    if len(set(axes)) < len(axes):
        raise UserError(f"`axes`: {','.join(axes)} names an axis twice")
