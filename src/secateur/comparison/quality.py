"""Quality beyond the held-out loss: tasks, perplexities, and the loss by domain, pruned against scratch, paired."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from secateur.comparison.decision import MARGIN, Decision, adjust
from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.items import Comparison, compare_results
from secateur.comparison.records import Cell, Evaluation
from secateur.comparison.twins import SCRATCH, Setting, Verdict, Winner, is_planned, settings_of
from secateur.config import fingerprint
from secateur.evaluation.results import LOSS, Measurement, MeasurementKind
from secateur.evaluation.results import EvaluationResults as Measured

__all__ = ["QualityRow", "by_domain", "contradicting", "measurement_rows", "quality_rows"]

_DOMAIN = "loss on "


@dataclass(frozen=True)
class QualityRow:
    """One figure of a pruned and retrained model beside that of its from-scratch twin."""

    setting: Setting
    group: Group
    comparison: Comparison  #: A: pruned; B: scratch

    @property
    def winner(self) -> Winner:
        """Which of the two is better."""
        names: dict[str, Winner] = {"A": "pruned", "B": "scratch"}
        return names.get(self.comparison.verdict, self.comparison.verdict)  # type: ignore[arg-type]


def quality_rows(index: Index, margin: float | None = MARGIN) -> list[QualityRow]:
    """Every figure besides the held-out loss as a whole, of every comparison in every setting.

    Seeds of which either side was not measured are left out; where none is left, there is no row. The comparisons of
    one figure in one setting are corrected for their number.

    Args:
        margin: of losses, nats per token.
    """
    rows = []
    for setting in settings_of(index):
        for group in index.comparisons:
            if is_planned(index, group, setting):
                compared = _compared(index, group, SCRATCH[setting], margin)
                rows += [QualityRow(setting, group, comparison) for comparison in compared]
    return _adjusted(rows)


def _adjusted(rows: Sequence[QualityRow]) -> list[QualityRow]:
    """Correct the rows of each figure and setting together, by Holm's method."""
    families: dict[tuple[Setting, str], list[int]] = {}
    for number, row in enumerate(rows):
        families.setdefault((row.setting, row.comparison.name), []).append(number)
    corrected = list(rows)
    for numbers in families.values():
        for number, decision in zip(numbers, adjust([rows[n].comparison.decision for n in numbers]), strict=True):
            corrected[number] = replace(rows[number], comparison=replace(rows[number].comparison, decision=decision))
    return corrected


def _compared(index: Index, group: Group, name: str, margin: float | None) -> list[Comparison]:
    seeds = index.pools[group.pooled] if group.seed is None else (group,)
    pairs = [(_measured(index.cell(seed, PRUNED)), _measured(index.cell(seed, name))) for seed in seeds]
    both = [(pruned, scratch) for pruned, scratch in pairs if pruned and scratch]
    if not both:
        return []
    protocols_by_name: dict[str, set[str]] = {}
    for measurement in (m for pair in both for side in pair for m in side.measurements):
        protocols_by_name.setdefault(measurement.name, set()).add(measurement.protocol["fingerprint"])
    unlike = {name for name, protocols in protocols_by_name.items() if len(protocols) > 1}
    pruned, scratch = ([_without(side, unlike) for side in sides] for sides in zip(*both, strict=True))
    kinds: dict[str, MeasurementKind] = {m.name: m.kind for m in both[0][0].measurements}
    reason = "the two were measured under different protocols"
    absent = Decision("not measured", reason=reason)
    incomparable = [Comparison(name, kinds.get(name, "loss"), absent) for name in sorted(unlike)]
    comparable = any(side.measurements for side in (*pruned, *scratch))
    return [*(compare_results(pruned, scratch, margin) if comparable else ()), *incomparable]


def _without(measured: Measured, names: Set[str]) -> Measured:
    return replace(measured, measurements=[m for m in measured.measurements if m.name not in names])


def _measured(cell: Cell | None) -> Measured | None:
    """What was measured of a run, its held-out loss taken apart by domain."""
    if cell is None or cell.evaluation is None or not cell.evaluation.measured:
        return None
    parts = [part for whole in cell.evaluation.measured for part in (whole, *by_domain(whole))]
    return Measured(cell.name, [part for part in parts if part.name != LOSS])


def by_domain(measured: Measurement) -> list[Measurement]:
    """A loss taken apart by the domains of its documents; empty where they have none."""
    domains: dict[str, list[Any]] = {}
    for item in measured.items:
        if "domain" in item:
            domains.setdefault(item["domain"], []).append(item)
    return [
        replace(
            measured,
            name=f"{_DOMAIN}{domain}" if measured.name == LOSS else f"{measured.name} on {domain}",
            value=sum(i["value"] * i["tokens"] for i in items) / sum(i["tokens"] for i in items),
            protocol={"fingerprint": fingerprint([measured.protocol["fingerprint"], domain])},
            items=items,
            details={},
        )
        for domain, items in sorted(domains.items())
    ]


def contradicting(verdicts: Sequence[Verdict], rows: Sequence[QualityRow]) -> list[tuple[Verdict, QualityRow]]:
    """Where a perplexity or the accuracy on tasks decides for one path and the held-out loss for the other.

    With several tasks it is their average that counts, and no single one. Losses by domain are parts of a whole and do
    not count.
    """
    decided = ("pruned", "scratch")
    figures: dict[tuple[Setting, Group], dict[str, QualityRow]] = {}
    for row in rows:  # the average of tasks comes last
        comparison = row.comparison
        if comparison.kind == "accuracy" or not _is_part(comparison.name):
            name = "accuracy" if comparison.kind == "accuracy" else comparison.name
            figures.setdefault((row.setting, row.group), {})[name] = row
    return [
        (verdict, row)
        for verdict in verdicts
        if verdict.winner in decided
        for row in figures.get((verdict.setting, verdict.group), {}).values()
        if row.winner in decided and row.winner != verdict.winner
    ]


def _is_part(name: str) -> bool:
    """Whether a figure is of one domain (:func:`by_domain`)."""
    return " on " in name


def measurement_rows(index: Index) -> list[dict[str, Any]]:
    """Every figure of every model, one a row, those of the parents first: losses, by domain and position, and tasks."""
    rows = []
    for parent in index.results.parents:
        about = {"model": parent.name, "method": None, "target": None, "seed": parent.seed}
        rows += _figures(about, parent.evaluation)
    for pruned in index.results.pruned:
        about = {"model": f"{pruned.method}-{pruned.target} before retraining", "method": pruned.method}
        rows += _figures({**about, "target": pruned.target, "seed": pruned.seed}, pruned.evaluation)
    for cell in index.results.cells:
        about = {"model": cell.name, "method": cell.method, "target": cell.target}
        more = {"retrain_tokens": cell.retrain_tokens, "objective": cell.objective, "seed": cell.seed}
        rows += _figures({**about, **more}, cell.evaluation)
    return rows


def _figures(about: dict[str, Any], evaluation: Evaluation | None) -> list[dict[str, Any]]:
    keys = ("model", "method", "target", "retrain_tokens", "objective", "seed")
    named = {key: about.get(key) for key in keys}
    rows = []
    for measurement in evaluation.measured if evaluation else ():
        common = {"unit": measurement.scale, "protocol": measurement.protocol["fingerprint"]}
        figures = [(part.name, part.value) for part in (measurement, *by_domain(measurement))]
        positions = measurement.details.get("by_position", ())
        figures += [(f"{measurement.name} behind {p['from']} to {p['to']} tokens", p["loss"]) for p in positions]
        rows += [{**named, "figure": name, "value": value, **common} for name, value in figures]
    return rows
