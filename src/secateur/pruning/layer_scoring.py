"""Score layers and choose those to remove: by their own scores, or by the loss or accuracy without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.layer_removal import removal_losses
from secateur.calibration.place import walk_places
from secateur.errors import UserError
from secateur.evaluation.layer_removal import removal_accuracies
from secateur.evaluation.lm_eval.tasks import Task
from secateur.formatting import plural
from secateur.methods.base import LayerMethod, RemovalMethod
from secateur.model.shapes import Shape
from secateur.progress import notify
from secateur.pruning.layer_choice import LayerPattern, choose_run, choose_single_layers

__all__ = ["check_scores", "decide_layers", "decide_removals"]

Decision = dict[str, Any]  #: fields of a plan


def decide_removals(
    method: RemovalMethod,
    walk: BlockWalk,
    after: Shape,
    task: Task | None,
    batch: int | None,
    pattern: LayerPattern | None,
) -> Decision:
    """Measure the model without each candidate; remove the run, or the layers, with the lowest scores."""
    layers = walk.checkpoint.shape.layers
    count = layers - after.layers
    length = count if method.contiguous else 1
    if method.greedy:
        return _remove_greedily(method, walk, count, pattern)
    if task:
        full, without = removal_accuracies(walk.checkpoint, length, task, device=walk.device, batch=batch)
    else:
        full, without = removal_losses(walk, length)  # reads finished candidates from the journal
    scores = method.score(full, torch.tensor(without, dtype=torch.float64))
    check_scores(walk, {"layers": scores})
    free = _removable(walk, method, len(scores), length, 1 if method.contiguous else count)
    measured = "accuracy" if task else "loss"
    if method.contiguous:
        choice = choose_run(scores, free, length, pattern, measured, without)
    else:
        spared = torch.ones(layers, dtype=torch.bool)
        spared[free] = False
        choice = choose_single_layers(scores.masked_fill(spared, torch.inf), count, pattern)
    keep = _complement(layers, set(choice.layers))
    candidates = [{"first": i, "last": i + length - 1, measured: value} for i, value in enumerate(without)]
    summary = {"detail": _removed_layers(layers, keep), f"{measured}_full": full, "candidates": candidates}
    summary |= choice.record
    if task:
        summary["task"] = task.record()
    return {"keep_layers": keep, "scores": {"layers": scores}, "summary": summary}


def _remove_greedily(method: RemovalMethod, walk: BlockWalk, count: int, pattern: LayerPattern | None) -> Decision:
    """Remove one layer after the other, each time the one of the lowest score without those removed before."""
    layers = walk.checkpoint.shape.layers
    if pattern is not None:
        reason = "the layers are removed one by one, which keeps no period of the layer kinds"
        if pattern.required:
            raise UserError(f"`keep_pattern`: {reason}; leave it out, or name another method")
        notify(f"`keep_pattern`: {reason}")
    _removable(walk, method, layers, 1, count)
    removed: list[int] = []
    rounds: list[dict[str, Any]] = []
    scores = torch.full((layers,), torch.inf, dtype=torch.float64)
    for _ in range(count):
        full, without = removal_losses(walk, 1, removed)
        free = [layer for layer in _removable(walk, method, layers, 1, 1) if layer not in removed]
        round_scores = method.score(full, torch.tensor([without[layer] for layer in free], dtype=torch.float64))
        check_scores(walk, {"layers": round_scores})
        scores[free] = round_scores
        removed.append(free[int(round_scores.argmin())])
        losses = [{"first": layer, "last": layer, "loss": without[layer]} for layer in free]
        rounds.append({"removed": removed[-1], "loss": without[removed[-1]], "loss_full": full, "candidates": losses})
    keep = _complement(layers, removed)
    order = f", in the order {', '.join(map(str, removed))}" if count > 1 else ""
    summary = {"detail": _removed_layers(layers, keep) + order, "rounds": rounds}
    summary |= {"loss_full": rounds[0]["loss_full"], "candidates": rounds[0]["candidates"]}
    return {"keep_layers": keep, "scores": {"layers": scores}, "summary": summary}


def _removable(walk: BlockWalk, method: RemovalMethod, candidates: int, length: int, choices: int) -> list[int]:
    """The candidates, runs of ``length`` layers by their first, that hold no layer which has to stay.

    Raises:
        UserError: if they are fewer than ``choices``.
    """
    spared = walk.checkpoint.pinned_layers | method.spared(walk.checkpoint.shape.layers)
    free = [first for first in range(candidates) if spared.isdisjoint(range(first, first + length))]
    if choices > len(free):
        raise UserError(
            f"{plural(choices * length, 'layer')} to remove, but too few may go: {plural(len(spared), 'layer')} stay, "
            "by the method or because the model cannot do without them (docs/families.md, pinned); remove less"
        )
    return free


def decide_layers(method: LayerMethod, walk: BlockWalk, after: Shape, pattern: LayerPattern | None) -> Decision:
    """Score the layers one by one; remove those with the lowest scores."""
    layers = walk.checkpoint.shape.layers
    for block, places in walk_places(walk, method.needs, ("layer",)):
        assert block is not None
        walk.journal.put(block.index, {f"score.{block.index}": method.score(places["layer"][0]).cpu()})
        del places
    scores = torch.stack([walk.journal[f"score.{layer}"] for layer in range(layers)])
    check_scores(walk, {"layers": scores[scores != torch.inf]})  # infinity spares a layer
    scores[sorted(walk.checkpoint.pinned_layers)] = torch.inf
    removable, count = torch.isfinite(scores), layers - after.layers
    if count > int(removable.sum()):
        raise UserError(
            f"{plural(count, 'layer')} to remove, but all but {int(removable.sum())} are spared, by the method "
            "or because the model cannot do without them (docs/families.md, pinned); spare fewer or remove less"
        )
    choice = choose_single_layers(scores, count, pattern)
    keep = _complement(layers, set(choice.layers))
    candidates = [{"first": i, "last": i, "score": s if removable[i] else None} for i, s in enumerate(scores.tolist())]
    summary = {"detail": _removed_layers(layers, keep), "candidates": candidates, **choice.record}
    return {"keep_layers": keep, "scores": {"layers": scores}, "summary": summary}


def check_scores(walk: BlockWalk, scores: Mapping[str, Tensor]) -> None:
    """Refuse scores of a space that are not finite."""
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise UserError(f"{walk.checkpoint.directory}: the scores of {name} are NaN or infinite")


def _complement(layers: int, removed: Collection[int]) -> Tensor:
    return torch.tensor([layer for layer in range(layers) if layer not in removed])


def _removed_layers(layers: int, keep: Tensor) -> str:
    """Describe the removed layers in words."""
    removed = sorted(set(range(layers)) - set(keep.tolist()))
    if len(removed) == 1:
        return f"layer {removed[0]} of 0-{layers - 1} removed"
    contiguous = removed == list(range(removed[0], removed[-1] + 1))
    numbers = f"{removed[0]}-{removed[-1]}" if contiguous else ", ".join(map(str, removed))
    return f"layers {numbers} of 0-{layers - 1} removed"
