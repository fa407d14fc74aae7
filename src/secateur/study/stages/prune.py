"""The stage that prunes: score or learn, plan, cut."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.calibration.journal import Workspace
from secateur.data.domains import ByDomain
from secateur.methods.base import LearnedMethod
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.learned import learn, learning_recipe, track_domain_losses
from secateur.pruning.pipeline import Calibration, make_plan, scores_identity, write_pruned
from secateur.pruning.target import Pattern, Target
from secateur.runtime import pick_batch, pick_device
from secateur.study.stage import Stage
from secateur.study.stages.inputs import corpus_tokens, model_of
from secateur.study.store import Store
from secateur.training.heldout import domain_protocols
from secateur.training.loop import RunOptions
from secateur.training.mixture import Mixture
from secateur.training.parallel import Execution
from secateur.training.watchdog import stop_on_signals

__all__ = ["prune_stage"]

_HELD_OUT = 32  #: windows of each domain that losses along the way are measured on
_RECORDED = ("ratio", "before", "after", "calibration", "summary", "fingerprint")


def prune_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Prune the parent to the stage's target; all processes together.

    Returns:
        Of plan.json what identifies the plan, and ``layers``: what is left of each layer of the parent.
    """
    asked, target = stage.identity, _target(stage.identity["target"])
    method = get_method(asked["method"], asked["options"])
    checkpoint = Checkpoint(model_of(stage, store))
    if isinstance(method, LearnedMethod):
        plan, dense = _learned(stage, store, work, checkpoint, method, target)
    else:
        windows = _calibration_windows(stage, store)
        pruning = (checkpoint, asked["method"], target, Calibration(windows, "the parent's training slice"))
        how: dict[str, Any] = {"options": asked["options"], "device": pick_device(stage.runtime["device"])}
        scores = scores_identity(*pruning, **how) if distributed.world_size() == 1 else None
        with store.scores(stage, scores) if scores else nullcontext(work / "checkpoints") as journals:
            plan, dense = make_plan(*pruning, **how, workspace=Workspace(journals)), checkpoint
    if not distributed.is_main():
        return {}
    (work / "model").mkdir(exist_ok=True)
    content = write_pruned(dense, plan, work / "model")
    return {**{key: content[key] for key in _RECORDED}, "layers": plan.by_layer()}


def _target(asked: dict[str, Any]) -> Target:
    pattern = Pattern.parse(asked["pattern"]) if asked["pattern"] else None
    return Target(asked["ratio"], asked["of"], asked["sizes"], pattern, tuple(asked["axes"]), asked["allocation"])


def _calibration_windows(stage: Stage, store: Store) -> Tensor:
    """Windows of the parent's slice, chosen by seed, in the order of the corpus."""
    asked = stage.identity
    start, stop = asked["slice"]
    length = asked["seqlen"]
    tokens = corpus_tokens(stage, store)
    generator = torch.Generator().manual_seed(asked["calibration"]["seed"])
    order = torch.randperm((stop - start) // length, generator=generator)
    chosen = order[: asked["calibration"]["windows"]].sort().values.tolist()
    at = [start + window * length for window in chosen]
    return torch.stack([torch.from_numpy(tokens.read("train", i, i + length)) for i in at])


def _learned(
    stage: Stage, store: Store, work: Path, checkpoint: Checkpoint, method: LearnedMethod, target: Target
) -> tuple[Any, Checkpoint]:
    """Train under gates on the parent's slice, read again where it is short."""
    asked = stage.identity
    sequence, (start, stop) = asked["seqlen"], asked["slice"]
    device = pick_device(stage.runtime["device"])
    recipe = learning_recipe(method, sequence, pick_batch(sequence, device))
    tokens = corpus_tokens(stage, store)
    view = ByDomain(tokens, "train", start, stop, sequence)
    mixture = Mixture(view, view.ranges, recipe, method.steps)
    trained = work / "trained"
    if distributed.is_main():
        shutil.rmtree(trained, ignore_errors=True)
        trained.mkdir()
    distributed.barrier()
    count = sum((b - a) // sequence for a, b in view.ranges.values())
    record = {"source": "the parent's training slice", "windows": count, "seqlen": sequence, "hash": tokens.fingerprint}
    with stop_on_signals() as stop_told:
        return learn(
            checkpoint,
            asked["method"],
            target,
            mixture,
            method=method,
            record=record,
            execution=Execution(device, asked["dtype"]),
            house=RunOptions(
                folder=work / "checkpoints",
                label=stage.name,
                save_every=max(1, method.steps // 10),
                behind=device.startswith("cuda"),
                stop=stop_told,
            ),
            measure=track_domain_losses(mixture, domain_protocols(tokens, sequence, _HELD_OUT), recipe.micro_batch),
            out=trained,
        )
