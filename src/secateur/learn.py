"""learn -> plan: train a model under gates until they have the shape asked for, and say what stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import ranks
from secateur.checkpoint import Checkpoint, copy_tokenizer, in_writing_order, model_card, skeleton, write_checkpoint
from secateur.errors import RunError
from secateur.methods import LearnedMethod, get_method
from secateur.plan import Plan
from secateur.select import keep_channels
from secateur.shapes import Shape
from secateur.spec import identity
from secateur.target import Target
from secateur.tensor_files import Stored
from secateur.train.batches import Data
from secateur.train.gates import Gates
from secateur.train.init import stored_weights
from secateur.train.loop import Housekeeping, train
from secateur.train.optim import Recipe
from secateur.train.parallel import Execution, Trainee, place, whole

__all__ = ["learn", "learning_recipe"]

_NEAR = 0.02  #: how far from its target, as a share of the units, a mean of expected sizes may end
_POINTS = 16  #: of the curve


def learning_recipe(method: LearnedMethod, sequence: int, micro_batch: int | None = None) -> Recipe:
    """How weights train along with the gates: the gates' own rates do not follow its schedule."""
    return Recipe(
        sequence=sequence,
        tokens_per_step=method.windows * sequence,
        peak_rate=method.rate or 1.0,  # of no weight, where none is trained
        data_seed=method.seed,
        seed=method.seed,
        **({"micro_batch": micro_batch} if micro_batch else {}),
    )


def learn(
    checkpoint: Checkpoint,
    method: str,
    target: Target,
    data: Data,
    *,
    options: Mapping[str, Any] | None = None,
    record: Mapping[str, Any],
    execution: Execution,
    house: Housekeeping,
    measure: Callable[[Trainee], float | None] = lambda _: None,
    out: Path,
) -> tuple[Plan, Checkpoint]:
    """Learn what to cut; all processes together.

    Args:
        checkpoint: the model.
        method: a name from the registry, of a :class:`LearnedMethod`.
        target: the shape, or the ratio.
        data: what to train on, under :func:`learning_recipe`.
        options: of the method.
        record: what identifies the data, for the plan.
        execution: where and how to compute.
        house: checkpoints of the run, metrics, progress.
        measure: gives a held-out loss along the way.
        out: an existing folder for the trained model.

    Returns:
        The plan; and the model before the cut, its weights trained and multiplied by their gates, in ``out``.

    Raises:
        UserError: on a target that this model has no shape for.
        RunError: if the gates did not come near the target, or training ended early.
    """
    found = get_method(method, options)
    after = target.shape(checkpoint.shape, found, method)
    model = skeleton(checkpoint.config, checkpoint.directory)
    model.requires_grad_(found.rate > 0)
    gates = Gates(model, found, checkpoint.shape, after)
    trainee = place(model, stored_weights(checkpoint), execution, gates)
    result = train(trainee, data, masks={}, measure=measure, points=_POINTS, house=house)
    scores = gates.scores()
    _check_reached(found, scores, checkpoint.shape, after, result["curve"], house)
    kept = {space: _kept(a, after, space) for space, a in scores.items()}
    values = {space: _values(found, a, kept[space]) for space, a in scores.items()}
    _write(checkpoint, trainee, values, out)
    asked = target.record(found) | ({"options": identity(found)} if identity(found) else {})
    fields = _fields(checkpoint.shape, after, scores, kept)
    fields["summary"] |= {"curve": result["curve"], "steps": result["steps"], "targets": result["targets"]}
    calibration = {**record, "tokens": result["tokens"], "method_source": found.source}
    plan = Plan.keeping_all(
        method, found.granularity, asked, checkpoint.shape, source=checkpoint.digest, calibration=calibration, **fields
    )
    return plan, Checkpoint(out)


def _check_reached(
    method: LearnedMethod,
    scores: Mapping[str, Tensor],
    before: Shape,
    after: Shape,
    curve: list[dict[str, Any]],
    house: Housekeeping,
) -> None:
    """Refuse gates that are not near the shape: which of them to cut would then be an arbitrary choice."""
    for space, a in scores.items():
        units, goal = before.units(space), after.units(space)
        sizes = method.open(a).sum(dim=1)
        worst = int((sizes - goal).abs().argmax())
        if abs(float(sizes[worst]) - goal) > max(0.5, _NEAR * units):
            past = ", ".join(f"{point[space]:.4g}" for point in curve[1:])
            where = f" in layer {worst}" if len(sizes) > 1 else ""
            raise RunError(
                f"{house.label}: the gates did not settle: {space} is expected to keep {float(sizes[worst]):.4g} "
                f"of {units}{where}, and {goal} were asked (on average along the run: {past}); "
                "give it more --option steps=N, or a higher --option multiplier_rate=X"
            )


