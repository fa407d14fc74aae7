"""Test whether the findings of the paper (arXiv:2606.14150) hold in a study, case by case and on average.

Each finding is a contrast of paired differences that is positive where the finding holds. A case is one comparison,
over its seeds. A case that is a comparison of the study has the study's verdict; the others of a finding are corrected
for their number by Holm's method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.comparison.decision import Decision, VerdictName, adjust
from secateur.comparison.index import PRUNED, Group, Index, Model
from secateur.comparison.twins import (
    SCRATCH,
    Paired,
    Setting,
    Verdict,
    average,
    is_planned,
    mean_difference,
    pair_cells,
)
from secateur.methods.registry import method_name

__all__ = ["Finding", "FindingAnswer", "FindingCase", "FindingRow", "find"]

FindingAnswer = Literal["holds", "holds in part", "does not hold", "undecided", "not measured"]
Contrast = dict[int, Paired]  # seed -> a difference that is positive where the finding holds; empty: not measured

_AHEAD: frozenset[VerdictName] = frozenset({"first"})
_LEVEL_OR_AHEAD: frozenset[VerdictName] = frozenset({"first", "equal within margin"})


@dataclass(frozen=True)
class FindingCase:
    """The contrast of one comparison."""

    group: Group
    decision: Decision
    holds: bool


@dataclass(frozen=True)
class FindingRow:
    """A finding for one method, or for several together."""

    scope: str  #: the method's name, or e.g. "All methods"
    #: mean contrast, nats per token, positive where the finding holds; None: not measured, or two contrasts
    mean: Decision | None
    cases: tuple[FindingCase, ...]  #: every comparison that the study plans for it

    @property
    def measured(self) -> tuple[FindingCase, ...]:
        """The cases that were measured."""
        return tuple(case for case in self.cases if case.decision.verdict != "not measured")

    @property
    def exceptions(self) -> tuple[FindingCase, ...]:
        """The measured cases in which the finding does not hold, or nothing is decided."""
        return tuple(case for case in self.measured if not case.holds)

    @property
    def answer(self) -> FindingAnswer:
        """By the cases: ``holds`` only if it holds in every measured one."""
        if not self.measured:
            return "not measured"
        if not self.exceptions:
            return "holds"
        if len(self.exceptions) < len(self.measured):
            return "holds in part"
        against = all(case.decision.sign < 0 or case.decision.verdict.startswith("equal") for case in self.exceptions)
        return "does not hold" if against else "undecided"


@dataclass(frozen=True)
class Finding:
    """A finding of the paper, with its answers in this study."""

    key: Literal["equal-tokens", "tokens", "ratio", "granularity"]
    claim: str
    measured_as: str  #: the contrast, as a formula
    rows: tuple[FindingRow, ...]  #: for each method, then for all together

    @property
    def answer(self) -> FindingAnswer:
        """For all methods together."""
        return self.rows[-1].answer


def find(index: Index, verdicts: Sequence[Verdict]) -> tuple[Finding, ...]:
    """List the findings that the study's grid can test; where a run failed, the answer is "not measured".

    Args:
        verdicts: on the study's comparisons; a case that is one of them has its decision.
    """
    decisions = {(verdict.setting, verdict.group.pooled): verdict.decision for verdict in verdicts}
    training = {group: decision for (setting, group), decision in decisions.items() if setting == "training"}
    total = {group: decision for (setting, group), decision in decisions.items() if setting == "total"}
    findings = [
        Finding(
            "equal-tokens",
            "Pruned beats scratch at equal training tokens.",
            "loss(S_R) - loss(P-R)",
            _rows(_gaps(index, "training"), decisions=training),
        ),
        Finding(
            "tokens",
            "That gap narrows with more tokens.",
            "the gap loss(S_R) - loss(P-R) at the smallest R, less the gap at the largest",
            _rows(_narrowing(index, _ladders(index))),
        ),
        Finding(
            "ratio",
            "That gap narrows as more is removed.",
            "the gap loss(S_R) - loss(P-R) at the smallest ratio, less the gap at the largest, at one R",
            _rows(_narrowing(index, _ratios(index))),
        ),
        _granularity(index, total),
    ]
    names = {cell.name for cell in index.results.cells}
    return tuple(f for f in findings if f.rows and SCRATCH["total" if f.key == "granularity" else "training"] in names)


def _gaps(index: Index, setting: Setting) -> dict[Group, Contrast]:
    return {group: _gap(index, group, setting) for group in index.pools if is_planned(index, group, setting)}


def _gap(index: Index, group: Group, setting: Setting) -> Contrast:
    """loss(scratch) - loss(P-R) of a comparison, seed by seed, without the seeds that were not measured."""
    name = SCRATCH[setting]
    gaps = {
        seeded.seed: pair_cells(index.cell(seeded, PRUNED), index.cell(seeded, name), PRUNED, name)
        for seeded in index.pools[group.pooled]
    }
    return {seed: gap for seed, gap in gaps.items() if seed is not None and isinstance(gap, Paired)}


def _narrowing(index: Index, pairs: Iterable[tuple[Group, Group]]) -> dict[Group, Contrast]:
    """For each pair of comparisons, the gap of the first less that of the second."""
    contrasts: dict[Group, Contrast] = {}
    for first, last in pairs:
        wide, narrow = _gap(index, first, "training"), _gap(index, last, "training")
        changes = {seed: wide[seed].minus(narrow[seed]) for seed in wide if seed in narrow}
        contrasts[first] = {seed: change for seed, change in changes.items() if isinstance(change, Paired)}
    return contrasts


def _ladders(index: Index) -> list[tuple[Group, Group]]:
    """The comparisons of the smallest and the largest R, for each model and objective that has several."""
    ladders: dict[tuple[Model, str], list[Group]] = {}
    for group in (group for group in index.pools if is_planned(index, group, "training")):
        ladders.setdefault((group.model, group.objective), []).append(group)
    sort = [sorted(groups, key=lambda group: group.retrain_tokens) for groups in ladders.values()]
    return [(groups[0], groups[-1]) for groups in sort if len(groups) > 1]


def _ratios(index: Index) -> list[tuple[Group, Group]]:
    """The comparisons of the smallest and the largest ratio, at the largest R that has several."""
    sets: dict[tuple[str, str, str], dict[int, list[Group]]] = {}
    for group in (group for group in index.pools if is_planned(index, group, "training")):
        by_tokens = sets.setdefault((group.parent, group.method, group.objective), {})
        by_tokens.setdefault(group.retrain_tokens, []).append(group)
    pairs = []
    for by_tokens in sets.values():
        several = {tokens: groups for tokens, groups in by_tokens.items() if len(_shares(index, groups)) > 1}
        if several:
            shares = _shares(index, several[max(several)])
            pairs.append((shares[min(shares)], shares[max(shares)]))
    return pairs


def _shares(index: Index, groups: Sequence[Group]) -> dict[float, Group]:
    return {share: group for group in groups if (share := index.ratio(group.model)) is not None}


def _granularity(index: Index, decisions: Mapping[Group, Decision]) -> Finding:
    """Test two claims in one: each has its rows, and the last row has the cases of both.

    "Matched or overtaken" holds where the from-scratch model is ahead, or equal within the margin.
    """
    gaps = _gaps(index, "total")
    kinds = {group: index.granularity(group.model) for group in gaps}
    fine = {group: gap for group, gap in gaps.items() if kinds[group] == "sparse"}
    coarse = {group: {s: -p for s, p in gap.items()} for group, gap in gaps.items() if kinds[group] == "depth"}
    opposite = {group: _opposite(decision) for group, decision in decisions.items()}
    rows: list[FindingRow] = []
    if fine and coarse:
        sparse = _rows(fine, "All sparse methods", decisions=decisions)
        depth = _rows(coarse, "All depth methods", _LEVEL_OR_AHEAD, decisions=opposite)
        rows = [*sparse, *depth, FindingRow("Both parts", None, (*sparse[-1].cases, *depth[-1].cases))]
    return Finding(
        "granularity",
        "At equal total tokens, sparse pruning keeps an edge and depth pruning is matched or overtaken.",
        "loss(S_{P+R}) - loss(P-R) for sparse methods, the opposite for depth",
        tuple(rows),
    )


def _rows(
    contrasts: dict[Group, Contrast],
    scope: str = "All methods",
    holding: frozenset[VerdictName] = _AHEAD,
    decisions: Mapping[Group, Decision] | None = None,
) -> tuple[FindingRow, ...]:
    """A row for each method, and one for all where there are several."""
    cases = _cases(contrasts, holding, decisions)
    methods = list(dict.fromkeys(group.method for group in contrasts))
    rows = []
    for method in methods:
        contrasts_of_method = {group: gap for group, gap in contrasts.items() if group.method == method}
        rows.append(
            _row(method_name(method), contrasts_of_method, [case for case in cases if case.group.method == method])
        )
    return (*rows, _row(scope, contrasts, cases)) if len(methods) > 1 else tuple(rows)


def _row(scope: str, contrasts: dict[Group, Contrast], cases: Sequence[FindingCase]) -> FindingRow:
    mean, _ = average([list(gaps.values()) for gaps in contrasts.values()])
    return FindingRow(scope, mean, tuple(cases))


def _cases(
    contrasts: dict[Group, Contrast],
    holding: frozenset[VerdictName],
    decisions: Mapping[Group, Decision] | None = None,
) -> list[FindingCase]:
    """Decide every comparison over its seeds: by its verdict, where it has one; else corrected for their number."""
    if decisions is None:
        absent = Decision("not measured", reason="its runs were not measured")
        each = [mean_difference(list(gaps.values())) or absent for gaps in contrasts.values()]
        decisions = dict(zip(contrasts, adjust(each), strict=True))
    return [FindingCase(group, decisions[group], decisions[group].verdict in holding) for group in contrasts]


def _opposite(decision: Decision) -> Decision:
    """The decision with the two paths exchanged."""
    names: dict[VerdictName, VerdictName] = {"first": "second", "second": "first"}
    value, low, high = (None if x is None else -x for x in (decision.value, decision.high, decision.low))
    verdict = names.get(decision.verdict, decision.verdict)
    return replace(decision, verdict=verdict, value=value, low=low, high=high)
