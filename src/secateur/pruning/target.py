"""What pruning should come to: a share of the parameters, a shape, or a pattern of zeros."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from secateur.errors import UserError, did_you_mean
from secateur.methods.selection import count_pruned
from secateur.model.shapes import SIZES, SPACES, Shape, Share, explicit, solve_depth, solve_width

if TYPE_CHECKING:
    from secateur.methods.base import Method, WeightMethod

__all__ = ["Allocation", "Pattern", "Target", "describe_target"]

Allocation = Literal["uniform", "global"]


@dataclass(frozen=True)
class Pattern:
    """N weights kept of each M that follow one another in a row, as in 2:4."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``N:M``, or ``unstructured``, which is None.

        Raises:
            UserError: if it is neither, or keeps none or more than there are.
        """
        if text == "unstructured":
            return None
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--pattern: {text!r} is neither unstructured nor N:M with N weights kept of M, e.g. 2:4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@dataclass(frozen=True)
class Target:
    """How much to prune, in one of three ways.

    Attributes:
        ratio: share to remove; of parameters for depth and width, of the block linears' weights for sparse methods.
        of: which parameters the ratio counts; None for those outside the embeddings.
        sizes: sizes of the shape to reach, instead of a ratio.
        pattern: of the zeros, sparse methods only; it says the ratio by itself.
        axes: what a method shrinks that scores several spaces; empty for the method's own choice.
        allocation: ``uniform``: every layer keeps as many units; ``global``: layers compete.
    """

    ratio: float | None = None
    of: Share | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    pattern: Pattern | None = None
    axes: tuple[str, ...] = ()
    allocation: Allocation = "uniform"

    @classmethod
    def parse(
        cls,
        *,
        ratio: float | None = None,
        of: str | None = None,
        shape: str | None = None,
        pattern: str | None = None,
        axes: str | None = None,
        allocation: Allocation = "uniform",
    ) -> Target:
        """Read a target from what a command line says; what was not given is None.

        Raises:
            UserError: naming the option that cannot be read.
        """
        return cls(
            ratio,
            {None: None, "total": "total", "non-embedding": "non_embedding"}[of],
            _parse_sizes(shape) if shape is not None else {},
            Pattern.parse(pattern) if pattern is not None else None,
            _parse_axes(axes) if axes is not None else (),
            allocation,
        )

    def check(self, method: Method, name: str) -> None:
        """Refuse what the method cannot be asked for.

        Raises:
            UserError: naming the option that does not go with the method.
        """
        kind, sparse = method.granularity, method.granularity == "sparse"
        if sparse and self.sizes:
            raise UserError(f"--shape: {name} zeroes single weights and keeps the shape; give --ratio or --pattern")
        if sparse and self.of:
            raise UserError(f"--of: a ratio for {name} always counts the weights of the blocks' linears; leave it out")
        if self.pattern and not sparse:
            raise UserError(f"--pattern: {name} removes {'layers' if kind == 'depth' else 'channels'}, not weights")
        if self.pattern and self.ratio is not None and abs(self.sparsity - self.ratio) > 1e-9:
            raise UserError(
                f"--ratio {self.ratio:g}: --pattern {self.pattern} removes {self.sparsity:g}; leave one out"
            )
        if self.ratio is None and not self.sizes and not self.pattern:
            raise UserError(f"--ratio: say how much {name} should remove: --ratio, or {_OTHER[kind]}")
        self.check_amount()
        self._check_width(method, name)

    def check_amount(self) -> None:
        """Refuse what contradicts itself, whatever the method.

        Raises:
            UserError: naming the option to leave out.
        """
        if self.ratio is not None and self.sizes:
            raise UserError("--shape: says what to reach, and so does --ratio; leave one out")
        if self.of and self.ratio is None:
            raise UserError("--of: says what a --ratio counts, and none is given; leave it out")
        if self.axes and self.sizes:
            raise UserError("--axes: --shape says already what is narrowed; leave it out")

    def _check_width(self, method: Method, name: str) -> None:
        if not method.scores:
            for option, given in (("--axes", bool(self.axes)), ("--allocation", self.allocation != "uniform")):
                if given:
                    raise UserError(f"{option}: {name} prunes no channels; leave it out")
            foreign = set(self.sizes) - {"layers"}
        else:
            foreign = {"layers"} & set(self.sizes) - set(method.scores)
        if foreign:
            raise UserError(f"--shape: {name} does not change {', '.join(sorted(foreign))}")
        for axis in self.axes:
            if axis not in method.scores:
                raise UserError(f"--axes: {name} scores {', '.join(method.scores)}, not {axis}")
        for space in self.spaces(method) if method.scores else ():
            if space not in method.scores:
                raise UserError(f"--shape: {name} scores {', '.join(method.scores)}, so it cannot narrow {space}")
        if self.allocation == "global" and "layers" in method.scores:
            raise UserError(f"--allocation global: {name} learns as many units in every layer; leave it out")
        if self.allocation == "global" and (self.sizes or "hidden" in self.spaces(method)):
            raise UserError("--allocation global: needs a --ratio, and --axes of ffn and kv alone")

    def counts(self, method: Method) -> str:
        """What a ratio is a share of: ``non_embedding`` or ``total`` parameters, or ``block_weights``."""
        return "block_weights" if method.granularity == "sparse" else self.of or "non_embedding"

    def record(self, method: Method) -> dict[str, Any]:
        """What was asked for, as plain values; what was left to the defaults is left out."""
        said: dict[str, Any] = {}
        if self.ratio is not None:
            said["ratio"] = self.ratio
            said["of"] = self.counts(method)
        if self.sizes:
            said["shape"] = dict(self.sizes)
        if self.pattern:
            said["pattern"] = str(self.pattern)
        if self.axes:
            said["axes"] = list(self.axes)
        if self.allocation != "uniform":
            said["allocation"] = self.allocation
        return said

    def spaces(self, method: Method) -> tuple[str, ...]:
        """The spaces that shrink, in the order of :data:`secateur.model.shapes.SPACES`."""
        if self.sizes:
            named = {"kv" if name in ("heads", "kv_heads") else name for name in self.sizes}
        else:
            named = set(self.axes or method.axes)
        return tuple(space for space in SPACES if space in named)

    @property
    def sparsity(self) -> float:
        """The share of zeros that a sparse method makes."""
        if self.pattern:
            return 1 - self.pattern.kept / self.pattern.of
        assert self.ratio is not None
        return self.ratio

    def shape(self, before: Shape, method: Method, name: str) -> Shape:
        """The shape after pruning, known before anything is scored; a global allocation may stay wider.

        Raises:
            UserError: if the target does not suit the method, or the model has no such shape.
        """
        self.check(method, name)
        if method.granularity == "sparse":
            self._check_groups(before, cast("WeightMethod", method), name)
            return before
        if self.sizes:
            after = self.reached(before).openable(where="--shape")
        elif method.granularity == "depth":
            assert self.ratio is not None
            after = solve_depth(before, self.ratio, self.of or "non_embedding")
        else:
            assert self.ratio is not None
            after = solve_width(before, self.ratio, self.spaces(method), self.of or "non_embedding")
        return after.switched_on(method.switches(after, self.spaces(method)))

    def reached(self, before: Shape) -> Shape:
        """The shape with the sizes asked for, whether or not transformers opens it.

        Raises:
            UserError: if the model has no such shape, or has it already.
        """
        after = explicit(before, self.sizes)
        if after == before:
            raise UserError("--shape: is the model's own shape; nothing would be removed")
        return after

    def _check_groups(self, shape: Shape, method: WeightMethod, name: str) -> None:
        """A pattern has to divide the rows of every linear, and without one some group has to lose a weight."""
        sizes = {linear: shape.tensor_size(shape.family.block[linear]) for linear in shape.family.linears}
        if self.pattern:
            of = self.pattern.of
            for linear, (_, row) in sizes.items():
                if row % of:
                    raise UserError(
                        f"--pattern {self.pattern}: the rows of {linear} have {row} weights, no multiple of {of}"
                    )
            return
        most = max(method.competing(out, row) for out, row in sizes.values())
        if not count_pruned(most, self.sparsity):
            digits = 10 ** (len(str(most)) + 2)
            least = math.ceil(digits / most) / digits  # rounded up, so that it is one that removes something
            raise UserError(
                f"--ratio {self.ratio:g}: removes nothing: {name} chooses among {most:,} weights at a time, so it "
                f"takes {least:g} or more"
            )


_OTHER = {
    "sparse": "--pattern N:M",
    "depth": "--shape layers=N",
    "width": "--shape hidden=N,ffn=N",
    "depth+width": "--shape layers=N,hidden=N,ffn=N,heads=N",
}


def _parse_sizes(text: str) -> dict[str, int]:
    """Read ``hidden=3072,ffn=9216``."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name and name not in SIZES:
            raise UserError(f"--shape: {name!r} is not a size{did_you_mean(name, SIZES)}")
        if not name or not re.fullmatch(r"\d{1,12}", size, re.ASCII):
            raise UserError(f"--shape: {part.strip()!r} is not SIZE=NUMBER, as in hidden=3072,ffn=9216")
        if name in sizes:
            raise UserError(f"--shape: {name} is given twice")
        sizes[name] = int(size)
    return sizes


def _parse_axes(text: str) -> tuple[str, ...]:
    """Read ``kv,ffn``."""
    axes = tuple(part.strip() for part in text.split(","))
    for axis in axes:
        if axis not in SPACES:
            raise UserError(f"--axes: {axis!r} is not one of {', '.join(SPACES)} (kv: KV heads with their query heads)")
    if len(set(axes)) < len(axes):
        raise UserError(f"--axes {text}: names an axis twice")
    return axes


def describe_target(asked: Mapping[str, Any]) -> str:
    """Describe a target (:meth:`Target.record`) in words."""
    parts = []
    if "ratio" in asked:
        parts.append(f"{100 * asked['ratio']:.4g}% of {_COUNTED[asked['of']]}")
    if "shape" in asked:
        parts.append(",".join(f"{name}={size}" for name, size in asked["shape"].items()))
    parts += [f"{key} {asked[key]}" for key in ("pattern", "allocation") if key in asked]
    if "axes" in asked:
        parts.append(f"axes {','.join(asked['axes'])}")
    return ", ".join(parts)


_COUNTED = {
    "total": "all parameters",
    "non_embedding": "the parameters outside the embeddings",
    "block_weights": "the weights of the blocks' linears",
}
