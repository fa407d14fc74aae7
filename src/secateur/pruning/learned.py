"""Learn what to cut: train a model under gates until they reach the target shape, then make a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.config import identity
from secateur.errors import RunError
from secateur.evaluation.loss import Protocol
from secateur.methods.base import LearnedMethod
from secateur.methods.selection import keep_channels
from secateur.model.card import model_card
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.companions import copy_companions
from secateur.model.families import SPACE_OF
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.model.surgery import carry_masks
from secateur.pruning.pipeline import check_config
from secateur.pruning.projector import keep_projector
from secateur.pruning.target import Target
from secateur.training.batches import Data
from secateur.training.gates import Gates
from secateur.training.heldout import domain_losses
from secateur.training.init import stored_weights
from secateur.training.loop import RunOptions, train_loop
from secateur.training.mixture import Mixture
from secateur.training.output import write_trained
from secateur.training.parallel import Execution, TrainModule, place_model
from secateur.training.recipe import Recipe

__all__ = ["cut_plan", "gate_values", "learn", "learning_recipe", "track_domain_losses", "write_gated"]

_NEAR = 0.02  #: largest distance of an expected size from its target, as a share of the units
_POINTS = 16  #: points of the curve


def learning_recipe(method: LearnedMethod, sequence: int, micro_batch: int) -> Recipe:
    """The recipe of a run that learns gates."""
    return Recipe(
        sequence=sequence,
        tokens_per_step=method.windows * sequence,
        peak_rate=method.rate or 1.0,  # no effect if weights are frozen
        data_seed=method.seed,
        seed=method.seed,
        micro_batch=micro_batch,
    )


def learn(
    checkpoint: Checkpoint,
    name: str,
    target: Target,
    data: Data,
    *,
    method: LearnedMethod,
    record: Mapping[str, Any],
    execution: Execution,
    options: RunOptions,
    measure: Callable[[TrainModule], float | None] = lambda _: None,
    out: Path,
) -> tuple[Plan, Checkpoint]:
    """Learn what to cut; all processes together.

    Args:
        data: training data, under :func:`learning_recipe`.
        record: identifies the data in the plan.
        measure: computes the held-out loss at each point; None without held-out text.

    Returns:
        The plan; and the trained model before the cut, gates multiplied into its weights, in ``out``.

    Raises:
        UserError: if the model has no shape for the target.
        RunError: if the gates end far from the target, or training ends early.
    """
    after = target.shape(checkpoint.shape, method, name)
    check_config(checkpoint, after)
    model = skeleton(checkpoint.config, checkpoint.directory)
    model.requires_grad_(method.rate > 0)
    gates = Gates(model, method, checkpoint.shape, after, pinned=checkpoint.pinned_layers)
    module = place_model(model, stored_weights(checkpoint), execution, gates)
    options = replace(options, remedy="lower the method's options rate and mask_rate")
    result = train_loop(module, data, masks=checkpoint.masks, measure=measure, points=_POINTS, options=options)
    scores = gates.scores()
    _check_reached(method, scores, checkpoint.shape, after, result["curve"], options)
    plan = cut_plan(
        checkpoint,
        name,
        method,
        scores,
        after,
        request=target.record(method) | {"options": identity(method)},
        calibration={**record, "tokens": result["tokens"], "method_source": method.source},
        training={key: result[key] for key in ("steps", "targets", "curve")},
    )
    plan = carry_masks(plan, checkpoint.masks)
    return plan, write_gated(checkpoint, module, gate_values(method, scores, after), out)


def track_domain_losses(
    mixture: Mixture,
    protocols: Mapping[str, Protocol],
    micro_batch: int,
    report: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> Callable[[TrainModule], float | None]:
    """Make a function that measures held-out losses by domain and updates the mixture's shares.

    Args:
        mixture: the training data; its references become the losses before training.
        report: receives the losses of several domains.

    Returns:
        A function from a model to its loss over all domains, in nats a token; None without held-out text.
    """

    def measure(module: TrainModule) -> float | None:
        losses = domain_losses(module, protocols, micro_batch)
        if len(mixture.ranges) > 1:
            if mixture.references:
                mixture.update(losses)
            mixture.references = mixture.references or losses
            report(losses)
        tokens = sum(protocol.tokens for protocol in protocols.values())
        return sum(losses[name] * protocol.tokens for name, protocol in protocols.items()) / tokens if tokens else None

    return measure


def cut_plan(
    checkpoint: Checkpoint,
    name: str,
    method: LearnedMethod,
    scores: Mapping[str, Tensor],
    after: Shape,
    *,
    request: dict[str, Any],
    calibration: dict[str, Any],
    training: Mapping[str, Any],
) -> Plan:
    """Plan to keep the units whose gates have the highest parameters, exactly as many as ``after`` has.

    Args:
        scores: space -> the gates' parameters, [rows, units] (:meth:`secateur.training.gates.Gates.scores`).
        request: target and options as plain values.
        training: steps, targets and curve of the run, for the summary.
    """
    keep = {space: _top_units(a, after, space) for space, a in scores.items()}
    layers = keep["layers"][0] if "layers" in keep else torch.arange(checkpoint.shape.layers)
    fields: dict[str, Any] = {"keep_layers": layers}
    evidence: dict[str, Tensor] = {}
    for space, a in scores.items():
        if space in ("layers", "hidden"):
            fields[f"keep_{space}"], evidence[space] = keep[space][0], a[0]
        else:
            fields[f"keep_{space}"] = {layer: keep[space][layer] for layer in layers.tolist()}
            evidence |= {f"{space}.{layer}": a[layer] for layer in layers.tolist()}
    if "hidden" in keep:
        fields |= keep_projector(checkpoint, keep["hidden"][0], after.hidden)
    before = checkpoint.shape
    changed = [
        f"{words} {before.units(space)} to {after.units(space)}" for space, words in _WORDS.items() if space in keep
    ]
    undecided = {space: _undecided(method, a, layers) for space, a in scores.items()}
    return Plan.keeping_all(
        name,
        method.granularity,
        request,
        before,
        after=after,
        source=checkpoint.digest,
        calibration=calibration,
        summary={"detail": ", ".join(changed), "undecided": undecided, **training},
        scores=evidence,
        **fields,
    )


_WORDS = {"layers": "layers", "hidden": "hidden channels", "ffn": "FFN channels", "kv": "KV heads"}


def _undecided(method: LearnedMethod, a: Tensor, layers: Tensor) -> float:
    """The share of gates, in the kept layers, that are open with a probability between 0.1 and 0.9."""
    chance = method.open_probability(a[layers] if len(a) > 1 else a)
    return float(((chance > 0.1) & (chance < 0.9)).float().mean())


def _check_reached(
    method: LearnedMethod,
    scores: Mapping[str, Tensor],
    before: Shape,
    after: Shape,
    curve: list[dict[str, Any]],
    options: RunOptions,
) -> None:
    """Refuse gates far from the target shape, where the choice of units to cut would be arbitrary."""
    for space, a in scores.items():
        units, goal = before.units(space), after.units(space)
        sizes = method.open_probability(a).sum(dim=1)
        worst = int((sizes - goal).abs().argmax())
        if abs(float(sizes[worst]) - goal) > max(0.5, _NEAR * units):
            history = ", ".join(f"{point[space]:.4g}" for point in curve[1:])
            where = f" in layer {worst}" if len(sizes) > 1 else ""
            raise RunError(
                f"{options.label}: the gates did not settle: {space} is expected to keep {float(sizes[worst]):.4g} "
                f"of {units}{where}, and the target is {goal} (on average along the run: {history}); "
                "raise the method's option steps, or its options phi and multiplier_rate"
            )


def _top_units(a: Tensor, after: Shape, space: str) -> Tensor:
    """The units with the highest ``a`` of each row, as many as ``after`` has: sorted indices [rows, units]."""
    return torch.stack([keep_channels(row, after.units(space)) for row in a])


def gate_values(method: LearnedMethod, scores: Mapping[str, Tensor], after: Shape) -> dict[str, Tensor]:
    """Space -> the gate of each unit when the model is cut: without noise, and zero for removed units.

    A kept unit may have a gate of zero. It gets the probability that it is open instead, so that it can still learn.
    """
    values = {}
    for space, a in scores.items():
        indices, gates = _top_units(a, after, space), method.eval_gates(a)
        gates = gates.where(gates > 0, method.open_probability(a))
        values[space] = torch.zeros_like(a).scatter(1, indices, gates.gather(1, indices))
    return values


def write_gated(checkpoint: Checkpoint, module: TrainModule, values: Mapping[str, Tensor], out: Path) -> Checkpoint:
    """Write the trained model with its gates multiplied in, in the types of the checkpoint; all processes together.

    Args:
        values: space -> gates, [rows, units].
    """
    write_trained(
        out,
        module,
        checkpoint.raw_config,
        checkpoint.dtype_of,
        provenance={"kind": "trained", "init": "checkpoint", "source": checkpoint.digest},
        card=model_card("A model before it is cut", None, ["Its learned gates are multiplied in."]),
        image_text=checkpoint.image_text,
        change=lambda name, tensor: _multiply_gates(tensor, name, checkpoint.shape, values),
    )
    if distributed.is_main():
        copy_companions(checkpoint.directory, out)
    distributed.barrier()
    return Checkpoint(out)


def _multiply_gates(tensor: Tensor, name: str, shape: Shape, values: Mapping[str, Tensor]) -> Tensor:
    """Multiply into a tensor the gates of its module in training (:mod:`secateur.training.gates`)."""
    family = shape.family
    if name in family.final_norm_tensors and "hidden" in values:
        return _scale(tensor, values["hidden"][0], 0.0 if name.endswith("bias") else family.norm_offset)
    if name == family.head and "hidden" in values and not family.final_norm_tensors:
        return _scale(tensor, values["hidden"][0], 0.0)
    if not name.startswith(f"{family.layers}."):
        return tensor
    number, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
    layer, module = int(number), rest.rpartition(".")[0]
    if rest == family.stream_scale and "layers" in values:
        return _scale(tensor, values["layers"][0, layer], -1.0)
    linears = shape.matrices(layer)
    if rest in linears:
        space = SPACE_OF.get(axis := str(shape.block_tensors(layer)[rest][1]), axis)
        if space in values:
            gates = values[space][0 if space == "hidden" else layer].to(tensor.device)
            tensor = tensor * gates.repeat_interleave(shape.axis_size(axis) // len(gates))
    if module in family.writers and "layers" in values:
        is_norm = tensor.dim() == 1 and f"{module}.weight" not in linears
        tensor = _scale(tensor, values["layers"][0, layer], family.norm_offset if is_norm else 0.0)
    return tensor


def _scale(weight: Tensor, gate: Tensor, offset: float) -> Tensor:
    return (weight + offset) * gate.to(weight.device) - offset
