"""Score and select: one function for each kind of method, from statistics to the fields of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.place import Place, walk_places
from secateur.calibration.statistics import Mean
from secateur.errors import UserError
from secateur.evaluation.lm_eval.tasks import Task
from secateur.methods.base import ExpertMethod, LayerMethod, RemovalMethod, WeightMethod, WidthMethod
from secateur.methods.selection import keep_channels, keep_globally
from secateur.model.shapes import Shape
from secateur.progress import notify
from secateur.pruning.expert_channels import ExpertChannels
from secateur.pruning.expert_scoring import decide_experts
from secateur.pruning.layer_choice import LayerPattern
from secateur.pruning.layer_scoring import check_scores, decide_layers, decide_removals
from secateur.pruning.projector import keep_projector
from secateur.pruning.target import Target
from secateur.pruning.weight_scoring import decide_weights

__all__ = ["score_and_select"]

Decision = dict[str, Any]  #: fields of a plan


def score_and_select(
    method: LayerMethod | RemovalMethod | WidthMethod | WeightMethod | ExpertMethod,
    walk: BlockWalk,
    target: Target,
    after: Shape,
    task: Task | None,
    batch: int | None,
    pattern: LayerPattern | None = None,
    zeros: Mapping[str, int] | None = None,
) -> Decision:
    """Score the units of a model and select those to keep.

    Args:
        task: measures removals by accuracy; None for the loss.
        batch: examples of the task at once.
        pattern: of the layer kinds, which depth methods keep; None for no constraint.
        zeros: weights to prune in each linear, for sparse methods; None for the same share of each.
    """
    if isinstance(method, RemovalMethod):
        return decide_removals(method, walk, after, task, batch, pattern)
    if isinstance(method, LayerMethod):
        return decide_layers(method, walk, after, pattern)
    if isinstance(method, ExpertMethod):
        return decide_experts(method, walk, after, propagate=target.propagate)
    if isinstance(method, WidthMethod):
        return _decide_width(method, walk, target, after)
    return decide_weights(method, walk, target, zeros)


def _decide_width(method: WidthMethod, walk: BlockWalk, target: Target, after: Shape) -> Decision:
    """Score the units of each space; keep as many in every layer, or let layers compete."""
    spaces = target.spaces(method)
    layered = [space for space in spaces if space != "hidden"]
    uniform = target.allocation == "uniform"
    cutting = method.sequential and uniform and "hidden" not in spaces
    shape = walk.checkpoint.shape

    def zero_removed_units(block: Block) -> None:
        for space in (space for space in layered if shape.has_space(space, block.index)):
            score = walk.journal[f"score.{space}.{block.index}"]
            removed = torch.ones(len(score), dtype=torch.bool)
            removed[keep_channels(score, after.units(space))] = False
            reader = f"{walk.family.reader(space)}.weight"
            weight = block.weight(reader)
            columns = removed.repeat_interleave(weight.shape[1] // len(score))
            block.set_weight(reader, weight * ~columns.to(walk.device))

    experts = ExpertChannels(method, walk) if "expert_ffn" in spaces else None
    visits, replay = experts.visits if experts else None, zero_removed_units if cutting else None
    for block, places in walk_places(walk, method.needs, spaces, visits=visits, replay=replay):
        step = len(walk.layers) if block is None else block.index
        entries = experts.entries(step) if experts else {}
        walk.journal.put(step, entries | _score_units(method, places, layered if block is not None else (), step))
        del places
        if cutting:
            assert block is not None
            zero_removed_units(block)
    scores: dict[str, Tensor] = dict(walk.journal.with_prefix("score."))
    if hidden := [
        score for _, score in sorted(walk.journal.with_prefix("hidden.").items(), key=lambda item: int(item[0]))
    ]:
        scores["hidden"] = torch.stack(hidden).sum(dim=0)
    means = walk.journal.with_prefix("mean.")
    check_scores(walk, scores)
    scores = dict(sorted(scores.items(), key=_by_layer))  # gradients come from the last block to the first
    keep = _keep_units(walk.checkpoint.shape, scores, target, after)
    if not uniform:
        after = _padded(walk.checkpoint.shape, keep, target.step or 1).openable(where="`axes`")
        after = after.switched_on(method.config_switches(after, spaces))
    decision = _width_decision(method, walk, scores, keep, means, after)
    if experts and method.needs:
        decision["summary"]["routing"] = experts.report()
    return decision


def _score_units(
    method: WidthMethod, places: Mapping[str, Sequence[Place]], layered: Sequence[str], step: int
) -> dict[str, Tensor]:
    """Score the units of one block: journal entries ``hidden.STEP``, ``score.SPACE.STEP`` and ``mean.SPACE.STEP``."""
    entries: dict[str, Tensor] = {}
    for place in places.get("hidden", ()):
        score = method.score(place).cpu()
        name = f"hidden.{step}"
        entries[name] = entries[name] + score if name in entries else score
    for space in (space for space in layered if space in places):
        place = places[space][0]
        entries[f"score.{space}.{step}"] = method.score(place).cpu()
        if Mean in place.stats:
            entries[f"mean.{space}.{step}"] = place.stats[Mean].cpu()
    return entries


def _by_layer(item: tuple[str, Tensor]) -> tuple[int, str]:
    space, _, layer = item[0].partition(".")
    return int(layer or -1), space


def _keep_units(shape: Shape, scores: Mapping[str, Tensor], target: Target, after: Shape) -> dict[str, Tensor]:
    """Group of scores -> sorted indices of the units to keep."""
    if target.allocation == "uniform":
        return {n: keep_channels(s, after.units(n.partition(".")[0])).cpu() for n, s in scores.items()}
    assert target.ratio is not None
    costs = {name: shape.unit_parameters(name.split(".")[0], int(name.split(".")[1])) for name in scores}
    counted = shape.total if target.of == "total" else shape.non_embedding
    return keep_globally(scores, costs, target.ratio * counted)


def _padded(shape: Shape, keep: Mapping[str, Tensor], step: int) -> Shape:
    """The narrowest shape that the config accepts and that holds the units of every layer.

    Args:
        step: FFN sizes are multiples of it, or the model's own size.
    """
    for space in ("ffn", "kv"):
        most = max((len(indices) for name, indices in keep.items() if name.startswith(f"{space}.")), default=None)
        if most is not None:
            full = shape.units(space)
            sizes = [n for n in range(most, full + 1) if space != "ffn" or n % step == 0 or n == full]
            wide_enough = (shape.narrowed(space, units) for units in sizes)
            shape = next(candidate for candidate in wide_enough if not candidate.refused_by_config)
    return shape


def _width_decision(
    method: WidthMethod,
    walk: BlockWalk,
    scores: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    after: Shape,
) -> Decision:
    before = walk.checkpoint.shape
    biases, uncompensated = _compensate(method, walk, keep, means, after)
    summary: dict[str, Any] = {
        "detail": ", ".join(
            _narrowed(space, before, after, keep)
            for space in ("hidden", "ffn", "kv", "expert_ffn")
            if any(name.partition(".")[0] == space for name in keep)
        ),
        "importance": {name: _curve(score) for name, score in scores.items()},
        "importance_kept": {name: _share(score, keep[name]) for name, score in scores.items()},
    }
    if method.bias != "none":
        summary["bias"] = {"compensated": sorted({name.split(".", 3)[-1] for name in biases}), "not": uncompensated}
    ragged = any(n.startswith(("ffn.", "kv.")) and len(k) < after.units(n.partition(".")[0]) for n, k in keep.items())
    if ragged:
        summary["units_kept"] = {name: len(indices) for name, indices in keep.items()}
        notify(
            "layers keep different numbers of channels: the checkpoint is padded with zeros to the widest, so it is "
            "smaller and faster by its padded shape alone"
        )
    fields: Decision = {"after": after, "scores": dict(scores), "summary": summary, "biases": biases}
    if "hidden" in keep:
        fields["keep_hidden"] = keep["hidden"]
        fields |= keep_projector(walk.checkpoint, keep["hidden"], after.hidden, walk)
    for space in ("ffn", "kv", "expert_ffn"):
        layers = {int(n.partition(".")[2]): k for n, k in keep.items() if n.startswith(f"{space}.")}
        if layers:
            every_layer = range(before.layers) if space != "expert_ffn" else ()  # experts: all layers that have any
            fields[f"keep_{space}"] = {layer: torch.arange(before.units(space)) for layer in every_layer} | layers
    return fields


def _narrowed(space: str, before: Shape, after: Shape, keep: Mapping[str, Tensor]) -> str:
    words = {"hidden": "hidden", "ffn": "FFN", "kv": "KV heads", "expert_ffn": "FFN of each expert"}
    counts = {indices.shape[-1] for name, indices in keep.items() if name.partition(".")[0] == space}
    reached = f"{min(counts)}-{max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    tail = f" (heads {before.heads} to {after.heads})" if space == "kv" and len(counts) == 1 else ""
    return f"{words[space]} {before.units(space)} to {reached}{' channels' if space != 'kv' else ''}{tail}"


def _curve(scores: Tensor, points: int = 33) -> list[float]:
    """Scores from the highest to the lowest, at most ``points`` of them, both ends included."""
    ranked = scores.flatten().sort(descending=True).values
    if ranked.numel() <= points:
        return ranked.tolist()
    return ranked[torch.linspace(0, ranked.numel() - 1, points).round().long()].tolist()


def _share(scores: Tensor, keep: Tensor) -> float | None:
    """The share of importance that stays; None with negative scores, which have no shares."""
    total = float(scores.sum())
    stays = scores.gather(-1, keep.to(scores.device))
    return float(stays.sum()) / total if total > 0 and float(scores.min()) >= 0 else None


def _compensate(
    method: WidthMethod, walk: BlockWalk, keep: Mapping[str, Tensor], means: Mapping[str, Tensor], after: Shape
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Compensate removed channels by their mean output: bias -> addition, and linear without a bias -> reason."""
    biases: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name, indices in keep.items() if method.bias != "none" else ():
        space, _, layer = name.partition(".")
        reader = walk.family.reader(space)
        if not after.family.can_have_bias(reader):
            refused[reader] = f"{after.family.name} has no option in its config that gives {reader} a bias"
            continue
        weight = walk.checkpoint.tensor(walk.family.block_tensor(int(layer), f"{reader}.weight")).float()
        removed = torch.ones(walk.checkpoint.shape.units(space), dtype=torch.bool)
        removed[indices] = False
        columns = removed.repeat_interleave(weight.shape[1] // removed.numel())
        biases[walk.family.block_tensor(int(layer), f"{reader}.bias")] = weight[:, columns] @ means[name].cpu()[columns]
    if refused and method.bias == "require":
        raise UserError(f"`options`: bias=require: {'; '.join(refused.values())}")
    if refused:
        notify(f"no bias compensation where the family has no bias: {'; '.join(refused.values())}")
    return biases, refused