def _kept(a: Tensor, after: Shape, space: str) -> Tensor:
    """The units of the highest ``a`` in each row, as many as asked: [rows, kept], sorted."""
    return torch.stack([keep_channels(row, after.units(space)) for row in a])


def _values(method: LearnedMethod, a: Tensor, kept: Tensor) -> Tensor:
    """What each unit is multiplied by when it is cut: its gate without noise.

    A unit that stays only to make up the number may have a gate of zero. It gets the probability that it is open, so
    that it can still learn.
    """
    gates = method.settled(a)
    gates = gates.where(gates > 0, method.open(a))
    return torch.zeros_like(a).scatter(1, kept, gates.gather(1, kept))


def _fields(before: Shape, after: Shape, scores: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """The plan's account of what stays, and of how sure the gates were."""
    fields: dict[str, Any] = {"after": after, "scores": {}}
    layers = kept["layers"][0] if "layers" in kept else torch.arange(before.layers)
    fields["keep_layers"] = layers
    for space, a in scores.items():
        if space in ("layers", "hidden"):
            fields[f"keep_{space}"], fields["scores"][space] = kept[space][0], a[0]
            continue
        fields[f"keep_{space}"] = {layer: kept[space][layer] for layer in layers.tolist()}
        fields["scores"] |= {f"{space}.{layer}": a[layer] for layer in layers.tolist()}
    changed = [f"{_WORDS[space]} {before.units(space)} to {after.units(space)}" for space in scores]
    fields["summary"] = {"detail": ", ".join(changed)}
    return fields


_WORDS = {"layers": "layers", "hidden": "hidden channels", "ffn": "FFN channels", "kv": "KV heads"}


def _write(checkpoint: Checkpoint, trainee: Trainee, values: Mapping[str, Tensor], out: Path) -> None:
    """The trained model, gates multiplied into it, in the types of the checkpoint; all processes give their parts."""

    def stored(name: str, parameter: Tensor) -> Stored:
        dtype = checkpoint.dtype_of(name)

        def parts() -> tuple[Tensor]:
            return (_gated(whole(parameter.detach()).float().cpu(), name, checkpoint.shape, values).to(dtype),)

        return Stored(name, dtype, tuple(parameter.shape), parts)

    tensors = [stored(name, parameter) for name, parameter in trainee.model.named_parameters()]
    if not ranks.first():
        for tensor in in_writing_order(tensors):
            list(tensor.parts())
    else:
        provenance = {"kind": "trained", "init": "checkpoint", "source": checkpoint.digest}
        line = "A model under learned gates, before it was cut."
        write_checkpoint(
            out, checkpoint.raw_config, tensors, provenance=provenance, card=model_card(out.name, None, [line])
        )
        copy_tokenizer(checkpoint.directory, out)
    ranks.wait()


def _gated(tensor: Tensor, name: str, shape: Shape, values: Mapping[str, Tensor]) -> Tensor:
    """A tensor with the gates multiplied into it that its module has in training."""
    family = shape.family
    if name == family.final_norm and "hidden" in values:
        return _scaled(tensor, values["hidden"][0], family.norm_offset)
    if not name.startswith(f"{family.layers}."):
        return tensor
    layer, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
    module, _, kind = rest.rpartition(".")
    if rest in family.linears:
        axis = str(family.block[rest][1])
        gate = _gates_of(axis, int(layer), shape, values)
        tensor = tensor if gate is None else tensor * gate
    if module in family.writers and "layers" in values:
        offset = family.norm_offset if tensor.dim() == 1 and kind == "weight" else 0.0
        tensor = _scaled(tensor, values["layers"][0, int(layer)], offset)
    return tensor


def _scaled(weight: Tensor, gate: Tensor, offset: float) -> Tensor:
    return (weight + offset) * gate - offset


def _gates_of(axis: str, layer: int, shape: Shape, values: Mapping[str, Tensor]) -> Tensor | None:
    space = "kv" if axis == "query" else axis
    if space not in values:
        return None
    gates = values[space][0 if space == "hidden" else layer]
    return gates.repeat_interleave(shape.axis_size(axis) // len(gates))
