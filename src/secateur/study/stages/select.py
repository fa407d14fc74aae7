"""The stage that chooses a learning rate among trials, and is the run if a trial is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur.errors import UserError
from secateur.evaluation.loss import Protocol, window_losses
from secateur.model.checkpoint import Checkpoint
from secateur.progress import notify, track
from secateur.runtime import pick_device, pick_dtype
from secateur.study.stage import Stage
from secateur.study.stages.inputs import corpus_tokens, holdout_protocol, model_of
from secateur.study.store import Store

__all__ = ["edge_of", "select_stage"]

_ADVICE = {
    "low": "the lowest of the sweep, so that a lower one may be better; add one to sweep.rates",
    "high": "the highest of the sweep, so that a higher one may be better; add one to sweep.rates",
}


def select_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Choose the rate whose trial has the lowest loss on held-out windows that no final figure uses.

    If the best trial is the run itself, its model is linked into the stage's folder: it takes no disk space, and it
    stays if the trial's folder is deleted.

    Returns:
        ``peak_rate``; ``losses``, rate -> nats per predicted token, None of a trial that diverged; ``at_edge``, see
        :func:`edge_of`; and, if the best trial is the run, all that its training returned.

    Raises:
        UserError: if every trial diverged.
    """
    rates = [role for role in stage.inputs if role != "corpus"]
    losses = _losses(stage, store, rates)
    measured = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not measured:
        raise UserError(f"{stage.name}: training diverged at every rate; add lower ones to `sweep`.rates")
    best = min(measured, key=lambda rate: (measured[rate], float(rate)))
    edge = edge_of(float(best), map(float, rates))
    if edge:
        notify(f"{stage.name}: the best rate, {float(best):g}, is {_ADVICE[edge]}")
    choice = {"peak_rate": float(best), "losses": losses, "at_edge": edge}
    if stage.identity["keep"] != "model":
        return choice
    shutil.rmtree(work / "model", ignore_errors=True)  # of an interrupted attempt
    shutil.copytree(model_of(stage, store, best), work / "model", copy_function=os.link)
    return {**(store.record(stage.inputs[best]) or {}), **choice}


def edge_of(rate: float, rates: Iterable[float]) -> str | None:
    """``low`` or ``high`` if no lower or no higher rate was tried, so that the best one may lie beyond; else None."""
    ordered = sorted(rates)
    return "low" if rate == ordered[0] else "high" if rate == ordered[-1] else None


def _losses(stage: Stage, store: Store, rates: list[str]) -> dict[str, float | None]:
    """The held-out loss of each trial; None of those that diverged."""
    evaluation = stage.identity["evaluation"]
    protocol = holdout_protocol(
        corpus_tokens(stage, store), evaluation["windows"], evaluation["seqlen"], evaluation["skip"]
    )
    losses: dict[str, float | None] = {}
    with track(f"choose the rate of {stage.name}", len(rates)) as progress:
        for rate in rates:
            diverged = "diverged" in (store.record(stage.inputs[rate]) or {})
            losses[rate] = None if diverged else _loss(stage, model_of(stage, store, rate), protocol)
            progress.advance(1)
    return losses


def _loss(stage: Stage, directory: Path, protocol: Protocol) -> float:
    device = pick_device(stage.runtime["device"])
    model: Any = Checkpoint(directory).load_language_model(pick_dtype(stage.identity["dtype"], device)).to(device)  # type: ignore[arg-type]
    return window_losses(model, protocol).mean()
