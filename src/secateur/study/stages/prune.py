"""The stage that prunes: score or learn, plan, cut."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.calibration.journal import Workspace
from secateur.evaluation.token_windows import calibration_windows, document_windows
from secateur.methods.base import LearnedMethod
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.block_reconstruction import reconstruct_plan
from secateur.pruning.calibration import Calibration
from secateur.pruning.learned_job import LearningData, learn_and_cut, learning_options
from secateur.pruning.pipeline import make_plan, scores_identity, write_pruned
from secateur.pruning.target import Target
from secateur.runtime import pick_batch, pick_device
from secateur.study.stage import Stage
from secateur.study.stages.inputs import check_parents, corpus_tokens, model_of
from secateur.study.stages.reconstruct import tuning_arguments
from secateur.study.store import Store
from secateur.training.parallel import Execution
from secateur.training.watchdog import stop_on_signals

__all__ = ["prune_stage"]

_SOURCE = "the parent's training slice"
_LEARNING_SOURCE = "the slice before that of retraining"
_RECORDED = ("ratio", "before", "after", "calibration", "summary", "fingerprint")


def prune_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Prune the parent to the stage's target; all processes together.

    Returns:
        The fields of plan.json that identify the plan, and ``layers``: the units that each layer of the parent keeps.
    """
    identity, target = stage.identity, Target.from_dict(stage.identity["target"])
    check_parents(stage, store, identity["seqlen"])
    method = get_method(identity["method"], identity["options"])
    # The masks of a retrained model are in the plan that it began with.
    checkpoint = Checkpoint(
        model_of(stage, store), model_of(stage, store, "masks") if "masks" in stage.inputs else None
    )
    if distributed.is_main():
        (work / "model").mkdir(exist_ok=True)
    if isinstance(method, LearnedMethod):
        plan, content = _learn(stage, store, work, checkpoint, method, target)
    else:
        calibration = _calibration(stage, store, checkpoint)
        arguments = (checkpoint, identity["method"], target, calibration)
        device: dict[str, Any] = {"options": identity["options"], "device": pick_device(stage.runtime["device"])}
        scores = scores_identity(*arguments, **device) if distributed.world_size() == 1 else None
        with store.scores(stage, scores) if scores else nullcontext(work / "checkpoints") as journals:
            plan = make_plan(*arguments, **device, workspace=Workspace(journals))
            if "reconstruct" in identity:
                settings = identity["reconstruct"]
                windows, how, more = tuning_arguments(stage, store, work, settings, settings["seqlen"], "float32")
                plan = reconstruct_plan(checkpoint, plan, windows, how, **more, held_out=0)
            content = write_pruned(checkpoint, plan, work / "model") if distributed.is_main() else {}
    if not distributed.is_main():
        return {}
    return {**{key: content[key] for key in _RECORDED}, "layers": plan.by_layer()}


def _calibration(stage: Stage, store: Store, checkpoint: Checkpoint) -> Calibration:
    """Windows of the stage's own source of text, or of the parent's slice."""
    settings, source = stage.identity["calibration"], stage.runtime["calibration"]
    if "source" not in settings:
        return Calibration(_calibration_windows(stage, store, checkpoint.shape.vocabulary), _SOURCE)
    name = source if source.startswith("hf:") else source.partition(":")[0]  # paths are no part of a record
    options = {key: settings.get(key) for key in ("field", "format", "on_bad_row", "windows")}
    options["seqlen"] = stage.identity["seqlen"]
    if settings.get("protocol") == "documents":
        return Calibration(document_windows(checkpoint, source, seed=settings["seed"], **options), name)
    return Calibration(calibration_windows(checkpoint, source, **options), name)


def _calibration_windows(stage: Stage, store: Store, rows: int) -> Tensor:
    """Windows of the parent's slice, chosen by seed, in the order of the corpus."""
    start, stop = stage.identity["slice"]
    length, calibration = stage.identity["seqlen"], stage.identity["calibration"]
    tokens = corpus_tokens(stage, store, rows)
    generator = torch.Generator().manual_seed(calibration["seed"])
    order = torch.randperm((stop - start) // length, generator=generator)
    offsets = [start + window * length for window in order[: calibration["windows"]].sort().values.tolist()]
    return torch.stack([torch.from_numpy(tokens.read("train", i, i + length)) for i in offsets])


def _learn(
    stage: Stage, store: Store, work: Path, checkpoint: Checkpoint, method: LearnedMethod, target: Target
) -> tuple[Any, dict[str, Any]]:
    """Train under gates on the stage's slice, which has as many tokens as the method trains on.

    Of several domains, one that is read more than its share is read again, and others are not read to their ends.
    """
    sequence, (start, stop) = stage.identity["seqlen"], stage.identity["slice"]
    device = pick_device(stage.runtime["device"])
    tokens = corpus_tokens(stage, store, checkpoint.shape.vocabulary)
    data = LearningData.of_store(tokens, start, stop, sequence, _LEARNING_SOURCE)
    with stop_on_signals() as signal:
        return learn_and_cut(
            checkpoint,
            stage.identity["method"],
            method,
            target,
            data,
            Execution(device, stage.identity["dtype"]),
            learning_options(method, work / "checkpoints", stage.name, device, signal),
            micro_batch=pick_batch(sequence, device),
            out=work / "model",
        )
