"""Cut a checkpoint to a plan, for every method and family."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.expert_matrices import is_expert_weight
from secateur.model.families import Axis
from secateur.model.plan import Plan
from secateur.model.safetensors_io import Stored
from secateur.model.zeros import ZeroCount
from secateur.progress import notify

__all__ = ["carry_masks", "cut_config", "cut_tensors", "cut_tower"]

_ROWS = 4096  # of the embedding or the head at once
_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")  # of config.json


def cut_tensors(checkpoint: Checkpoint, plan: Plan, zeros: ZeroCount | None = None) -> Iterator[Stored]:
    """Yield each tensor as the plan cuts it, under the new layer numbers; it is read when it is written.

    An image-text model's tensors have their names in its file.

    Args:
        zeros: counts the zeros that stay in the output without a mask, and weights that the checkpoint's masks drop.
    """
    tower = cut_tower(checkpoint, plan, zeros)
    around = checkpoint.image_text
    return around.tensors(tower, lambda axis: plan.indices(axis, -1)) if around else tower


def cut_tower(checkpoint: Checkpoint, plan: Plan, zeros: ZeroCount | None = None) -> Iterator[Stored]:
    """Yield the tensors of the language model, cut; arguments as for :func:`cut_tensors`."""
    family = checkpoint.family
    stored = checkpoint.outer_tensors()
    for name, axes in plan.after.outer_tensors().items():
        size = plan.after.tensor_size(axes)
        if name in stored:
            parts = partial(_outer_parts, checkpoint, plan, name, axes)
            yield Stored(name, checkpoint.dtype_of(name), size, parts)
        else:  # a bias of the head that comes with biases of blocks
            yield Stored.of(name, torch.zeros(size, dtype=checkpoint.dtype))
    for new, old in enumerate(plan.keep_layers.tolist()):
        stored = checkpoint.shape.block_tensors(old)
        for rest, axes in plan.after.block_tensors(new).items():
            name = family.block_tensor(old, rest)
            dtype = checkpoint.dtype_of(name) if rest in stored else checkpoint.dtype
            if plan.after.is_routed(rest):
                yield from _expert_tensors(checkpoint, plan, old, new, rest, axes, zeros)
                continue
            size = plan.after.tensor_size(axes)
            make = partial(_block_tensor, checkpoint, plan, old, new, rest, axes, zeros)
            written = family.stored[rest][0] if name in checkpoint.spelled else rest
            new_name = family.block_tensor(new, rest)
            if new_name in plan.tuned:
                make = partial(_tuned, plan, new_name, make if zeros is not None else None)
            yield Stored(family.block_tensor(new, written), dtype, size, lambda make=make: (make(),))


def _tuned(plan: Plan, name: str, cut: Callable[[], Tensor] | None) -> Tensor:
    """A tensor that was tuned after the cut; ``cut`` reads what was cut, so that its zeros are counted."""
    if cut is not None:
        cut()
    return plan.tuned[name]


def _expert_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    old: int,
    new: int,
    rest: str,
    axes: tuple[Axis, ...],
    zeros: ZeroCount | None,
) -> Iterator[Stored]:
    """Yield a tensor over the experts of a layer as the checkpoint's files spell it; one expert is read at a time."""
    family, keep = checkpoint.family, plan.keep_experts[old].tolist()
    name = family.block_tensor(old, rest)
    expert_part = partial(_expert, checkpoint, plan, old, new, rest, axes, zeros)
    dtype, size = checkpoint.dtype_of(name), plan.after.tensor_size(axes)
    spelling = family.stored[rest] if name in checkpoint.spelled else (rest,)
    if "{expert}" not in spelling[0]:

        def experts() -> Iterator[Tensor]:
            return (expert_part(number)[None] for number in range(len(keep)))

        yield Stored(family.block_tensor(new, spelling[0]), dtype, size, experts)
        return
    rows, pending = size[1] // len(spelling), dict[int, tuple[Tensor, int]]()

    def part_of(number: int, part: int) -> Tensor:
        """A part of an expert's tensor, which is cut once and stays until all of its parts are written."""
        whole, remaining = pending.pop(number, None) or (expert_part(number), len(spelling))
        if remaining > 1:
            pending[number] = whole, remaining - 1
        return whole[part * rows : (part + 1) * rows]

    for number in range(len(keep)):
        for part, template in enumerate(spelling):
            make = partial(part_of, number, part)
            full_name = family.block_tensor(new, template.format(expert=number))
            yield Stored(full_name, dtype, (rows, *size[2:]), lambda make=make: (make(),))


