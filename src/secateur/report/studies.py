"""Two studies side by side: the runs that they have in common, their verdicts, and what was set differently."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.naming import group_name
from secateur.comparison.twins import SCRATCH, MeanDifference, Paired, Setting, Verdict, mean_difference, pair_cells
from secateur.errors import UserError
from secateur.report.judgement import Judgement

__all__ = ["GapRow", "RunRow", "StudyComparison", "compare_studies"]


@dataclass(frozen=True)
class RunRow:
    """One run of both studies; losses are means over the seeds that both have."""

    name: str  #: of the comparison
    run: str
    a: float | None  #: held-out loss, nats per token
    b: float | None
    difference: MeanDifference | None  #: b - a, paired over windows; positive: A is better
    reason: str = ""  #: why there is no difference


@dataclass(frozen=True)
class GapRow:
    """One verdict of both studies."""

    name: str  #: of the comparison
    setting: Setting
    a: Verdict
    b: Verdict
    difference: MeanDifference | None  #: what pruning saves in A less what it saves in B, nats per token

    @property
    def agree(self) -> bool | None:
        """Whether both say the same; None where either was not measured."""
        winners = {self.a.winner, self.b.winner}
        return None if "not measured" in winners else len(winners) == 1


@dataclass(frozen=True)
class StudyComparison:
    """Two studies, compared."""

    a: Judgement
    b: Judgement
    runs: tuple[RunRow, ...]
    gaps: tuple[GapRow, ...]
    settings: tuple[tuple[str, Any, Any], ...]  #: what differs: key, in A, in B
    alone: tuple[int, int]  #: comparisons that only A, and only B, has

    @property
    def answer(self) -> str:
        """How far the two agree, in a sentence."""
        told = [row.agree for row in self.gaps if row.agree is not None]
        names = f"{self.a.results.name} and {self.b.results.name}"
        if not told:
            return f"{names} share no comparison that both have measured."
        if all(told):
            return f"{names} give the same verdict in all {len(told)} comparisons that both have measured."
        return f"{names} give the same verdict in {sum(told)} of {len(told)} comparisons that both have measured."


def compare_studies(a: Judgement, b: Judgement) -> StudyComparison:
    """Compare two studies by what they call alike: method, target, R, objective and, where there are several, parent.

    Losses under one protocol are compared window by window, over the seeds that both have. Under different protocols
    they are not compared; what pruning saves is then compared as of independent texts.

    Raises:
        UserError: if the studies have no comparison in common.
    """
    one_parent = len(a.index.parents) == len(b.index.parents) == 1
    theirs = {_key(group, one_parent): group for group in b.index.pools}
    ours = {_key(group, one_parent): group for group in a.index.pools}
    both = [(group, theirs[key]) for key, group in ours.items() if key in theirs]
    if not both:
        raise UserError(
            f"{a.results.name} and {b.results.name} have no comparison in common: none of the same method, target, R "
            "and objective; compare studies that share some"
        )
    among = [group for group, _ in both]
    verdicts = [{(v.setting, v.group.pooled): v for v in judgement.verdicts} for judgement in (a, b)]
    return StudyComparison(
        a,
        b,
        tuple(row for pair in both for row in _runs(a.index, b.index, *pair, group_name(pair[0], among, target=True))),
        tuple(
            _gap(a.index, b.index, setting, verdicts[0][setting, ours], verdicts[1][setting, theirs], among)
            for setting in SCRATCH
            for ours, theirs in both
            if (setting, ours) in verdicts[0] and (setting, theirs) in verdicts[1]
        ),
        tuple(_differing(a, b)),
        (len(ours) - len(both), len(theirs) - len(both)),
    )


def _key(group: Group, one_parent: bool) -> Group:
    """What a comparison is known by in both studies."""
    return replace(group, parent="") if one_parent else group


def _seeds(a: Index, b: Index, ours: Group, theirs: Group) -> list[tuple[Group, Group]]:
    known = {group.seed: group for group in b.pools[theirs]}
    return [(group, known[group.seed]) for group in a.pools[ours] if group.seed in known]


def _runs(a: Index, b: Index, ours: Group, theirs: Group, name: str) -> Iterator[RunRow]:
    seeds = _seeds(a, b, ours, theirs)
    for run in dict.fromkeys(cell.name for cell in (*a.of(ours), *b.of(theirs))):
        cells = [(a.cell(one, run), b.cell(other, run)) for one, other in seeds]
        if not any(one for one, _ in cells) or not any(other for _, other in cells):
            continue
        found = [pair_cells(one, other, f"{run} of A", f"{run} of B") for one, other in cells]
        measured = [pair for pair in found if isinstance(pair, Paired)]
        reason = next((pair for pair in found if isinstance(pair, str)), "")
        losses = [[c.evaluation.loss for c in side if c and c.evaluation] for side in zip(*cells, strict=True)]
        means = [sum(side) / len(side) if side else None for side in losses]
        yield RunRow(name, run, means[0], means[1], mean_difference(measured) if measured else None, reason)


def _gap(a: Index, b: Index, setting: Setting, ours: Verdict, theirs: Verdict, among: list[Group]) -> GapRow:
    name = group_name(ours.group.pooled, among, target=True)
    saved: list[Paired] = []
    for one, other in _seeds(a, b, ours.group.pooled, theirs.group.pooled):
        twin = SCRATCH[setting]
        gap = pair_cells(a.cell(one, PRUNED), a.cell(one, twin), PRUNED, twin)
        gap_b = pair_cells(b.cell(other, PRUNED), b.cell(other, twin), PRUNED, twin)
        if isinstance(gap, Paired) and isinstance(gap_b, Paired):
            difference = gap.minus(gap_b)
            saved += [difference] if isinstance(difference, Paired) else []
    return GapRow(name, setting, ours, theirs, mean_difference(saved) if saved else _independent(ours, theirs))


def _independent(ours: Verdict, theirs: Verdict) -> MeanDifference | None:
    """A difference of savings measured on different texts: half-widths of the intervals add as squares."""
    parts = (ours.difference, ours.low, ours.high, theirs.difference, theirs.low, theirs.high)
    if None in parts:
        return None
    a, a_low, a_high, b, b_low, b_high = (float(part) for part in parts if part is not None)
    down, up = math.hypot(a - a_low, b_high - b), math.hypot(a_high - a, b - b_low)
    return MeanDifference(a - b, a - b - down, a - b + up, min(ours.seeds, theirs.seeds))


def _differing(a: Judgement, b: Judgement) -> Iterator[tuple[str, Any, Any]]:
    """What was set or used differently, but for what merely identifies the study."""
    for part in ("corpus", "protocol", "recipe", "environment"):
        ours, theirs = getattr(a.results, part), getattr(b.results, part)
        for key in dict.fromkeys((*ours, *theirs)):
            if ours.get(key) != theirs.get(key):
                yield f"{part}.{key}", ours.get(key), theirs.get(key)
    for one, other in zip(a.results.parents, b.results.parents, strict=False):
        sizes = [
            {**p.shape, "parameters": p.parameters, "tokens": p.cost.tokens if p.cost else None} for p in (one, other)
        ]
        for key in sizes[0]:
            if sizes[0][key] != sizes[1].get(key):
                yield f"{one.name}.{key}", sizes[0][key], sizes[1].get(key)
