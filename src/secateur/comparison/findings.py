"""Whether the findings of the paper (arXiv:2606.14150) hold in a study: each a contrast of paired differences.

A finding is turned into a contrast that is positive where it holds. Its mean over the comparisons of a method, or of
all methods, gets a 95% interval over held-out windows, and over seeds where there are several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.comparison.index import PRUNED, Group, Index, Model
from secateur.comparison.twins import (
    SCRATCH,
    MeanDifference,
    Paired,
    Setting,
    average,
    is_planned,
    mean_difference,
    pair_cells,
)
from secateur.formatting import decimals, number
from secateur.methods.registry import method_name
from secateur.report.prose import interval

__all__ = ["Finding", "FindingAnswer", "FindingRow", "find"]

FindingAnswer = Literal["holds", "does not hold", "too close to call", "not measured"]
Contrast = dict[int, Paired]  # seed -> what is positive where the finding holds; empty: not measured


@dataclass(frozen=True)
class FindingRow:
    """What a finding comes to for one method, or for all."""

    who: str
    answer: FindingAnswer
    mean: (
        MeanDifference | None
    )  #: of the contrast, nats per token, positive where the finding holds; None: not measured
    comparisons: int  #: measured
    sentence: str


@dataclass(frozen=True)
class Finding:
    """One finding of the paper, as it is here."""

    key: Literal["equal-tokens", "tokens", "ratio", "granularity"]
    claim: str
    measured_as: str  #: what the contrast is
    rows: tuple[FindingRow, ...]  #: for each method, then for all together

    @property
    def answer(self) -> FindingAnswer:
        """For all methods together."""
        return self.rows[-1].answer


def find(index: Index) -> tuple[Finding, ...]:
    """Every finding that the study's grid can speak to; a run that failed leaves its part "not measured"."""
    found = [
        Finding(
            "equal-tokens",
            "Pruned beats scratch at equal training tokens.",
            "loss(S_R) - loss(P-R)",
            _rows(_gaps(index, "training")),
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
        _granularity(index),
    ]
    has = {cell.name for cell in index.results.cells}
    return tuple(f for f in found if f.rows and SCRATCH["total" if f.key == "granularity" else "training"] in has)


def _gaps(index: Index, setting: Setting) -> dict[Group, Contrast]:
    return {group: _gap(index, group, setting) for group in index.pools if is_planned(index, group, setting)}


def _gap(index: Index, group: Group, setting: Setting) -> Contrast:
    """loss(scratch) - loss(P-R) of a comparison, seed by seed; seeds that were not measured are left out."""
    name = SCRATCH[setting]
    found = {
        one.seed: pair_cells(index.cell(one, PRUNED), index.cell(one, name), PRUNED, name)
        for one in index.pools[group.pooled]
    }
    return {seed: gap for seed, gap in found.items() if seed is not None and isinstance(gap, Paired)}


def _narrowing(index: Index, pairs: Iterable[tuple[Group, Group]]) -> dict[Group, Contrast]:
    """For each pair of comparisons, the gap of the first less that of the second."""
    contrasts: dict[Group, Contrast] = {}
    for first, last in pairs:
        one, two = _gap(index, first, "training"), _gap(index, last, "training")
        found = {seed: one[seed].minus(two[seed]) for seed in one if seed in two}
        contrasts[first] = {seed: gap for seed, gap in found.items() if isinstance(gap, Paired)}
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


def _granularity(index: Index) -> Finding:
    """Two claims in one: each has its rows, and the last row holds where both do.

    Of depth the paper says "matched or overtaken". No interval shows a match, so that one which includes zero is too
    close to call here as elsewhere.
    """
    gaps = _gaps(index, "total")
    kinds = {group: index.granularity(group.model) for group in gaps}
    fine = {group: gap for group, gap in gaps.items() if kinds[group] == "sparse"}
    coarse = {group: {s: -p for s, p in gap.items()} for group, gap in gaps.items() if kinds[group] == "depth"}
    rows: list[FindingRow] = []
    if fine and coarse:
        rows = [*_rows(fine, "All sparse methods"), *_rows(coarse, "All depth methods")]
        rows.append(_both(_row("", fine), _row("", coarse)))
    return Finding(
        "granularity",
        "At equal total tokens, sparse pruning keeps an edge and depth pruning is matched or overtaken.",
        "loss(S_{P+R}) - loss(P-R) for sparse methods, the opposite for depth",
        tuple(rows),
    )


def _both(one: FindingRow, two: FindingRow) -> FindingRow:
    """What two claims come to together: one that fails is enough to fail both."""
    order: tuple[FindingAnswer, ...] = ("does not hold", "not measured", "too close to call", "holds")
    both: FindingAnswer = min((one.answer, two.answer), key=order.index)
    return FindingRow("Both parts", both, None, one.comparisons + two.comparisons, f"Both parts together: {both}.")


def _rows(contrasts: dict[Group, Contrast], everyone: str = "All methods") -> tuple[FindingRow, ...]:
    """A row for each method, and one for all where there are several."""
    methods = list(dict.fromkeys(group.method for group in contrasts))
    rows = [
        _row(method_name(method), {group: gap for group, gap in contrasts.items() if group.method == method})
        for method in methods
    ]
    return (*rows, _row(everyone, contrasts)) if len(methods) > 1 else tuple(rows)


def _row(who: str, contrasts: dict[Group, Contrast]) -> FindingRow:
    means, used = average(contrasts.values())
    mean = mean_difference(means)
    if mean is None:
        return FindingRow(who, "not measured", None, 0, f"{who}: not measured.")
    answer: FindingAnswer = "holds" if mean.sign > 0 else "does not hold" if mean.sign < 0 else "too close to call"
    digits = decimals(mean.value, mean.low, mean.high)
    over = [] if len(contrasts) == 1 else [f"mean of {used} comparisons"]
    if used < len(contrasts):
        over = [f"mean of {used} of {len(contrasts)} comparisons, those measured with the same seeds"]
    over += [f"{mean.seeds} seeds"] if mean.seeds > 1 else []
    notes = "; ".join([interval(mean.low, mean.high, digits), *over])
    return FindingRow(who, answer, mean, used, f"{who}: {answer}, {number(mean.value, digits)} nats ({notes}).")