def _expert(
    checkpoint: Checkpoint,
    plan: Plan,
    layer: int,
    new_layer: int,
    rest: str,
    axes: tuple[Axis, ...],
    zeros: ZeroCount | None,
    number: int,
) -> Tensor:
    """The tensor of an expert, by its new number, as the plan cuts it."""
    name, expert = checkpoint.family.block_tensor(layer, rest), int(plan.keep_experts[layer][number])
    tensor = checkpoint.rows(name, expert, expert + 1)[0]
    checkpoint.check_finite(name, tensor)
    mask = _expert_mask(plan, checkpoint.family.block_tensor(new_layer, rest), number)
    if zeros is not None and is_expert_weight(axes):
        zero = tensor == 0
        zeros.add(_slice_expert(zero, axes, plan, layer, expert), mask)
        if name in checkpoint.masks:
            zeros.add_revived(zero, checkpoint.masks[name][expert])
    if name in plan.weights:
        tensor = plan.weights[name][expert]
    tensor = _slice_expert(tensor, axes, plan, layer, expert)
    return tensor if mask is None else tensor.masked_fill(~mask, 0)


def _slice_expert(tensor: Tensor, axes: tuple[Axis, ...], plan: Plan, layer: int, expert: int) -> Tensor:
    """Slice an expert's part of a tensor over all experts; ``axes`` are those of the whole tensor."""
    for dimension, axis in enumerate(axes[1:]):
        indices = plan.expert_indices(axis, layer, expert)
        if indices is not None:
            tensor = tensor.index_select(dimension, indices)
    return tensor


def _expert_mask(plan: Plan, name: str, number: int) -> Tensor | None:
    """The mask of one expert of the output in a tensor over all experts; None for no mask."""
    if name not in plan.masks:
        return None
    masks = plan.masks
    return masks.expert(name, number) if isinstance(masks, _CutMasks) else masks[name][number]


def _outer_parts(checkpoint: Checkpoint, plan: Plan, name: str, axes: tuple[Axis, ...]) -> Iterator[Tensor]:
    """A tensor outside the blocks; matrices, whose rows are the vocabulary, which is never cut, come in pieces."""
    rows = plan.before.tensor_size(axes)[0]
    step = _ROWS if len(axes) > 1 else rows
    for start in range(0, rows, step):
        part = checkpoint.rows(name, start, min(start + step, rows))
        yield _keep_scale(name, _slice(part, axes, plan, layer=-1), plan)


def _block_tensor(
    checkpoint: Checkpoint,
    plan: Plan,
    layer: int,
    new_layer: int,
    rest: str,
    axes: tuple[Axis, ...],
    zeros: ZeroCount | None,
) -> Tensor:
    name = checkpoint.family.block_tensor(layer, rest)
    new_name = checkpoint.family.block_tensor(new_layer, rest)
    mask = plan.masks.get(new_name)
    if zeros is not None and rest in checkpoint.shape.linears(layer):
        zero = checkpoint.tensor(name) == 0
        zeros.add(_slice(zero, axes, plan, layer), mask)
        zeros.add_revived(zero, checkpoint.masks.get(name))
    if rest in checkpoint.shape.block_tensors(layer):
        tensor = plan.weights[name] if name in plan.weights else checkpoint.tensor(name)
    else:  # a bias that the plan switches on
        tensor = torch.zeros(plan.before.tensor_size(axes), dtype=checkpoint.dtype)
    if name in plan.biases:
        tensor = (tensor.float() + plan.biases[name]).to(tensor.dtype)
    tensor = _slice(_keep_mean(rest, tensor, axes, plan, layer=layer), axes, plan, layer=layer)
    return tensor if mask is None else tensor.masked_fill(~mask, 0)


def carry_masks(plan: Plan, masks: Mapping[str, Tensor]) -> Plan:
    """The plan with the masks of the checkpoint that it cuts, sliced as the weights are; each is read when it is used.

    Padding is not masked: its weights have no gradient, so they stay zero.
    """
    if not masks:
        return plan
    carried = _CutMasks(plan, masks)
    detail = f"{plan.summary.get('detail', '')}; the masks of {len(carried)} linears were carried over".lstrip("; ")
    return dataclasses.replace(plan, masks=carried, summary={**plan.summary, "detail": detail})


