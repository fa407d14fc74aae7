"""Two models on the same items: by how much one is better, how sure that is, and whether it can be told at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UserError
from secateur.evaluate.results import Kind, Measurement, Results, check_same_protocols
from secateur.statistics import bootstrap_interval, mean_interval, seed_interval, sign_test

__all__ = ["AVERAGE", "Comparison", "compare"]

AVERAGE = "average of tasks"

Verdict = Literal["A", "B", "too close to call", "not measured"]


@dataclass(frozen=True)
class Comparison:
    """One figure of A beside that of B.

    ``difference`` is how much better A is: loss(B) - loss(A), or accuracy(A) - accuracy(B). ``low`` and ``high`` bound
    its 95% interval by a paired bootstrap over items: documents, or windows. ``above`` and ``below`` count the items on
    which A and B are better, and ``p`` is the sign test's. With several seeds, figures are means over them, and
    ``seed_low`` and ``seed_high`` bound the 95% interval of the mean of their differences by Student's t. A verdict
    for one side needs every interval there is to exclude zero. What was not measured is None.
    """

    name: str
    kind: Kind
    verdict: Verdict
    a: float | None = None
    b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str | None = None
    items: int | None = None
    above: int | None = None
    below: int | None = None
    p: float | None = None
    seeds: tuple[float, ...] = ()  #: the difference of each seed, where there are several
    seed_low: float | None = None
    seed_high: float | None = None
    reason: str = ""  #: why it is not measured

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "seeds": list(self.seeds)}


def compare(a: Sequence[Results], b: Sequence[Results]) -> list[Comparison]:
    """Compare two models, each measured once or, trained from several seeds, as often.

    Args:
        a: of one model, one for each seed.
        b: of the other, with the seeds in the same order.

    Returns:
        One comparison for each measurement that either side has, and one of the average where there are several tasks.

    Raises:
        UserError: if the sides have different numbers of seeds, or figures of one name were measured differently.
    """
    if len(a) != len(b):
        raise UserError(f"A has {len(a)} seeds and B has {len(b)}; name as many results on both sides, in pairs")
    names = check_same_protocols((r.model, m.name, m.protocol) for r in (*a, *b) for m in r.measurements)
    found = [_compare(name, [r.of(name) for r in a], [r.of(name) for r in b]) for name in names]
    tasks = [c.name for c in found if c.kind == "accuracy" and c.verdict != "not measured"]
    if len(tasks) > 1:
        found.append(_average(tasks, a, b))
    return found


def _compare(name: str, ours: list[Measurement | None], theirs: list[Measurement | None]) -> Comparison:
    kind: Kind = next(m.kind for m in (*ours, *theirs) if m)
    for side, measured in (("A", ours), ("B", theirs)):
        if None in measured:
            return Comparison(name, kind, "not measured", reason=f"{side} has no {name}")
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if one and other]
    size = len(pairs[0][0].items)
    if size < 2:
        return Comparison(name, kind, "not measured", reason="fewer than two items give no interval")
    better = np.mean([_better(one, other) for one, other in pairs], axis=0)
    tokens = [item.get("tokens", 1) for item in pairs[0][0].items]
    weights = np.asarray(tokens, dtype=np.float64) if kind == "loss" and len(set(tokens)) > 1 else None
    above, below, p = sign_test(better)
    return _judged(
        name,
        kind,
        [(one.value, other.value) for one, other in pairs],
        bootstrap_interval(better, weights),
        unit=pairs[0][0].unit,
        items=size,
        above=above,
        below=below,
        p=p,
    )


def _better(one: Measurement, other: Measurement) -> NDArray[np.float64]:
    """How much better the first one is on each item."""
    a, b = (np.asarray([item["value"] for item in m.items], dtype=np.float64) for m in (one, other))
    return b - a if one.kind == "loss" else a - b


def _average(tasks: Sequence[str], a: Sequence[Results], b: Sequence[Results]) -> Comparison:
    """The mean of the tasks' accuracies, in which a task counts once however many documents it has."""
    sides = [[[m for n in tasks if (m := r.of(n))] for r in side] for side in (a, b)]
    means = [[float(np.mean([m.value for m in measured])) for measured in side] for side in sides]
    groups = [
        np.mean([_better(one[t], other[t]) for one, other in zip(*sides, strict=True)], axis=0)
        for t in range(len(tasks))
    ]
    above, below, p = sign_test(np.concatenate(groups))
    return _judged(
        AVERAGE,
        "accuracy",
        list(zip(*means, strict=True)),
        mean_interval(groups),
        unit="documents",
        items=sum(map(len, groups)),
        above=above,
        below=below,
        p=p,
    )


def _judged(
    name: str, kind: Kind, values: list[tuple[float, float]], interval: tuple[float, float], **facts: Any
) -> Comparison:
    """The comparison of figures, one pair for each seed, with the verdict that all intervals agree on."""
    a, b = (float(np.mean(side)) for side in zip(*values, strict=True))
    differences = tuple(other - one if kind == "loss" else one - other for one, other in values)
    intervals = [interval]
    if len(values) > 1:
        intervals.append(seed_interval(differences))
        facts |= {"seeds": differences, "seed_low": intervals[1][0], "seed_high": intervals[1][1]}
    verdict: Verdict = "too close to call"
    if all(low > 0 for low, _ in intervals):
        verdict = "A"
    elif all(high < 0 for _, high in intervals):
        verdict = "B"
    return Comparison(name, kind, verdict, a, b, float(np.mean(differences)), *interval, **facts)
