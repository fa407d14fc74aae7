"""The size or the speed that pruning should reach: parameters, bytes of memory, or a share of the latency."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from secateur.config import as_share, parse_count
from secateur.errors import UserError, did_you_mean
from secateur.formatting import byte_size, count
from secateur.model.serving import Memory, Serving, Weights, memory
from secateur.model.shapes import Shape

__all__ = ["GOALS", "Goal", "GoalKind", "Phase"]

GoalKind = Literal["params", "active_params", "memory", "latency"]
Phase = Literal["decode", "prefill"]
GOALS: tuple[GoalKind, ...] = get_args(GoalKind)

#: kind -> largest distance from the goal, as a share of it
TOLERANCE = {"params": 0.02, "active_params": 0.02, "memory": 0.03, "latency": 0.1}

_CONTEXT = 2048  #: tokens of a sequence where a memory goal names none
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True)
class Goal:
    """What pruning should reach.

    Attributes:
        kind: ``params`` (all parameters), ``active_params`` (those that a token uses), ``memory`` (bytes; a limit that
            is never exceeded) or ``latency`` (a share of the model's own, as measured).
        amount: parameters, bytes or the share.
        context: tokens of a sequence; None for 2048, or the model's positions if less.
        sequences: sequences served at once.
        weights: the type of stored weights; None for bf16, and for a latency the type that the device computes in.
        phase: what a latency is of: ``decode`` or ``prefill``.
        predicted: of a latency, the share that was predicted of the shape that reaches it; None before there is one.
    """

    kind: GoalKind
    amount: float
    context: int | None = None
    sequences: int = 1
    weights: Weights | None = None
    phase: Phase = "decode"
    predicted: float | None = None

    @classmethod
    def parse(
        cls,
        *,
        params: Any = None,
        active_params: Any = None,
        memory: Any = None,
        latency: Any = None,
        context: int | None = None,
        sequences: int | None = None,
        weights: str | None = None,
        latency_of: str | None = None,
    ) -> Goal | None:
        """Read a goal from texts or plain values; None where none is set.

        Raises:
            UserError: on two goals, a value that cannot be read, or a field that goes with another goal.
        """
        values = {"params": params, "active_params": active_params, "memory": memory, "latency": latency}
        kinds = [kind for kind, value in values.items() if value is not None]
        if len(kinds) > 1:
            raise UserError(f"`{kinds[1]}` and `{kinds[0]}` both say how much to remove; leave one out")
        kind: Any = kinds[0] if kinds else None
        served = kind in ("memory", "latency")
        for name, value, suits in (
            ("sequences", sequences, served),
            ("weights", weights, served),
            ("latency_of", latency_of, kind == "latency"),
        ):
            if value is not None and not suits:
                owner = "`latency`" if name == "latency_of" else "`memory` or `latency`"
                raise UserError(f"`{name}`: goes with {owner}; leave it out")
        for name, value, choices in (
            ("weights", weights, get_args(Weights)),
            ("latency_of", latency_of, get_args(Phase)),
        ):
            if value is not None and value not in choices:
                raise UserError(f"`{name}`: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
        if kind is None:
            return None
        if kind == "latency" and weights in ("int8", "int4"):
            raise UserError(f"`weights` {weights}: a latency is measured in bf16 or float32")
        amount = _READERS[kind](kind, values[kind])
        phase: Any = latency_of or "decode"
        return cls(kind, amount, context if served else None, sequences or 1, weights, phase)  # type: ignore[arg-type]

    def serving(self, positions: int | None) -> Serving:
        """How the model is served, with defaults filled in."""
        return Serving(self.context or min(_CONTEXT, positions or _CONTEXT), self.sequences, self.weights or "bf16")

    def memory_of(self, shape: Shape) -> Memory:
        """The memory of a shape that is served so."""
        return memory(shape, self.serving(shape.positions))

    def amount_of(self, shape: Shape) -> Any:
        """What a shape has of it: parameters or bytes; a latency is measured, not computed."""
        if self.kind == "params":
            return shape.total
        if self.kind == "active_params":
            return shape.active_parameters
        assert self.kind == "memory"
        return self.memory_of(shape).total

    def text(self, amount: float) -> str:
        """An amount of this kind in words."""
        if self.kind == "latency":
            return f"{amount:.3g}x the {self.phase} latency"
        if self.kind == "memory":
            return f"{byte_size(amount)} of memory"
        return f"{count(amount)} {'active ' if self.kind == 'active_params' else ''}parameters"

    def record(self) -> dict[str, Any]:
        """The fields that count for this kind, as plain values."""
        fields = asdict(self)
        served = ("context", "sequences", "weights") if self.kind in ("memory", "latency") else ()
        names = ("kind", "amount", *served, *(("phase",) if self.kind == "latency" else ()))
        predicted = {} if self.predicted is None else {"predicted": self.predicted}
        return {name: fields[name] for name in names} | predicted

    @property
    def description(self) -> str:
        """The goal in words, with how the model is served."""
        return describe_goal(self.record())


def describe_goal(record: Any) -> str:
    """A goal (:meth:`Goal.record`) in words."""
    goal = Goal(**record)
    text = goal.text(goal.amount)
    if goal.kind in ("memory", "latency"):
        parts = [
            f"context {goal.context}" if goal.context else "",
            f"{goal.sequences} sequences" if goal.sequences > 1 else "",
            f"{goal.weights} weights" if goal.weights else "",
        ]
        served = ", ".join(filter(None, parts))
        text += f" ({served})" if served else ""
    return text


def _read_count(kind: str, value: Any) -> int:
    try:
        amount = parse_count(value)
    except ValueError:
        raise UserError(f"`{kind}`: {value!r} is not a number of parameters such as 4B, 350M or 1.2e9") from None
    if amount < 1:
        raise UserError(f"`{kind}`: {value!r} is not above zero")
    return amount


def _read_bytes(kind: str, value: Any) -> int:
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*([a-z]*)\s*", str(value).lower(), re.ASCII)
    if isinstance(value, bool) or not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"`{kind}`: {value!r} is not a number of bytes such as 8GiB, 500MB or 2e9")
    return int(float(match[1]) * _UNITS[match[2]])


def _read_latency(kind: str, value: Any) -> float:
    text = str(value).strip().lower()
    try:
        share = float(as_share(text if text.endswith("%") else float(text.removesuffix("x"))))
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(f"`{kind}`: {value!r} is not a share of the model's own between 0 and 1, such as 0.7x or 70%")
    return share


_READERS = {"params": _read_count, "active_params": _read_count, "memory": _read_bytes, "latency": _read_latency}
