"""A model in memory, read through the interface of a checkpoint directory: tensor by tensor, and left unchanged."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint, skeleton, untie, without_leftovers
from secateur.model.config_file import split_config
from secateur.model.families import Family, family_of
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.model.surgery import cut_config, cut_tensors
from secateur.model.weight_files import differs
from secateur.model.wrappers import tower_names
from secateur.model.zeros import UNMASKED, ZeroCount
from secateur.progress import notify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LiveCheckpoint", "cut_model"]


@dataclass(frozen=True)
class _LiveTensors:
    """The tensors of a model, as a file of tensors gives them."""

    tensors: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def size(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].cpu()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop].cpu()

    def holds_own_head(self, family: Family, within_wrapper: bool) -> bool:
        """Whether the head is neither the embedding nor equal to it."""
        names = tower_names(self.tensors, family) if within_wrapper else dict.fromkeys(self.tensors)
        if family.embedding not in names or family.head not in names:
            return False
        embedding, head = (names[name] or name for name in (family.embedding, family.head))
        if self.tensors[embedding].data_ptr() == self.tensors[head].data_ptr():
            return False
        return differs(self, embedding, self, head)


class LiveCheckpoint(Checkpoint):
    """A ``PreTrainedModel`` with the interface of :class:`~secateur.model.checkpoint.Checkpoint`.

    Its tensors are views of the model's parameters and are never written to.

    Raises:
        UserError: if the model is of no known family, or lacks a tensor that its configuration implies.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"`model`: {type(model).__name__} is no model of transformers; pass the model inside it "
                "(model.module, model._orig_mod), or model.merge_and_unload() of an adapter"
            )
        self.model = model
        self.directory = Path(getattr(model, "name_or_path", "") or type(model).__name__)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = model.dtype
        where = str(self.directory)
        raw = without_leftovers(json.loads(config.to_json_string(use_diff=True)), where)
        config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
        config.__dict__.pop("quantization_config", None)
        self.raw_config, self.config, self.whole = split_config(raw, config)
        family_of(self.raw_config["model_type"], where=where)
        config = self.config
        self.shape = Shape.of_config(config, where=where)
        self.family = self.shape.family
        self._paths = []
        tensors = _LiveTensors({name: tensor.detach() for name, tensor in model.state_dict().items()})
        if any(tensor.is_meta for tensor in tensors.tensors.values()):
            raise UserError(f"`model`: {self.directory} has weights on the meta device; load them first")
        if self.shape.tied and tensors.holds_own_head(self.family, bool(self.whole)):
            self.raw_config, self.shape = untie(self.raw_config, config, self.shape, where)
        self._places = self._find(dict.fromkeys(tensors.names, tensors))  # type: ignore[arg-type]
        self._check_tensors()

    @property
    def stored_bytes(self) -> int:
        return sum(self.tensor(name).nbytes for name in self.tensors())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and bytes of the tensors, and the configuration."""
        raw = self.whole.raw if self.whole else self.raw_config
        total = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
        tensors = dict.fromkeys(self.tensors(), self.tensor)
        if self.image_text:
            tensors |= {name: file.tensor for name, file in self.image_text.outside.items()}
        for name, read in sorted(tensors.items()):
            total.update(name.encode())
            total.update(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    @property
    def masks_digest(self) -> str:
        total = hashlib.sha256()
        for name, mask in sorted(self.masks.items()):
            total.update(name.encode())
            total.update(mask.contiguous().view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest() if self.masks else ""

    @cached_property
    def masks(self) -> Mapping[str, Tensor]:
        """Those of the attribute ``masks``, as :func:`secateur.prune` sets it, or of the directory of the weights.

        The latter only where the model still has the zeros that they stand for.
        """
        masks = getattr(self.model, "masks", None)
        if isinstance(masks, Mapping) and masks:
            text_names = {stored: name for name, stored in self.image_text.names.items()} if self.image_text else {}
            masks = {
                text_names.get(str(name), str(name)): torch.as_tensor(mask, dtype=torch.bool).cpu()
                for name, mask in masks.items()
            }
            return self._check_masks(masks, "the model's attribute masks")
        masks = super().masks
        if any(bool(self.tensor(name)[~mask].any()) for name, mask in masks.items()):
            notify(f"the masks of {self.directory} do not apply: the model in memory has changed the weights they drop")
            return {}
        return masks

    @property
    def provenance(self) -> dict[str, Any] | None:
        return None

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return copy.deepcopy(self.model).to(dtype).eval()  # type: ignore[arg-type]

    def load_without_blocks(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        blocks: Any = self.model.get_decoder().layers
        return copy.deepcopy(self.model, {id(blocks): nn.ModuleList()}).to(dtype).eval()  # type: ignore[arg-type]


def cut_model(checkpoint: Checkpoint, plan: Plan) -> PreTrainedModel:
    """Cut a checkpoint to a plan in memory: the model that the written checkpoint would open as, in evaluation mode."""
    from transformers import CONFIG_MAPPING

    if checkpoint.whole and not isinstance(checkpoint, LiveCheckpoint):
        checkpoint = LiveCheckpoint(checkpoint.load(checkpoint.dtype))  # whose names are those in memory
    raw = cut_config(checkpoint, plan)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
    model = skeleton(config, checkpoint.directory)
    zeros = ZeroCount()
    tensors = {stored.name: torch.cat(list(stored.parts())) for stored in cut_tensors(checkpoint, plan, zeros)}
    zeros.warn(checkpoint.directory, UNMASKED)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = checkpoint.dtype
    if isinstance(checkpoint, LiveCheckpoint) and checkpoint.model.can_generate():
        model.generation_config = copy.deepcopy(checkpoint.model.generation_config)
    if incomplete := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise UserError(f"{checkpoint.directory}: the cut leaves {incomplete[0]} without a value")
    return model
