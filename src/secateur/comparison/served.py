"""The verdicts of a study with its models' weights as they would be served, each form by itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.twins import Setting, Verdict, adjust_verdicts, compare_twins

__all__ = ["STORED", "ServedVerdict", "served_verdicts"]

STORED = "stored"  #: the weights that every other verdict is about


@dataclass(frozen=True)
class ServedVerdict:
    """A verdict with the weights of both models in one form."""

    weights: str  #: "stored", or a form such as "int4"
    verdict: Verdict
    bytes: int | None  #: of the pruned model's weights, mean over seeds; None where it was not measured


def served_verdicts(
    index: Index, verdicts: Sequence[Verdict], margin: float | None, decisive: Collection[tuple[Setting, Group]] = ()
) -> tuple[ServedVerdict, ...]:
    """Repeat verdicts with the weights in each form that the study measured, after that with the stored weights.

    Args:
        verdicts: with the stored weights, corrected for their number.
        decisive: the comparisons that the study's question names; the others are left out. Empty for all.
    """
    forms = list(dict.fromkeys(form for cell in index.results.cells for form in cell.served))
    if not forms:
        return ()
    rows = [ServedVerdict(STORED, verdict, None) for verdict in verdicts]
    for form in forms:
        cells = tuple(replace(cell, evaluation=cell.served.get(form)) for cell in index.results.cells)
        served = Index(replace(index.results, cells=cells))
        repeated = adjust_verdicts(compare_twins(served, served.comparisons, margin), decisive)
        rows += [ServedVerdict(form, verdict, _bytes(served, verdict.group)) for verdict in repeated]
    rows = [row for row in rows if not decisive or (row.verdict.setting, row.verdict.group.pooled) in decisive]
    return tuple(sorted(rows, key=lambda row: _place(row, verdicts)))


def _place(row: ServedVerdict, verdicts: Sequence[Verdict]) -> int:
    names = [(verdict.setting, verdict.group) for verdict in verdicts]
    return names.index((row.verdict.setting, row.verdict.group))


def _bytes(index: Index, group: Group) -> int | None:
    cells = index.over_seeds(group, PRUNED)
    sizes = [cell.evaluation.bytes for cell in cells if cell and cell.evaluation and cell.evaluation.bytes]
    return round(sum(sizes) / len(sizes)) if sizes else None
