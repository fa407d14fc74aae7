"""Compare two models on the same items: by how much one is better, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from secateur.comparison.decision import MARGIN, Decision, HasDecision, decide, sign_test
from secateur.errors import UserError
from secateur.evaluation.results import LOSS, EvaluationResults, Measurement, MeasurementKind, check_same_protocols
from secateur.formatting import plural

__all__ = ["AVERAGE", "Comparison", "Comparisons", "Outcome", "compare_results"]

AVERAGE = "average of tasks"

Outcome = Literal["A", "B", "equal within margin", "undecided", "not measured"]


@dataclass(frozen=True)
class Comparison(HasDecision):
    """One figure of A beside that of B.

    ``decision`` is about how much better A is: loss(B) - loss(A), or accuracy(A) - accuracy(B); other metrics of tasks
    by their own direction. ``above`` and ``below`` count the items on which A and B are better. With several seeds,
    figures are means over them. What was not measured is None.
    """

    name: str
    kind: MeasurementKind
    decision: Decision
    a: float | None = None
    b: float | None = None
    unit: str | None = None  #: of the items: "documents", "windows"
    items: int | None = None
    above: int | None = None
    below: int | None = None
    seeds: tuple[float, ...] = ()  #: the difference of each seed, where there are several

    @property
    def verdict(self) -> Outcome:
        """The better model, or why none is named."""
        names: dict[str, Outcome] = {"first": "A", "second": "B"}
        return names.get(self.decision.verdict, self.decision.verdict)  # type: ignore[arg-type]

    def record(self) -> dict[str, Any]:
        """As plain values."""
        figures = ("name", "kind", "verdict", "a", "b", "unit", "items", "above", "below", "low", "high")
        return {
            **decision_record(self.decision),
            **{key: getattr(self, key) for key in figures},
            "by_seed": list(self.seeds),
        }


def decision_record(decision: Decision) -> dict[str, Any]:
    """A decision as plain values, without its verdict, whose words depend on what was compared."""
    return {
        "difference": decision.value,
        "interval": None if decision.low is None else [decision.low, decision.high],
        "p": decision.p,
        "adjusted_p": decision.adjusted_p,
        "comparisons": decision.comparisons,
        "margin": decision.margin,
        "covers": decision.covers,
        "seeds": decision.seeds,
        "documents": decision.documents,
        "effective_documents": decision.effective_documents,
        "text_share": decision.text_share,
        "reason": decision.reason,
    }


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


def compare_results(
    a: Sequence[EvaluationResults], b: Sequence[EvaluationResults], margin: float | None = MARGIN
) -> Comparisons:
    """Compare two models, each measured once or, trained from several seeds, as often.

    Args:
        a: of one model, one for each seed.
        b: of the other, with the seeds in the same order.
        margin: losses (nats per token) that differ by less count as equal; 0 or None: equality is never a verdict.
            Accuracies have no such margin.

    Returns:
        One comparison for each measurement that either side has, and one of the average where there are several tasks.

    Raises:
        UserError: if the sides have different numbers of seeds, figures of one name were measured differently, or
            models of different tokenizers were measured on ids.
    """
    if len(a) != len(b):
        raise UserError(
            f"A has {plural(len(a), 'seed')} and B has {len(b)}; name as many results on both sides, in pairs"
        )
    _check_tokenizers([*a, *b])
    names = check_same_protocols((r.model, m.name, m.protocol) for r in (*a, *b) for m in r.measurements)
    rows = [_compare(name, a, b, margin) for name in names]
    accuracies = [c.name for c in rows if c.kind == "accuracy" and c.verdict != "not measured"]
    counted = _apart([_of(a[0], name) for name in accuracies])
    if len(counted) > 1:
        rows.append(_average(counted, a, b))
    return Comparisons(tuple(rows))


def _check_tokenizers(results: Sequence[EvaluationResults]) -> None:
    """Refuse models that were measured on ids, which their tokenizers do not share."""
    tokenizers = {r.about["tokenizer"]: r.model for r in results if "tokenizer" in r.about}
    if len(tokenizers) > 1:
        first, second, *_ = tokenizers.values()
        raise UserError(
            f"{first} and {second} have different tokenizers, so that the ids that they were measured on mean "
            "something else to one of them; measure both on text that each encodes itself"
        )


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


def _compare(
    name: str, a: Sequence[EvaluationResults], b: Sequence[EvaluationResults], margin: float | None
) -> Comparison:
    measurement = next(m for r in (*a, *b) if (m := r.of(name)))

    def absent(reason: str) -> Comparison:
        return Comparison(name, measurement.kind, Decision("not measured", reason=reason))

    for side, results in (("A", a), ("B", b)):
        if any(r.of(name) is None for r in results):
            return absent(f"{side} has no {name}")
    if len({_of(r, name).unit for r in (*a, *b)}) > 1:  # a text of one document, which older versions took by window
        return absent("one has it by document, another by window; measure both with the same version")
    parts = [_of(a[0], task) for task in measurement.tasks or (name,)]
    if reason := _unfit(measurement, parts):
        return absent(reason)
    values = [(_of(first, name).value, _of(second, name).value) for first, second in zip(a, b, strict=True)]
    if measurement.kind == "loss":
        gains = _gains(name, a, b)
        tokens = [item.get("tokens", 1) for item in measurement.items]
        decision = decide(gains, np.arange(gains.shape[1]), weights=tokens, margin=margin)
        return _row(measurement, values, decision, gains)
    return _row(measurement, values, *_decide_tasks(_shares(measurement, a[0]), a, b))


def _unfit(measurement: Measurement, parts: Sequence[Measurement]) -> str:
    """Why a figure cannot be compared item by item; empty where it can."""
    if measurement.tasks and not measurement.details["compared"]:
        return f"its tasks are compared by another metric than {measurement.scale}"
    if any(item["value"] is None for part in parts for item in part.items):
        return f"{measurement.scale} is of all documents together, and single ones have none"
    return ""


def _of(results: EvaluationResults, name: str) -> Measurement:
    measurement = results.of(name)
    assert measurement is not None, name
    return measurement


def _gains(name: str, a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]) -> NDArray[np.float64]:
    """How much better A is on each item: [seeds, items]."""
    gains = []
    for pair in zip(a, b, strict=True):
        values_a, values_b = (
            np.asarray([item["value"] for item in _of(r, name).items], dtype=np.float64) for r in pair
        )
        gains.append(values_b - values_a if _of(a[0], name).lower_is_better else values_a - values_b)
    return np.stack(gains)


def _decide_tasks(
    shares: Sequence[tuple[str, float]], a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]
) -> tuple[Decision, NDArray[np.float64]]:
    """Decide by a mean of tasks, and the gains [seeds, items] behind it.

    Args:
        shares: each task with what it counts for in the mean, 1 in all. Its items share that evenly.
    """
    by_task = [_gains(task, a, b) for task, _ in shares]
    sizes = [part.shape[1] for part in by_task]
    gains = np.concatenate(by_task, axis=1)
    weights = np.repeat([share / size for (_, share), size in zip(shares, sizes, strict=True)], sizes)
    strata = np.repeat(np.arange(len(sizes)), sizes)
    return decide(gains, np.arange(gains.shape[1]), weights=weights, strata=strata, margin=None), gains


def _shares(measured: Measurement, results: EvaluationResults) -> list[tuple[str, float]]:
    """The tasks that a figure is the mean of, and what each of them counts; a single one counts all."""
    if not measured.tasks:
        return [(measured.name, 1.0)]
    by_size = measured.protocol["by_size"]
    sizes = [len(_of(results, task).items) if by_size else 1 for task in measured.tasks]
    return [(task, size / sum(sizes)) for task, size in zip(measured.tasks, sizes, strict=True)]


def _average(names: Sequence[str], a: Sequence[EvaluationResults], b: Sequence[EvaluationResults]) -> Comparison:
    """The mean of accuracies, in which a task counts once however many documents it has, and a group as much."""
    shares = [(task, share / len(names)) for name in names for task, share in _shares(_of(a[0], name), a[0])]
    means = [[float(np.mean([_of(r, name).value for name in names])) for r in side] for side in (a, b)]
    decision, gains = _decide_tasks(shares, a, b)
    row = _row(_of(a[0], names[0]), list(zip(*means, strict=True)), decision, gains)
    return Comparison(AVERAGE, "accuracy", decision, row.a, row.b, row.unit, row.items, row.above, row.below, row.seeds)


def _row(
    measurement: Measurement,
    values: list[tuple[float, float]],
    decision: Decision,
    gains: NDArray[np.float64],
) -> Comparison:
    """The comparison of figures, one pair for each seed."""
    a, b = (float(np.mean(side)) for side in zip(*values, strict=True))
    by_seed = tuple(second - first if measurement.lower_is_better else first - second for first, second in values)
    above, below, _ = sign_test(gains.mean(axis=0))
    return Comparison(
        measurement.name,
        measurement.kind,
        decision,
        a,
        b,
        measurement.unit,
        gains.shape[1],
        above,
        below,
        by_seed if len(values) > 1 else (),
    )