class _CutMasks(Mapping[str, Tensor]):
    """The masks of a checkpoint as a plan cuts them: name of a tensor of the output -> mask."""

    def __init__(self, plan: Plan, masks: Mapping[str, Tensor]) -> None:
        family = plan.before.family
        self._plan, self._masks = plan, masks
        self._places = {
            family.block_tensor(new, rest): (old, family.block_tensor(old, rest), axes)
            for new, old in enumerate(plan.keep_layers.tolist())
            for rest, axes in plan.before.block_tensors(old).items()
            if family.block_tensor(old, rest) in masks
        }

    def __getitem__(self, name: str) -> Tensor:
        layer, old_name, axes = self._places[name]
        if is_expert_weight(axes):
            return torch.stack([self.expert(name, number) for number in range(len(self._plan.keep_experts[layer]))])
        return ~_slice(~self._masks[old_name], axes, self._plan, layer)

    def expert(self, name: str, number: int) -> Tensor:
        """The mask of one expert, by its new number, in a tensor over all experts."""
        layer, old_name, axes = self._places[name]
        expert = int(self._plan.keep_experts[layer][number])
        return _slice_expert(self._masks[old_name][expert], axes, self._plan, layer, expert)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _slice(tensor: Tensor, axes: tuple[Axis, ...], plan: Plan, layer: int) -> Tensor:
    for dimension, axis in enumerate(axes):
        indices = plan.indices(axis, layer)
        if indices is not None:
            tensor = tensor.index_select(dimension, indices)
        parts = plan.parts(axis, layer)
        if any(missing for _, missing in parts):
            tensor = _pad(tensor, dimension, parts)
    return tensor


def _pad(tensor: Tensor, dimension: int, parts: list[tuple[int, int]]) -> Tensor:
    """Put zeros behind each part of a dimension."""
    padded = []
    for piece, (_, missing) in zip(tensor.split([count for count, _ in parts], dimension), parts, strict=True):
        padded += [piece, piece.new_zeros([*piece.shape[:dimension], missing, *piece.shape[dimension + 1 :]])]
    return torch.cat(padded, dimension)


def _keep_mean(name: str, tensor: Tensor, axes: tuple[Axis, ...], plan: Plan, layer: int) -> Tensor:
    """Undo what the zeros behind a norm's channels would change by themselves.

    A norm that runs over several heads divides by the root of a mean, which counts the zeros of the heads that this
    layer lacks and others have. The norm's weight makes up for it.
    """
    if len(axes) != 1 or not name.endswith(".weight"):
        return tensor
    ((count, missing),) = plan.parts(axes[0], layer)
    if not missing:
        return tensor
    factor, offset = math.sqrt(count / (count + missing)), plan.before.family.norm_offset
    return ((tensor.float() + offset) * factor - offset).to(tensor.dtype)


def _keep_scale(name: str, tensor: Tensor, plan: Plan) -> Tensor:
    """Undo what a narrower residual stream would change by itself.

    A model that multiplies its embeddings by the root of the hidden size would multiply a narrower one by less. The
    embedding makes up for it; where it is also the head, the final norm takes the same factor back.
    """
    family = plan.before.family
    if not family.embedding_grows or plan.before.hidden == plan.after.hidden:
        return tensor
    factor = math.sqrt(plan.before.hidden / plan.after.hidden)
    if name == family.embedding:
        return (tensor.float() * factor).to(tensor.dtype)
    if name == f"{family.final_norm}.weight" and plan.before.tied:
        return ((tensor.float() + family.norm_offset) / factor - family.norm_offset).to(tensor.dtype)
    return tensor


