"""A checkpoint as a plan cuts it, read tensor by tensor without being written."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from secateur.model.checkpoint import Checkpoint
from secateur.model.config_file import split_config
from secateur.model.plan import Plan
from secateur.model.safetensors_io import Stored
from secateur.model.surgery import cut_config, cut_tower

__all__ = ["CutCheckpoint"]


class CutCheckpoint(Checkpoint):
    """The language model that a plan leaves of a checkpoint, with the interface of the written one.

    Each tensor is cut when it is read.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.directory = checkpoint.directory
        self.shape, self.family = plan.after, plan.after.family
        self.whole = self.image_text = None
        raw = cut_config(checkpoint, plan)
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
        self.raw_config, self.config, _ = split_config(raw, config)
        self.masks = plan.masks
        self._stored: dict[str, Stored] = {stored.name: stored for stored in cut_tower(checkpoint, plan)}

    def tensor(self, name: str) -> Tensor:
        parts = list(self._at(name).parts())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def embeddings(self, tokens: Tensor) -> Tensor:
        rows, start = [], 0
        for part in self._at(self.family.embedding).parts():  # only the rows that are asked for stay in memory
            inside = (tokens >= start) & (tokens < start + len(part))
            rows.append(part[tokens[inside] - start])
            start += len(part)
        return torch.cat(rows)

    def dtype_of(self, name: str) -> torch.dtype:
        return self._at(name).dtype

    def _at(self, name: str) -> Stored:
        return self._stored[self.family.embedding if name == self.family.head and self.shape.tied else name]
