"""Compare pruned with from-scratch runs: paired differences of held-out loss, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from secateur.comparison.index import PRUNED, Group, Index
from secateur.comparison.intervals import pooled_interval
from secateur.comparison.records import Cell, Evaluation

__all__ = [
    "SCRATCH",
    "SETTINGS",
    "MeanDifference",
    "Paired",
    "Setting",
    "Verdict",
    "Winner",
    "average",
    "compare_twins",
    "is_planned",
    "mean_difference",
    "pair_cells",
    "settings_of",
]

Setting = Literal["training", "total", "training-flops", "total-flops"]
Winner = Literal["pruned", "scratch", "too close to call", "not measured"]

#: The from-scratch run that P-R is compared with in each setting.
SCRATCH: dict[Setting, str] = {"training": "S_R", "total": "S_{P+R}", "training-flops": "S_F", "total-flops": "S_{P+F}"}
SETTINGS: tuple[Setting, ...] = tuple(SCRATCH)

_ROUNDING = 1e-9  # nats; what two sums of equal losses may differ by


@dataclass(frozen=True)
class Paired:
    """The difference of two models of one seed, window by window; positive where the second has the higher loss."""

    value: float  #: difference of the losses, nats per token
    windows: np.ndarray = field(repr=False)  #: [windows], differences of their mean losses
    protocol: str

    def minus(self, pair: Paired) -> Paired | str:
        """A difference of differences over the same windows, or why there is none."""
        if self.protocol != pair.protocol or len(self.windows) != len(pair.windows):
            return "the losses were measured under different protocols"
        return Paired(self.value - pair.value, self.windows - pair.windows, self.protocol)

    def __neg__(self) -> Paired:
        return Paired(-self.value, -self.windows, self.protocol)


@dataclass(frozen=True)
class MeanDifference:
    """A mean difference in nats per token and its 95% interval."""

    value: float
    low: float
    high: float
    seeds: int  #: number of seeds that it is the mean of

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        return (self.low > _ROUNDING) - (self.high < -_ROUNDING)


@dataclass(frozen=True)
class Verdict:
    """One comparison of a pruned and retrained model with its from-scratch twin.

    ``difference`` is loss(scratch) - loss(pruned) in nats per token, so positive means that pruning is better;
    ``low`` and ``high`` bound its 95% interval. All figures are None where the comparison was not measured. Where the
    group has no seed, losses and difference are means over the seeds that were measured.
    """

    setting: Setting
    group: Group
    winner: Winner
    pruned_loss: float | None = None
    scratch_loss: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    flop_ratio: float | None = None  #: FLOPs of the whole pruned pipeline over those of the scratch run
    reason: str = ""  #: why it is not measured
    seeds: int = 0  #: seeds that were measured
    planned: int = 1  #: seeds that the comparison has


def pair_cells(better: Cell | None, worse: Cell | None, better_name: str, worse_name: str) -> Paired | str:
    """loss(worse) - loss(better), window by window; or why it was not measured."""
    first, second = better.evaluation if better else None, worse.evaluation if worse else None
    reason = _absence(better_name, better) or _absence(worse_name, worse)
    if not reason and first and second:
        reason = _mismatch(first, second, better_name, worse_name)
    if reason or first is None or second is None:
        return reason
    windows = np.asarray(second.windows) - np.asarray(first.windows)
    return Paired(second.loss - first.loss, windows, first.protocol)


def mean_difference(seeds: Sequence[Paired]) -> MeanDifference | None:
    """The mean over seeds with its interval; None where there is no seed, or where their protocols differ."""
    if len({(pair.protocol, len(pair.windows)) for pair in seeds}) != 1:
        return None
    low, high = pooled_interval(np.stack([pair.windows for pair in seeds]))
    return MeanDifference(float(np.mean([pair.value for pair in seeds])), low, high, len(seeds))


def average(comparisons: Iterable[dict[int, Paired]]) -> tuple[list[Paired], int]:
    """The mean over comparisons for each seed that they have in common, and over how many of them.

    Comparisons are taken as given, not as a draw. Where no seed is common to all, those with the fewest are left out;
    nothing is left where their protocols differ.
    """
    seeds_by_comparison = sorted((pairs for pairs in comparisons if pairs), key=len, reverse=True)
    if len({(pair.protocol, len(pair.windows)) for pairs in seeds_by_comparison for pair in pairs.values()}) > 1:
        return [], 0
    used: list[dict[int, Paired]] = []
    common: set[int] = set()
    for pairs in seeds_by_comparison:
        shared = common & set(pairs) if used else set(pairs)
        if shared:
            used, common = [*used, pairs], shared
    means = []
    for seed in sorted(common):
        each = [pairs[seed] for pairs in used]
        windows = np.mean([pair.windows for pair in each], axis=0)
        means.append(Paired(float(np.mean([pair.value for pair in each])), windows, each[0].protocol))
    return means, len(used)


def settings_of(index: Index) -> tuple[Setting, ...]:
    """The settings that the study has runs for."""
    names = {cell.name for cell in index.results.cells}
    return tuple(setting for setting in SETTINGS if SCRATCH[setting] in names)


def compare_twins(index: Index, groups: Sequence[Group]) -> tuple[Verdict, ...]:
    """Judge ``groups`` in every setting of the study, setting by setting; one without a seed, over all its seeds."""
    return tuple(
        _judge(index, setting, group)
        for setting in settings_of(index)
        for group in groups
        if is_planned(index, group, setting)
    )


def is_planned(index: Index, group: Group, setting: Setting) -> bool:
    """Whether the study has a twin, finished or not, for a comparison in this setting; it may leave some out.

    A pruned model of which there is no run at all is not left out: nothing is known of it yet.
    """
    return any(index.over_seeds(group, SCRATCH[setting])) or not index.of(group)


def _judge(index: Index, setting: Setting, group: Group) -> Verdict:
    """Compare over seeds, or give the reason why that is not possible."""
    name = SCRATCH[setting]
    seeds = index.pools[group] if group.seed is None else (group,)
    pairs = [(index.cell(seeded, PRUNED), index.cell(seeded, name)) for seeded in seeds]
    ratio = next((r for pruned, scratch in pairs if (r := _flop_ratio(index, pruned, scratch)) is not None), None)
    differences = [pair_cells(*pair, PRUNED, name) for pair in pairs]
    measured = [pair for pair in differences if isinstance(pair, Paired)]
    mean = mean_difference(measured)
    if mean is None:
        reason = next(
            (text for text in differences if isinstance(text, str)), "its seeds were evaluated under several protocols"
        )
        return Verdict(setting, group, "not measured", flop_ratio=ratio, reason=reason, planned=len(seeds))
    winner: Winner = "pruned" if mean.sign > 0 else "scratch" if mean.sign < 0 else "too close to call"
    used = [cells for cells, pair in zip(pairs, differences, strict=True) if isinstance(pair, Paired)]
    pruned_loss, scratch_loss = (
        float(np.mean([c.evaluation.loss for c in side if c and c.evaluation])) for side in zip(*used, strict=True)
    )
    interval = (mean.value, mean.low, mean.high)
    return Verdict(
        setting, group, winner, pruned_loss, scratch_loss, *interval, ratio, seeds=mean.seeds, planned=len(seeds)
    )


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
    if not all(map(math.isfinite, (cell.evaluation.loss, *cell.evaluation.windows))):
        return f"the held-out loss of the {_run_name(name)} is not finite"
    return ""


def _run_name(name: str) -> str:
    if name == PRUNED:
        return f"pruned run {name}"
    return f"scratch run {name}" if name in SCRATCH.values() else f"run {name}"


def _mismatch(pruned: Evaluation, scratch: Evaluation, *names: str) -> str:
    both = " and ".join(f"the {_run_name(name)}" for name in names)
    if pruned.protocol != scratch.protocol:
        return f"{both} were evaluated under different protocols"
    if len(pruned.windows) != len(scratch.windows):
        return f"{both} have {len(pruned.windows)} and {len(scratch.windows)} held-out windows"
    if len(pruned.windows) < 2:
        return "fewer than two held-out windows give no interval"
    return ""
