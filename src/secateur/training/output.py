"""Write a trained model as a checkpoint, from however many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.errors import RunError
from secateur.formatting import count, percent, plural, scientific
from secateur.model.card import Ancestry, model_card, pruning_method
from secateur.model.checkpoint_writing import in_write_order, write_checkpoint
from secateur.model.expert_files import as_stored
from secateur.model.image_text import ImageTextModel
from secateur.model.safetensors_io import Stored
from secateur.model.shapes import Shape
from secateur.training.adapter import Adapter, is_adapter_part, plain_name
from secateur.training.four_bit import plain_size
from secateur.training.parallel import TrainModule, full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERT_AXES = 3  #: axes of a tensor over all experts of a layer

__all__ = ["overflow", "trained_card", "write_trained"]


def write_trained(
    out: Path,
    module: TrainModule,
    config: dict[str, Any],
    dtype: Callable[[str], torch.dtype],
    *,
    provenance: dict[str, Any],
    card: str,
    image_text: ImageTextModel | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    remedy: str = "start from a checkpoint that is stored in bfloat16 or float32",
) -> None:
    """Write a model tensor by tensor, its adapter merged: all processes send their parts, the first one writes.

    Args:
        dtype: name of a parameter -> the dtype to store.
        image_text: of the checkpoint that a language model within one was trained from; its other tensors are copied.
        change: (name of a parameter, its whole float32 value) -> the value to write.
        remedy: advice where values do not fit the type to store.

    Raises:
        RunError: in all processes, if a value is beyond the range of the type to store.
    """
    tensors = dict(_stored_tensors(module.model))
    merge = _merging(module.model)

    def value(name: str) -> Tensor:
        whole = change(name, merge(name, full_tensor(tensors[name].detach())))
        if problem := overflow(name, whole, dtype(name)):
            raise RunError(f"{problem}; {remedy}")
        return whole.to(dtype(name))

    recent_value = lru_cache(maxsize=2)(value)  # the parts of a tensor over experts are written one by one

    def stored(name: str, tensor: Tensor) -> Stored:
        read = recent_value if tensor.dim() == _EXPERT_AXES else value
        return Stored(name, dtype(name), tuple(plain_size(tensor)), lambda: (read(name),))

    shape = Shape.of_config(module.model.config, where="the model")
    stored_tensors = as_stored([stored(name, tensor) for name, tensor in tensors.items()], shape)
    if image_text:
        config, stored_tensors = image_text.whole.around(config), list(image_text.tensors(stored_tensors))
    if distributed.is_main():
        write_checkpoint(out, config, stored_tensors, provenance=provenance, card=card)
        return
    for tensor in in_write_order(stored_tensors):
        list(tensor.parts())


def _merging(model: PreTrainedModel) -> Callable[[str, Tensor], Tensor]:
    """A function from a weight's name and frozen value to its value with the adapter, if the model has one."""
    if not any(is_adapter_part(name) for name, _ in model.named_parameters()):
        return lambda _, tensor: tensor
    from secateur.training.lora import merge_into  # imported late: PEFT takes long to import

    return merge_into(model)


def _stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters, tied ones once, and the buffers that are stored with them; without the parts of an adapter."""
    stored = model.state_dict().keys()  # first: FSDP shards what is gathered, and gathered parameters lose their values
    for name, parameter in model.named_parameters():
        if not is_adapter_part(name):
            yield plain_name(name), parameter
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def overflow(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """Describe the largest value of a finite tensor, if it would become infinity in ``dtype``; else empty."""
    if not tensor.numel() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return ""
    ends = torch.stack(tuple(tensor.aminmax()))
    if not ends.to(dtype).isinf().any():
        return ""
    kind, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return f"{name} holds {float(ends.abs().max()):.6g}, beyond the range of {kind} (at most {limit:g})"


def trained_card(
    shape: Shape,
    result: Mapping[str, Any],
    *,
    ancestry: Ancestry | None,
    provenance: Mapping[str, Any] | None,
    masks: Mapping[str, Tensor],
    objective: Mapping[str, Any] | None,
    adapter: Adapter | None = None,
    flops: float | None = None,
    stage: str | None = None,
    repository: str | None = None,
    image_text: bool = False,
) -> str:
    """The model card of a trained model: from which weights, on how many tokens, to which loss.

    Args:
        result: of :func:`secateur.training.loop.train_loop`.
        ancestry: of the model that training began with; None for fresh weights.
        provenance: the content of its ``secateur.json``; None if it has none.
        masks: those that held in training.
        objective: of distillation; None without a teacher.
        adapter: that was trained and merged; None where all weights were trained.
        stage: name of the stage of a study that trained it; None outside one.
        repository: where the model will be on the Hub; None if it stays on disk.
        image_text: whether the model reads images as well.
    """
    method = pruning_method(provenance)
    tokens, curve = plural(result["tokens"], "token"), result["curve"]
    source = "fresh weights"
    if ancestry:
        source = ", ".join(ancestry.base_model) or "an earlier checkpoint"
        source += f", pruned with **{method}** by secateur" if method else ""
    lines = [f"Trained by secateur on {tokens}, beginning with {source}.", ""]
    if objective:
        lines.append(f"- distilled at temperature {objective.get('temperature', 1):g}")
    if adapter:
        lines.append(f"- {adapter}, merged into the weights{'; its update was masked, so zeros stayed' * bool(masks)}")
    if curve[-1]["loss"] is not None:
        lines.append(
            f"- held-out loss: {curve[0]['loss']:.4f} before, {curve[-1]['loss']:.4f} after, in nats per token of "
            "documents that were not trained on"
        )
    if masks:
        zeros = 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        matrices = plural(len(masks), "matrix", "matrices")
        lines.append(
            f"- sparsity: {percent(zeros)} of the weights of {matrices} stayed zero in training; zeros are stored as "
            "any other weight, so the file is as large as before; `plan.safetensors` holds the masks"
        )
    lines.append(f"- shape: {shape}, {count(shape.total)} parameters")
    lines += [f"- FLOPs: {scientific(flops)}"] if flops is not None else []
    lines += [f"- stage of a study: {stage}"] if stage else []
    subject = (ancestry or Ancestry()).subject(shape)
    return model_card(
        f"{subject}, {f'pruned with {method} and ' if method else ''}trained on {tokens}",
        ancestry,
        lines,
        tags=[*(["pruning", method] if method else []), *(["distillation"] if objective else [])],
        repository=repository,
        image_text=image_text,
    )
