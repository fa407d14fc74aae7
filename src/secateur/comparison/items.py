"""Compare two models on the same items: by how much one is better, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from secateur.comparison.intervals import bootstrap_interval, mean_interval, seed_interval, sign_test
from secateur.errors import UserError
from secateur.evaluation.results import LOSS, EvaluationResults, Measurement, MeasurementKind, check_same_protocols

__all__ = ["AVERAGE", "FEW", "Comparison", "Comparisons", "Outcome", "compare_results"]

AVERAGE = "average of tasks"
FEW = 30  #: items, below which a bootstrap's interval alone is not trusted

Outcome = Literal["A", "B", "too close to call", "not measured"]


@dataclass(frozen=True)
class Comparison:
    """One figure of A beside that of B.

    ``difference`` is how much better A is: loss(B) - loss(A), or accuracy(A) - accuracy(B); other metrics of tasks by
    their own direction. ``low`` and ``high`` bound
    its 95% interval by a paired bootstrap over items: documents, or windows. ``above`` and ``below`` count the items on
    which A and B are better, and ``p`` is the sign test's. With several seeds, figures are means over them, and
    ``seed_low`` and ``seed_high`` bound the 95% interval of the mean of their differences by Student's t. A verdict
    for one side needs every interval there is to exclude zero; and, of fewer than 30 items, of which the bootstrap's
    intervals are too narrow, p below 0.05 as well. What was not measured is None.
    """

    name: str
    kind: MeasurementKind
    verdict: Outcome
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


@dataclass(frozen=True)
class Comparisons(Sequence[Comparison]):
    """Every figure of A beside that of B; a sequence of :class:`Comparison`."""

    rows: tuple[Comparison, ...]

    @property
    def verdict(self) -> Outcome:
        """The verdict on the held-out loss.

        Raises:
            UserError: if the held-out loss was not measured in both.
        """
        loss = next((row for row in self.rows if row.name == LOSS), None)
        if loss is None or loss.verdict == "not measured":
            reason = f" ({loss.reason})" if loss else ""
            raise UserError(f"no held-out loss was measured in both{reason}; evaluate both models on the same text")
        return loss.verdict

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Comparison: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Comparison, ...]: ...

    def __getitem__(self, index: int | slice) -> Comparison | tuple[Comparison, ...]:
        return self.rows[index]


def compare_results(a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]) -> Comparisons:
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
    rows = [_compare(name, a, b) for name in names]
    accuracies = [c.name for c in rows if c.kind == "accuracy" and c.verdict != "not measured"]
    counted = _apart([_of(a[0], name) for name in accuracies])
    if len(counted) > 1:
        rows.append(_average(counted, a, b))
    return Comparisons(tuple(rows))


def _apart(measured: Sequence[Measurement]) -> list[str]:
    """Those among figures that have no task in common, in their order: a group, and neither its parts nor its tasks."""
    covered: set[str] = set()
    names = []
    for measurement in sorted(measured, key=lambda m: -len(m.tasks)):
        tasks = set(measurement.tasks or (measurement.name,))
        if not tasks & covered:
            covered |= tasks
            names.append(measurement.name)
    return [measurement.name for measurement in measured if measurement.name in names]


def _compare(name: str, a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]) -> Comparison:
    measurement = next(m for r in (*a, *b) if (m := r.of(name)))
    for side, results in (("A", a), ("B", b)):
        if any(r.of(name) is None for r in results):
            return Comparison(name, measurement.kind, "not measured", reason=f"{side} has no {name}")
    parts = [_of(a[0], task) for task in measurement.tasks or (name,)]
    if reason := _unfit(measurement, parts):
        return Comparison(name, measurement.kind, "not measured", reason=reason)
    better = [_better(part.name, a, b) for part in parts]
    if measurement.tasks:
        interval = mean_interval(better, [share for _, share in _shares(measurement, a[0])])
    else:
        tokens = [item.get("tokens", 1) for item in measurement.items]
        weights = np.asarray(tokens, dtype=np.float64) if measurement.kind == "loss" and len(set(tokens)) > 1 else None
        interval = bootstrap_interval(better[0], weights)
    values = [(_of(first, name).value, _of(second, name).value) for first, second in zip(a, b, strict=True)]
    return _judged(measurement, values, interval, np.concatenate(better))


def _unfit(measurement: Measurement, parts: Sequence[Measurement]) -> str:
    """Why a figure cannot be compared item by item; empty where it can."""
    if measurement.tasks and not measurement.details["compared"]:
        return f"its tasks are compared by another metric than {measurement.scale}"
    if sum(len(part.items) for part in parts) < 2:
        return "fewer than two items give no interval"
    if any(item["value"] is None for part in parts for item in part.items):
        return f"{measurement.scale} is of all documents together, and single ones have none"
    return ""


def _of(results: EvaluationResults, name: str) -> Measurement:
    measurement = results.of(name)
    assert measurement is not None, name
    return measurement


def _better(name: str, a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]) -> NDArray[np.float64]:
    """How much better A is on each item, in the mean over seeds."""
    gains = []
    for pair in zip(a, b, strict=True):
        values_a, values_b = (
            np.asarray([item["value"] for item in _of(r, name).items], dtype=np.float64) for r in pair
        )
        gains.append(values_b - values_a if _of(a[0], name).lower_is_better else values_a - values_b)
    return np.mean(gains, axis=0)


def _shares(measured: Measurement, results: EvaluationResults) -> list[tuple[str, float]]:
    """The tasks that a figure is the mean of, and what each of them counts; a single one counts all."""
    if not measured.tasks:
        return [(measured.name, 1.0)]
    by_size = measured.protocol["by_size"]
    sizes = [len(_of(results, task).items) if by_size else 1 for task in measured.tasks]
    return [(task, size / sum(sizes)) for task, size in zip(measured.tasks, sizes, strict=True)]


def _average(names: Sequence[str], a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]) -> Comparison:
    """The mean of accuracies, in which a task counts once however many documents it has, and a group as much."""
    shares = [(task, share) for name in names for task, share in _shares(_of(a[0], name), a[0])]
    better = [_better(task, a, b) for task, _ in shares]
    means = [[float(np.mean([_of(r, name).value for name in names])) for r in side] for side in (a, b)]
    measurement = replace(_of(a[0], names[0]), name=AVERAGE, kind="accuracy")
    interval = mean_interval(better, [share / len(names) for _, share in shares])
    return _judged(measurement, list(zip(*means, strict=True)), interval, np.concatenate(better))


def _judged(
    measurement: Measurement,
    values: list[tuple[float, float]],
    interval: tuple[float, float],
    better: NDArray[np.float64],
) -> Comparison:
    """The comparison of figures, one pair for each seed, with the verdict that all intervals agree on."""
    a, b = (float(np.mean(side)) for side in zip(*values, strict=True))
    differences = tuple(
        value_b - value_a if measurement.lower_is_better else value_a - value_b for value_a, value_b in values
    )
    intervals, seeds = [interval], {}
    if len(values) > 1:
        intervals.append(seed_interval(differences))
        seeds = {"seeds": differences, "seed_low": intervals[1][0], "seed_high": intervals[1][1]}
    above, below, p = sign_test(better)
    verdict: Outcome = "too close to call"
    if len(better) >= FEW or p < 0.05:
        if all(low > 0 for low, _ in intervals):
            verdict = "A"
        elif all(high < 0 for _, high in intervals):
            verdict = "B"
    return Comparison(
        measurement.name,
        measurement.kind,
        verdict,
        a,
        b,
        float(np.mean(differences)),
        *interval,
        unit=measurement.unit,
        items=len(better),
        above=above,
        below=below,
        p=p,
        **seeds,
    )
