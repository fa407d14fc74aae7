"""Comparison of two studies: common runs, verdicts, and differing settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from secateur.comparison.decision import Decision, decide_independent
from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.naming import group_name
from secateur.comparison.twins import SCRATCH, Paired, Setting, Verdict, mean_difference, pair_cells
from secateur.errors import UserError
from secateur.formatting import every, plural
from secateur.report.judgement import Judgement

__all__ = ["GapRow", "RunRow", "StudyComparison", "compare_studies"]


@dataclass(frozen=True)
class RunRow:
    """One run that both studies have; losses are means over common seeds."""

    name: str  #: of the comparison
    run: str
    a: float | None  #: held-out loss, nats per token
    b: float | None
    difference: Decision  #: b - a, paired over documents; positive: A is better


@dataclass(frozen=True)
class GapRow:
    """One verdict that both studies have."""

    name: str  #: of the comparison
    setting: Setting
    a: Verdict
    b: Verdict
    difference: Decision  #: loss saved by pruning, A - B, nats per token

    @property
    def agree(self) -> bool | None:
        """Whether both verdicts are the same; None if either was not measured."""
        winners = {self.a.winner, self.b.winner}
        return None if "not measured" in winners else len(winners) == 1


@dataclass(frozen=True)
class StudyComparison:
    """The comparison of study A with study B."""

    a: Judgement
    b: Judgement
    runs: tuple[RunRow, ...]
    gaps: tuple[GapRow, ...]
    settings: tuple[tuple[str, Any, Any], ...]  #: settings that differ: key, value in A, value in B
    alone: tuple[int, int]  #: how many comparisons only A has, and only B

    @property
    def answer(self) -> str:
        """How many verdicts agree, and in how many comparisons the studies differ by more than noise."""
        agreements = [row.agree for row in self.gaps if row.agree is not None]
        names = f"A ({self.a.results.name}) and B ({self.b.results.name})"
        if not agreements:
            return f"{names} have no comparison that both have measured."
        total = len(agreements)
        share = every(total, "comparison") if all(agreements) else f"{sum(agreements)} of {plural(total, 'comparison')}"
        signs = [row.difference.verdict for row in self.gaps if row.agree is not None]
        apart = sum(verdict in ("first", "second") for verdict in signs)
        equal = signs.count("equal within margin")
        text = (
            f"{names} give the same verdict in {share} that both have measured. The loss saved differs by "
            f"more than noise in {apart} and is equal within the margin in {equal}."
        )
        rest = total - apart - equal
        cases = "the other" if rest == 1 else f"the other {rest}"
        return f"{text} For {cases} it is undecided: the intervals say how far apart they may be." if rest else text


def compare_studies(a: Judgement, b: Judgement) -> StudyComparison:
    """Compare two studies. Comparisons match by method, target, R, objective and, if there are several, parent.

    Under one protocol, losses are compared document by document over common seeds. Under different protocols, only the
    losses saved by pruning are compared, as measurements on independent texts: nothing is paired, and variances add.

    Raises:
        UserError: if the studies have no comparison in common.
    """
    one_parent = len(a.index.parents) == len(b.index.parents) == 1
    pools_a = {_key(group, one_parent): group for group in a.index.pools}
    pools_b = {_key(group, one_parent): group for group in b.index.pools}
    common = [(group, pools_b[key]) for key, group in pools_a.items() if key in pools_b]
    if not common:
        raise UserError(
            f"{a.results.name} and {b.results.name} have no comparison in common (the same method, target, R and "
            "objective); compare studies that share some"
        )
    among = [group for group, _ in common]
    verdicts = [{(v.setting, v.group.pooled): v for v in judgement.verdicts} for judgement in (a, b)]
    return StudyComparison(
        a,
        b,
        tuple(
            row for pair in common for row in _runs(a.index, b.index, *pair, group_name(pair[0], among, target=True))
        ),
        tuple(
            _gap(a.index, b.index, setting, verdicts[0][setting, group_a], verdicts[1][setting, group_b], among)
            for setting in SCRATCH
            for group_a, group_b in common
            if (setting, group_a) in verdicts[0] and (setting, group_b) in verdicts[1]
        ),
        tuple(_differing_settings(a, b)),
        (len(pools_a) - len(common), len(pools_b) - len(common)),
    )


def _key(group: Group, one_parent: bool) -> Group:
    """The key that identifies a comparison in both studies."""
    return replace(group, parent="") if one_parent else group


def _common_seeds(a: Index, b: Index, pool_a: Group, pool_b: Group) -> list[tuple[Group, Group]]:
    by_seed = {group.seed: group for group in b.pools[pool_b]}
    return [(group, by_seed[group.seed]) for group in a.pools[pool_a] if group.seed in by_seed]


def _runs(a: Index, b: Index, pool_a: Group, pool_b: Group, name: str) -> Iterator[RunRow]:
    seeds = _common_seeds(a, b, pool_a, pool_b)
    for run in dict.fromkeys(cell.name for cell in (*a.of(pool_a), *b.of(pool_b))):
        cells = [(a.cell(group_a, run), b.cell(group_b, run)) for group_a, group_b in seeds]
        if not any(cell_a for cell_a, _ in cells) or not any(cell_b for _, cell_b in cells):
            continue
        pairs = [pair_cells(cell_a, cell_b, f"{run} of A", f"{run} of B") for cell_a, cell_b in cells]
        measured = [pair for pair in pairs if isinstance(pair, Paired)]
        reason = next((pair for pair in pairs if isinstance(pair, str)), "the texts of its seeds differ")
        decision = mean_difference(measured) or Decision("not measured", reason=reason)
        losses = [[c.evaluation.loss for c in side if c and c.evaluation] for side in zip(*cells, strict=True)]
        means = [sum(side) / len(side) if side else None for side in losses]
        yield RunRow(name, run, means[0], means[1], decision)


def _gap(a: Index, b: Index, setting: Setting, in_a: Verdict, in_b: Verdict, among: list[Group]) -> GapRow:
    name, twin = group_name(in_a.group.pooled, among, target=True), SCRATCH[setting]
    saved: list[Paired] = []
    for group_a, group_b in _common_seeds(a, b, in_a.group.pooled, in_b.group.pooled):
        gap_a = pair_cells(a.cell(group_a, PRUNED), a.cell(group_a, twin), PRUNED, twin)
        gap_b = pair_cells(b.cell(group_b, PRUNED), b.cell(group_b, twin), PRUNED, twin)
        if isinstance(gap_a, Paired) and isinstance(gap_b, Paired):
            difference = gap_a.minus(gap_b)
            saved += [difference] if isinstance(difference, Paired) else []
    decision = mean_difference(saved) or decide_independent(in_a.decision, in_b.decision)
    return GapRow(name, setting, in_a, in_b, decision)


def _differing_settings(a: Judgement, b: Judgement) -> Iterator[tuple[str, Any, Any]]:
    for section in ("corpus", "protocol", "recipe", "environment"):
        yield from _differing_keys(section, getattr(a.results, section), getattr(b.results, section))
    for parent_a, parent_b in zip(a.index.parents.values(), b.index.parents.values(), strict=False):
        sizes = [
            {**p.shape, "parameters": p.parameters, "tokens": p.cost.tokens if p.cost else None}
            for p in (parent_a, parent_b)
        ]
        yield from _differing_keys(parent_a.name, *sizes)


def _differing_keys(prefix: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield f"{prefix}.{key}", a.get(key), b.get(key)