def cut_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The content of config.json after the cut; ``head_dim`` is always written, since hidden / heads may not be it.

    Raises:
        UserError: if transformers would not open it: some configurations hold sizes to rules that no table here knows.
    """
    other_family = plan.after.family != plan.before.family  # equal, not the same one, in another process
    config = _with_defaults(checkpoint) if other_family else dict(checkpoint.raw_config)
    family = plan.after.family
    switches = {switch for switch in plan.after.switches if switch not in plan.before.switches and "&" not in switch}
    twins = [twin for key in switches for twin in family.twin_keys.get(key, ())]
    changes: dict[str, Any] = plan.after.config_changes() | dict.fromkeys([*switches, *twins], True)
    changes |= {family.further_layers: 0} if family.further_layers else {}
    renamed = {old: key for old, key in family.old_keys.items() if old in config}
    changes = {key: getattr(checkpoint.config, key) for key in renamed.values()} | changes
    older = [*renamed, *(old for old, key in type(checkpoint.config).attribute_map.items() if key in changes)]
    config = {key: value for key, value in config.items() if key not in (*older, *family.unstated)} | changes
    cuts_layers = plan.after.layers < plan.before.layers
    for key in checkpoint.family.per_layer_keys:
        # The config object spells out what older files derive from a period, which cut layers no longer follow.
        values = getattr(checkpoint.config, key, None)
        if isinstance(values, list) and len(values) >= plan.before.layers and (key in config or cuts_layers):
            config[key] = [values[layer] for layer in plan.keep_layers.tolist()]
    for key in checkpoint.family.layer_index_keys if cuts_layers else ():
        if key not in changes and isinstance(values := getattr(checkpoint.config, key, None), list):
            config[key] = [new for new, old in enumerate(plan.keep_layers.tolist()) if old in values]
    if cuts_layers:
        _describe_kinds(checkpoint, plan, config)
    if other_family:
        assert plan.before.family.relaxed is not None
        model_type, architecture, besides = plan.before.family.relaxed
        # Readers other than transformers may have no default for the switches of the other family.
        config = {**{key: False for key in family.optional.values() if not key.startswith("!")}, **config}
        config |= {"model_type": model_type, "architectures": [architecture], **besides}
    try:
        if checkpoint.whole:
            config = checkpoint.whole.around(config)
        CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers refuses the shape {plan.after} for this model: {reason}; try another, e.g. with `axes` ffn"
        ) from None
    return config


def _describe_kinds(checkpoint: Checkpoint, plan: Plan, config: dict[str, Any]) -> None:
    """Change the keys of config.json that say, beside ``layer_types``, which layers are of which kind."""
    layers = checkpoint.shape.layers
    first = config.get("max_window_layers")  # Qwen: the layers from this one on have a window
    if isinstance(first, int) and first < layers:
        config["max_window_layers"] = int((plan.keep_layers < first).sum())
    if shared := config.get("num_kv_shared_layers"):  # Gemma: so many of the last layers read earlier keys and values
        config["num_kv_shared_layers"] = int((plan.keep_layers >= layers - shared).sum())
    if isinstance(overrides := config.get("per_layer_config"), dict):  # by index, which older versions pad with zeros
        by_layer = {int(layer): values for layer, values in overrides.items()}
        layers_to_keep = enumerate(plan.keep_layers.tolist())
        config["per_layer_config"] = {str(new): by_layer[old] for new, old in layers_to_keep if old in by_layer}
    kinds, rope = config.get("layer_types"), config.get("no_rope_layers")
    if isinstance(rope, list):  # SmolLM3: each layer at a multiple of the interval has no RoPE
        _redescribe(checkpoint, config, ("no_rope_layer_interval",), rope, "no_rope_layers", (1, 0))
    if isinstance(kinds, list):  # Gemma, EXAONE, Qwen 3.5: each layer at a multiple of the pattern attends to all
        is_full = [kind == "full_attention" for kind in kinds]
        _redescribe(checkpoint, config, _PERIODS, is_full, "layer_types", (False, True))


def _redescribe(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    keys: tuple[str, ...],
    values: list[Any],
    listed: str,
    kinds: tuple[Any, Any],
) -> None:
    """Change the period that describes a list by layer; drop it where no period does.

    Args:
        keys: of the period: a number, or letters for the layers of a period, as EXAONE has it.
        values: one for each layer that stays.
        listed: key of the list.
        kinds: the value of a layer within a period, and of the one that ends it.
    """
    present = [key for key in keys if isinstance(config.get(key), (int, str))]
    if not present:
        return
    before = config[present[0]]
    period = next((p for p in (before, *range(1, len(values) + 2)) if values == _periodic(p, len(values), kinds)), None)
    for key in present:
        config.pop(key)
    if period is not None:
        config |= dict.fromkeys(present, period)
    else:
        notify(
            f"{checkpoint.directory}: no {present[0]} describes the layers that stay; it is left out, and readers that "
            f"do not know {listed} will compute another function"
        )


def _periodic(period: int | str, layers: int, kinds: tuple[Any, Any]) -> list[Any]:
    if not period:
        return []
    if isinstance(period, str):  # the last layer has no window, whatever its letter
        return [kinds[period[layer % len(period)] == "G" or layer == layers - 1] for layer in range(layers)]
    return [kinds[(layer + 1) % period == 0] for layer in range(layers)]


def _with_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration with all defaults, since those of another family may differ; what the file has stays."""
    defaults = {key: value for key, value in checkpoint.config.to_diff_dict().items() if not key.startswith("_")}
    if "torch_dtype" in checkpoint.raw_config:
        defaults.pop("dtype", None)
    # A Mistral of an old version makes transformers warn of a fault of Mistral's tokenizers, which this one lacks.
    return defaults | checkpoint.raw_config | {"transformers_version": defaults["transformers_version"]}
