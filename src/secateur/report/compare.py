"""Pruned against scratch: paired differences of held-out loss and what they decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.report.results import Cell, Evaluation, Results
from secateur.statistics import bootstrap_interval

__all__ = ["SCRATCH", "SETTINGS", "Group", "Setting", "Verdict", "Winner", "bootstrap_interval", "compare", "groups"]

Setting = Literal["training", "total"]
Winner = Literal["pruned", "scratch", "too close to call", "not measured"]

SETTINGS: tuple[Setting, ...] = ("training", "total")
SCRATCH: dict[Setting, str] = {"training": "S_R", "total": "S_{P+R}"}  #: what P-R is held against in each setting
PRUNED = "P-R"


@dataclass(frozen=True)
class Group:
    """What a pruned run and its twins have in common. Seeds are never averaged: each is a comparison of its own."""

    method: str
    ratio: float
    seed: int


@dataclass(frozen=True)
class Verdict:
    """One comparison of a pruned and retrained model with its from-scratch twin.

    ``difference`` is loss(scratch) - loss(pruned) in nats per token, so positive means that pruning is better;
    ``low`` and ``high`` bound its 95% interval. All figures are None where the comparison was not measured.
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


def groups(results: Results) -> tuple[Group, ...]:
    """Every (method, ratio, seed) of the study, in its order; a pruned model without a run yet is among them."""
    found = dict.fromkeys(Group(cell.method, cell.ratio, cell.seed) for cell in results.cells)
    seed = min((group.seed for group in found), default=0)
    trained = {(group.method, group.ratio) for group in found}
    for pruned in results.pruned:
        if (pruned.method, pruned.ratio) not in trained:
            found[Group(pruned.method, pruned.ratio, seed)] = None
    return tuple(found)


def compare(results: Results) -> tuple[Verdict, ...]:
    """Judge every group in both settings: first all at equal training tokens, then all at equal total tokens."""
    cells = {(Group(cell.method, cell.ratio, cell.seed), cell.name): cell for cell in results.cells}
    return tuple(
        _judge(setting, group, cells.get((group, PRUNED)), cells.get((group, SCRATCH[setting])))
        for setting in SETTINGS
        for group in groups(results)
    )


def _judge(setting: Setting, group: Group, pruned: Cell | None, scratch: Cell | None) -> Verdict:
    """One comparison, or the reason why there is none."""
    ratio = pruned.total_flops / scratch.total_flops if pruned and scratch and scratch.total_flops else None
    ours = pruned.evaluation if pruned else None
    theirs = scratch.evaluation if scratch else None
    reason = _absence(PRUNED, pruned) or _absence(SCRATCH[setting], scratch)
    if not reason and ours and theirs:
        reason = _mismatch(ours, theirs, SCRATCH[setting])
    if reason or ours is None or theirs is None:
        return Verdict(setting, group, "not measured", flop_ratio=ratio, reason=reason)
    low, high = bootstrap_interval(np.asarray(theirs.windows) - np.asarray(ours.windows))
    winner: Winner = "pruned" if low > 0 else "scratch" if high < 0 else "too close to call"
    difference = theirs.loss - ours.loss
    return Verdict(setting, group, winner, ours.loss, theirs.loss, difference, low, high, ratio)


def _absence(name: str, cell: Cell | None) -> str:
    if cell is None:
        return f"the study has no {_called(name)}"
    if cell.evaluation is None:
        return f"the {_called(name)} has no held-out loss"
    if not all(map(math.isfinite, (cell.evaluation.loss, *cell.evaluation.windows))):
        return f"the held-out loss of the {_called(name)} is not finite"
    return ""


def _called(name: str) -> str:
    return f"pruned run {name}" if name == PRUNED else f"scratch run {name}"


def _mismatch(pruned: Evaluation, scratch: Evaluation, name: str) -> str:
    both = f"the {_called(PRUNED)} and the {_called(name)}"
    if pruned.protocol != scratch.protocol:
        return f"{both} were evaluated under different protocols"
    if len(pruned.windows) != len(scratch.windows):
        return f"{both} have {len(pruned.windows)} and {len(scratch.windows)} held-out windows"
    if len(pruned.windows) < 2:
        return "fewer than two held-out windows give no interval"
    return ""
