"""Attribute a pruned model's advantage to what it inherits, by controls that were trained on as many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.comparison.decision import Decision, adjust
from secateur.comparison.index import Group, Index, mean_loss
from secateur.comparison.records import Cell, Init
from secateur.comparison.twins import Paired, mean_difference, pair_cells

__all__ = ["CONTINUED", "CONTROLS", "ControlGap", "Part", "continued_parents", "controls", "parts"]

CONTINUED: Init = "parent-continued"  #: the parent itself, trained on the tokens of P-R

#: Where the weights of each model are from, in the order in which each inherits more.
CONTROLS: dict[Init, str] = {
    "without-pruning-tokens": "new weights, without the tokens that pruning trained on",
    "scratch": "new weights, no mask",
    "dense-twin": "as many weights, dense and new",
    "dense-active": "dense, with the parameters that a token uses of the mixture",
    "dense-total": "dense, with as many parameters as the mixture",
    "random-mask": "a random mask, new weights",
    "permuted": "the mask permuted, new weights",
    "redrawn": "the mask, new weights",
    "redrawn-linears": "the mask, embeddings and norms, new weights of linears",
    "shuffled-weights": "the weights, shuffled",
    "pruned": "the weights in their places",
    CONTINUED: "the parent, unpruned, trained on the same tokens",
}

#: Pairs of models, without and with a part of the advantage.
_PAIRS: tuple[tuple[Init, Init], ...] = (
    ("random-mask", "redrawn"),
    ("permuted", "redrawn"),
    ("redrawn", "pruned"),
    ("redrawn", "redrawn-linears"),
    ("redrawn-linears", "pruned"),
    ("scratch", "pruned"),
    ("redrawn", "shuffled-weights"),
    ("scratch", "shuffled-weights"),
    ("shuffled-weights", "pruned"),
    ("dense-twin", "redrawn"),
    ("dense-active", "pruned"),
    ("dense-total", "pruned"),
    ("scratch", "redrawn"),
    ("without-pruning-tokens", "scratch"),
    ("without-pruning-tokens", "pruned"),
    ("pruned", CONTINUED),
)


@dataclass(frozen=True)
class ControlGap:
    """The loss of a pruned model, or of one of its controls."""

    init: Init
    label: str
    loss: float | None  #: nats per token, mean over the measured seeds; None: not measured


@dataclass(frozen=True)
class Part:
    """A part of the advantage: what the model ``of`` has and the model ``against`` lacks."""

    against: Init
    of: Init
    mean: Decision | None  #: loss(against) - loss(of); None: not measured


def controls(index: Index, group: Group) -> tuple[ControlGap, ...]:
    """List the models at equal training tokens, in the order of ``CONTROLS``; empty without a control."""
    runs = _runs(index, group)
    if not any(cell.path == "control" for cells in runs.values() for cell in cells.values()):
        return ()
    return tuple(
        ControlGap(init, label, mean_loss(runs[init].values())) for init, label in CONTROLS.items() if init in runs
    )


def parts(index: Index, group: Group, verdict: Decision | None = None) -> tuple[Part, ...]:
    """Split the advantage of a comparison into parts, over all its seeds; empty without a control.

    Args:
        verdict: on P-R against S_R, which that part has; the others are corrected for their number.
    """
    if not controls(index, group):
        return ()
    runs = _runs(index, group)
    pairs = [pair for pair in _PAIRS if pair[0] in runs and pair[1] in runs]
    # The weights count beside a control that has the mask as well, where there is one, and not beside scratch.
    if runs.keys() & {"redrawn", "redrawn-linears"}:
        pairs = [pair for pair in pairs if pair[0] != "scratch" or pair[1] == "redrawn"]
    twin = next((init for init, cells in runs.items() if any(cell.name == "S_R" for cell in cells.values())), None)
    judged = verdict and (twin, "pruned")
    measured = [_part(runs, *pair) for pair in pairs]
    corrected = iter(adjust([part.mean for part in measured if part.mean and (part.against, part.of) != judged]))
    means = [verdict if (part.against, part.of) == judged else part.mean and next(corrected) for part in measured]
    return tuple(replace(part, mean=mean) for part, mean in zip(measured, means, strict=True))


def continued_parents(index: Index) -> dict[Group, list[Cell]]:
    """The parents that were trained on R tokens, all seeds of each, by the first comparison of those that share it."""
    runs: dict[tuple[object, ...], Group] = {}
    for group in index.comparisons:
        cells = _continued(index, group)
        if cells:
            key = (group.parent, group.retrain_tokens, *(cell.stages for cell in cells))
            runs.setdefault(key, group)
    return {group: _continued(index, group) for group in runs.values()}


def _continued(index: Index, group: Group) -> list[Cell]:
    return [cell for cell in index.over_seeds(group, CONTINUED) if cell]


def _runs(index: Index, group: Group) -> dict[Init, dict[int, Cell]]:
    """The runs of a comparison at equal training tokens: init -> seed -> run.

    They were trained on exactly R tokens; the twin S_R also on those that pruning itself trained on.
    """
    runs: dict[Init, dict[int, Cell]] = {}
    pruned = index.pruned.get(group.model)
    for cell in index.of(group):
        extra = pruned.training_tokens if pruned and cell.name == "S_R" else 0
        right_tokens = cell.training.tokens == cell.retrain_tokens + extra
        if right_tokens and (cell.path != "scratch" or cell.name == "S_R"):
            runs.setdefault(cell.init, {})[cell.seed] = cell
    return runs


def _part(runs: dict[Init, dict[int, Cell]], against: Init, of: Init) -> Part:
    seeds = [seed for seed in runs[of] if seed in runs[against]]
    pairs = [pair_cells(runs[of][seed], runs[against][seed], of, against) for seed in seeds]
    return Part(against, of, mean_difference([pair for pair in pairs if isinstance(pair, Paired)]))
