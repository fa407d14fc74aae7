"""Compare pruned with from-scratch runs: paired differences of held-out loss, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from secateur.comparison.decision import MARGIN, Decision, HasDecision, adjust, decide, decide_average
from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.records import Cell, Evaluation, TextUnit, pair_units
from secateur.formatting import plural

__all__ = [
    "SCRATCH",
    "SETTINGS",
    "Paired",
    "Setting",
    "Verdict",
    "Winner",
    "adjust_verdicts",
    "average",
    "compare_twins",
    "is_planned",
    "mean_difference",
    "pair_cells",
    "pair_evaluations",
    "settings_of",
]

Setting = Literal["training", "total", "training-flops", "total-flops"]
Winner = Literal["pruned", "scratch", "equal within margin", "undecided", "not measured"]

#: The from-scratch run that P-R is compared with in each setting.
SCRATCH: dict[Setting, str] = {"training": "S_R", "total": "S_{P+R}", "training-flops": "S_F", "total-flops": "S_{P+F}"}
SETTINGS: tuple[Setting, ...] = tuple(SCRATCH)


@dataclass(frozen=True)
class Paired:
    """The difference of two models of one seed on the same text; positive where the second has the higher loss."""

    differences: np.ndarray = field(repr=False)  #: [units], nats per token
    weights: np.ndarray = field(repr=False)  #: [units], predicted tokens
    documents: np.ndarray = field(repr=False)  #: [units], the document of each
    unit: TextUnit
    protocol: str

    @property
    def value(self) -> float:
        """The difference of the losses, nats per token."""
        return float(np.average(self.differences, weights=self.weights))

    @property
    def text(self) -> tuple[str, TextUnit, int]:
        """What the difference was measured on; only differences on the same text are combined."""
        return self.protocol, self.unit, len(self.differences)

    def minus(self, pair: Paired) -> Paired | str:
        """A difference of differences over the same units, or why there is none."""
        if self.text != pair.text:
            return "the losses were measured under different protocols"
        return replace(self, differences=self.differences - pair.differences)

    def __neg__(self) -> Paired:
        return replace(self, differences=-self.differences)


@dataclass(frozen=True)
class Verdict(HasDecision):
    """One comparison of a pruned and retrained model with its from-scratch twin.

    ``decision`` is about loss(scratch) - loss(pruned) in nats per token, so positive means that pruning is better. All
    figures are None where the comparison was not measured. Where the group has no seed, losses and difference are means
    over the seeds that were measured.
    """

    setting: Setting
    group: Group
    decision: Decision
    pruned_loss: float | None = None
    scratch_loss: float | None = None
    flop_ratio: float | None = None  #: FLOPs of the whole pruned pipeline over those of the scratch run
    seeds: int = 0  #: seeds that were measured
    planned: int = 1  #: seeds that the comparison has
    unit: TextUnit | None = None  #: what was paired

    @property
    def winner(self) -> Winner:
        """The better path, or why none is named."""
        names: dict[str, Winner] = {"first": "pruned", "second": "scratch"}
        return names.get(self.decision.verdict, self.decision.verdict)  # type: ignore[arg-type]


def pair_cells(better: Cell | None, worse: Cell | None, better_name: str, worse_name: str) -> Paired | str:
    """loss(worse) - loss(better), unit by unit; or why it was not measured."""
    first, second = better.evaluation if better else None, worse.evaluation if worse else None
    reason = _absence(better_name, better) or _absence(worse_name, worse)
    reason = reason or _divergence(better_name, better) or _divergence(worse_name, worse)
    if reason or first is None or second is None:
        return reason
    pair = pair_evaluations(first, second)
    if isinstance(pair, str):
        return f"the {_run_name(better_name)} and the {_run_name(worse_name)} {pair}"
    return pair


def pair_evaluations(better: Evaluation, worse: Evaluation) -> Paired | str:
    """loss(worse) - loss(better), unit by unit; or why the two cannot be paired, as the end of a sentence."""
    if better.protocol != worse.protocol:
        return "were evaluated under different protocols"
    if len(better.windows) != len(worse.windows):
        return f"have {len(better.windows)} and {plural(len(worse.windows), 'held-out window')}"
    first, second = pair_units(better, worse)
    return Paired(second.values - first.values, first.weights, first.documents, first.unit, better.protocol)


def mean_difference(seeds: Sequence[Paired], margin: float | None = MARGIN) -> Decision | None:
    """Decide by the mean over seeds; None where there is no seed, or where their texts differ."""
    if len({pair.text for pair in seeds}) != 1:
        return None
    first = seeds[0]
    differences = np.stack([pair.differences for pair in seeds])
    return decide(differences, first.documents, weights=first.weights, margin=margin)


def average(comparisons: Sequence[Sequence[Paired]], margin: float | None = MARGIN) -> tuple[Decision | None, int]:
    """Decide by the mean over comparisons, each with every seed that it has, and count the comparisons.

    Nothing is decided where there is none, or where their texts differ.
    """
    measured = [pairs for pairs in comparisons if pairs]
    if len({pair.text for pairs in measured for pair in pairs}) != 1:
        return None, 0
    first = measured[0][0]
    differences = [np.stack([pair.differences for pair in pairs]) for pairs in measured]
    return decide_average(differences, first.documents, weights=first.weights, margin=margin), len(measured)


def settings_of(index: Index) -> tuple[Setting, ...]:
    """The settings that the study has runs for."""
    names = {cell.name for cell in index.results.cells}
    return tuple(setting for setting in SETTINGS if SCRATCH[setting] in names)


def compare_twins(index: Index, groups: Sequence[Group], margin: float | None = MARGIN) -> tuple[Verdict, ...]:
    """Judge ``groups`` in every setting of the study, each by itself; one without a seed, over all its seeds."""
    return tuple(
        _judge(index, setting, group, margin)
        for setting in settings_of(index)
        for group in groups
        if is_planned(index, group, setting)
    )


def adjust_verdicts(
    verdicts: Sequence[Verdict], decisive: Collection[tuple[Setting, Group]] = ()
) -> tuple[Verdict, ...]:
    """Correct verdicts by Holm's method: the decisive comparisons together, the others of each setting together.

    Args:
        decisive: setting and group, without a seed, of the comparisons that the study's question names.
    """
    families: dict[str, list[int]] = {}
    for number, verdict in enumerate(verdicts):
        named = (verdict.setting, verdict.group.pooled) in decisive
        families.setdefault("" if named else verdict.setting, []).append(number)
    corrected = list(verdicts)
    for numbers in families.values():
        for number, decision in zip(numbers, adjust([verdicts[n].decision for n in numbers]), strict=True):
            corrected[number] = replace(verdicts[number], decision=decision)
    return tuple(corrected)


def is_planned(index: Index, group: Group, setting: Setting) -> bool:
    """Whether the study has a twin, finished or not, for a comparison in this setting; it may leave some out.

    A pruned model of which there is no run at all is not left out: nothing is known of it yet.
    """
    return any(index.over_seeds(group, SCRATCH[setting])) or not index.of(group)


def _judge(index: Index, setting: Setting, group: Group, margin: float | None) -> Verdict:
    """Compare over seeds, or give the reason why that is not possible.

    A seed that was not measured is left out. A seed that diverged was measured: without it the others would mislead.
    """
    name = SCRATCH[setting]
    seeds = index.pools[group] if group.seed is None else (group,)
    pairs = [(index.cell(seeded, PRUNED), index.cell(seeded, name)) for seeded in seeds]
    ratio = next((r for pruned, scratch in pairs if (r := _flop_ratio(index, pruned, scratch)) is not None), None)
    differences = [pair_cells(*pair, PRUNED, name) for pair in pairs]
    measured = [pair for pair in differences if isinstance(pair, Paired)]
    divergences = [text for pair in pairs for text in map(_divergence, (PRUNED, name), pair) if text]
    decision = None if divergences else mean_difference(measured, margin)
    if decision is None:
        several = "its seeds were evaluated under several protocols"
        reason = next((text for text in (*divergences, *differences) if isinstance(text, str)), several)
        return Verdict(setting, group, Decision("not measured", reason=reason), flop_ratio=ratio, planned=len(seeds))
    used = [cells for cells, pair in zip(pairs, differences, strict=True) if isinstance(pair, Paired)]
    pruned_loss, scratch_loss = (
        float(np.mean([c.evaluation.loss for c in side if c and c.evaluation])) for side in zip(*used, strict=True)
    )
    counts = (len(measured), len(seeds), measured[0].unit)
    return Verdict(setting, group, decision, pruned_loss, scratch_loss, ratio, *counts)


def _flop_ratio(index: Index, pruned: Cell | None, scratch: Cell | None) -> float | None:
    parent = index.parent_cost(pruned.parent) if pruned else None
    if not pruned or not pruned.pruning or not scratch or not parent or not scratch.training.flops:
        return None
    return (parent + pruned.pruning + pruned.training).flops / scratch.training.flops


def _absence(name: str, cell: Cell | None) -> str:
    if cell is None:
        return f"the study has no {_run_name(name)}"
    if cell.evaluation is None:
        return f"the {_run_name(name)} has no held-out loss"
    return ""


def _divergence(name: str, cell: Cell | None) -> str:
    if cell is None or cell.evaluation is None:
        return ""
    finite = all(map(math.isfinite, (cell.evaluation.loss, *cell.evaluation.windows)))
    return "" if finite else f"the held-out loss of the {_run_name(name)} is not finite"


def _run_name(name: str) -> str:
    if name == PRUNED:
        return f"pruned run {name}"
    return f"scratch run {name}" if name in SCRATCH.values() else f"run {name}"
