"""The history of each run: facts, the stages behind it with their folders, and its curve as a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.comparison.index import Index, Model, group_of
from secateur.comparison.naming import target_words
from secateur.comparison.records import Cell, Point, StageNote
from secateur.formatting import count, loss, plain
from secateur.methods.registry import method_name

__all__ = ["RunHistory", "runs_of", "spark"]

_WIDTH, _HEIGHT = 240.0, 48.0  # of the line's box, in its own units

_TRAINING = ("train", "select", "reconstruct")  #: kinds of stages that make a run

_INIT = {
    "pruned": "the parent's, under the plan",
    "scratch": "new",
    "redrawn": "new, under the parent's mask",
    "redrawn-linears": "those of linears new, under the parent's mask; embeddings and norms the parent's",
    "permuted": "new, under the parent's mask with its rows and columns permuted",
    "random-mask": "new, under a random mask",
    "shuffled-weights": "the parent's, at other places of each tensor",
    "dense-twin": "new, dense, as many as the sparse model keeps",
    "dense-active": "new, dense, as many as a token uses of the pruned mixture",
    "dense-total": "new, dense, as many as the pruned mixture has",
    "without-pruning-tokens": "new; the run lacks the tokens that pruning trained on",
    "parent-continued": "the parent's, unpruned",
}


@dataclass(frozen=True)
class RunHistory:
    """One trained model with its history.

    Attributes:
        number: of its row in the table of models, from 1.
        facts: name -> text.
        line: points of its curve for an SVG polyline in a box of 240 by 48; empty without a curve.
        caption: the curve in words.
        stages: all behind it, each after its inputs; the last one that trains, or chooses a trial, is the run's own.
    """

    number: int
    cell: Cell
    facts: dict[str, str]
    line: str
    caption: str
    stages: tuple[StageNote, ...]


def runs_of(index: Index, model: Model) -> list[RunHistory]:
    """The runs that belong to a pruned model, in the order of the table."""
    notes = {note.fingerprint: note for note in index.results.stages}
    histories = []
    for number, cell in enumerate(index.results.cells, 1):
        if group_of(cell).model == model:
            stages = tuple(notes[key] for key in cell.stages if key in notes)
            facts = _facts(cell, [stage for stage in stages if stage.kind in _TRAINING][-1:])
            histories.append(RunHistory(number, cell, facts, spark(cell.curve), _caption(cell.curve), stages))
    return histories


def _facts(cell: Cell, training: Sequence[StageNote]) -> dict[str, str]:
    facts: dict[str, Any] = {
        "method": f"{method_name(cell.method)} {target_words(cell.target)}, of {cell.parent}",
        "shape": plain(cell.shape),
        "parameters": f"{cell.parameters:,}, {cell.non_embedding:,} outside the embeddings",
        "parameters of a token": f"{active:,}" if (active := cell.shape.get("active_parameters")) else "",
        "first weights": _INIT[cell.init],
        "objective": cell.objective or "language-model loss",
        "tokens": f"{cell.training.tokens:,}",
        "peak learning rate": "not chosen yet" if cell.peak_rate is None else f"{cell.peak_rate:g}",
        "seed": str(cell.seed),
        "fingerprint": "".join(stage.fingerprint for stage in training),
    }
    return {name: text for name, text in facts.items() if text}


def _caption(curve: Sequence[Point]) -> str:
    if not curve:
        return ""
    return (
        f"held-out loss {loss(curve[0].loss)} at first, {loss(curve[-1].loss)} after {count(curve[-1].tokens)} tokens"
    )


def spark(curve: Sequence[Point]) -> str:
    """Points of an SVG polyline: tokens to the right, losses upwards, over the whole of its box."""
    if len(curve) < 2:
        return ""
    low, high = min(point.loss for point in curve), max(point.loss for point in curve)
    wide, tall = curve[-1].tokens or 1, (high - low) or 1.0
    return " ".join(f"{_WIDTH * point.tokens / wide:.0f},{_HEIGHT * (high - point.loss) / tall:.0f}" for point in curve)
