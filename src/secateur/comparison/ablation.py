"""What a pruned model inherits: its advantage taken apart by controls that were trained on as many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.comparison.index import Group, Index
from secateur.comparison.records import Cell, Init
from secateur.comparison.twins import MeanDifference, Paired, mean_difference, pair_cells
from secateur.formatting import decimals, number
from secateur.report.prose import interval

__all__ = ["CONTROLS", "ControlGap", "Part", "controls", "parts"]

#: Where the weights of each model are from, as a reader is told. In the order in which each inherits more.
CONTROLS: dict[Init, str] = {
    "scratch": "new weights, no mask",
    "dense-twin": "as many weights, dense and new",
    "random-mask": "a random mask, new weights",
    "permuted": "the mask permuted, new weights",
    "redrawn": "the mask, new weights",
    "shuffled-weights": "the weights, shuffled",
    "pruned": "the weights in their places",
}


@dataclass(frozen=True)
class ControlGap:
    """One of the models that a pruned one is taken apart by."""

    init: Init
    label: str
    loss: float | None  #: nats per token, a mean over the seeds that were measured; None: not measured


@dataclass(frozen=True)
class Part:
    """One part of the advantage: what the better of two models has and the other lacks."""

    what: str
    against: Init
    of: Init
    mean: MeanDifference | None  #: loss(against) - loss(of); None: not measured
    sentence: str


#: What is told, the model without it, the model with it.
_STEPS: tuple[tuple[str, Init, Init], ...] = (
    ("the mask alone, beside a random one,", "random-mask", "redrawn"),
    ("the mask alone, beside a permuted one,", "permuted", "redrawn"),
    ("the weights under that mask", "redrawn", "pruned"),
    ("the weights", "scratch", "pruned"),
    ("the distribution of the weights alone", "redrawn", "shuffled-weights"),
    ("the distribution of the weights alone", "scratch", "shuffled-weights"),
    ("the arrangement of the weights, beyond their distribution,", "shuffled-weights", "pruned"),
    ("the sparse shape, beside a dense one with as many weights,", "dense-twin", "redrawn"),
    ("the zeros, beside the whole architecture from scratch,", "scratch", "redrawn"),
)


def _runs(index: Index, group: Group) -> dict[Init, dict[int, Cell]]:
    """init -> seed -> the run of a comparison that was trained on exactly R tokens."""
    found: dict[Init, dict[int, Cell]] = {}
    for cell in index.of(group):
        if cell.training.tokens == cell.retrain_tokens and (cell.path != "scratch" or cell.name == "S_R"):
            found.setdefault(cell.init, {})[cell.seed] = cell
    return found


def controls(index: Index, group: Group) -> tuple[ControlGap, ...]:
    """The models at equal training tokens, from what inherits nothing to the pruned run; empty without a control."""
    runs = _runs(index, group)
    if not any(cell.path == "control" for cells in runs.values() for cell in cells.values()):
        return ()
    rows = []
    for init, label in CONTROLS.items():
        losses = [cell.evaluation.loss for cell in runs.get(init, {}).values() if cell.evaluation]
        if init in runs:
            rows.append(ControlGap(init, label, sum(losses) / len(losses) if losses else None))
    return tuple(rows)


def parts(index: Index, group: Group) -> tuple[Part, ...]:
    """The advantage of a comparison taken apart, over all its seeds; empty where it has no control."""
    if not controls(index, group):
        return ()
    runs = _runs(index, group)
    masked = "redrawn" in runs
    steps = [step for step in _STEPS if step[1] in runs and step[2] in runs]
    if masked:  # what the weights bring is then told beside the model that has the mask as well
        steps = [step for step in steps if step[1] != "scratch" or step[2] == "redrawn"]
    return tuple(_part(runs, *step) for step in steps)


def _part(runs: dict[Init, dict[int, Cell]], what: str, against: Init, of: Init) -> Part:
    seeds = [seed for seed in runs[of] if seed in runs[against]]
    found = [pair_cells(runs[of][seed], runs[against][seed], of, against) for seed in seeds]
    mean = mean_difference([one for one in found if isinstance(one, Paired)])
    return Part(what, against, of, mean, _sentence(what, mean))


def _sentence(what: str, mean: MeanDifference | None) -> str:
    start = what[0].upper() + what[1:]
    if mean is None:
        return f"{start.rstrip(',')}: not measured."
    digits = decimals(mean.value, mean.low, mean.high)
    if not mean.sign:
        span = interval(mean.low, mean.high, digits)
        verb = "make" if _plural(what) else "makes"
        return f"{start} {verb} no difference that can be told ({number(mean.value, digits)} nats, {span})."
    near, far = sorted((abs(mean.low), abs(mean.high)))
    verb = ("save" if mean.sign > 0 else "cost") + ("" if _plural(what) else "s")
    return f"{start} {verb} {number(abs(mean.value), digits)} nats ({interval(near, far, digits)})."


def _plural(what: str) -> bool:
    return what.startswith(("the weights", "the zeros"))
