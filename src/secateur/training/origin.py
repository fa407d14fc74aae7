"""The model that a training run starts from: its weights, masks and stored types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.errors import UserError
from secateur.hub import local_checkpoint, repository_of
from secateur.model.checkpoint import Checkpoint, read_config, skeleton
from secateur.model.plan import JSON_FILE, Plan, load_masks, stored_masks
from secateur.model.shapes import Shape
from secateur.model.zeros import ZeroCount, linear_names
from secateur.progress import track
from secateur.training.init import fresh_weights, stored_weights
from secateur.training.output import overflow
from secateur.training.recipe import Recipe
from secateur.training.request import TrainRequest

__all__ = ["Origin", "Start", "open_origin"]


@dataclass(frozen=True)
class Start:
    """A model before its first step."""

    model: Any  #: without weights
    weights: Callable[[str], Tensor]  #: parameter name -> its value
    masks: Mapping[str, Tensor] = field(default_factory=dict)  #: parameter name -> bool, True where kept
    report: Callable[[], None] = lambda: None  #: says what was noticed in the weights, once they are placed
    config: Mapping[str, Any] = field(default_factory=dict)  #: the content of config.json
    checkpoint: Checkpoint | None = None  #: that the weights are from; None for fresh ones


@dataclass(frozen=True)
class Origin:
    """The model that a request starts from."""

    directory: Path  #: of the configuration and the tokenizer
    raw_config: dict[str, Any]
    config: Any
    shape: Shape
    checkpoint: Checkpoint | None  #: of the weights; None for fresh ones
    masks: Mapping[str, Tensor]
    plan: Path  #: directory of the plan that has the masks
    fresh_dtype: torch.dtype  #: to store a model of fresh weights in
    save_dtype: torch.dtype | None = None  #: to store every tensor in; None for the types of the checkpoint
    repository: str | None = None  #: its name on the Hub

    @property
    def kind(self) -> str:
        """Where the weights come from, in a word."""
        return "checkpoint" if self.checkpoint else "redrawn" if self.masks else "random"

    @property
    def provenance(self) -> dict[str, Any] | None:
        """How the weights came about, if secateur wrote them."""
        return self.checkpoint.provenance if self.checkpoint else None

    @property
    def identity(self) -> dict[str, Any]:
        """The parts that change the result."""
        plan = self.directory / JSON_FILE
        weights = self.checkpoint.digest if self.checkpoint else "scratch"
        return {"weights": weights, "config": self.raw_config, "masks": plan.read_text() if self.masks else None}

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that a trained tensor is stored in; one that is float32 in a smaller checkpoint stays so."""
        checkpoint = self.checkpoint
        if checkpoint and checkpoint.dtype_of(name) == torch.float32 != checkpoint.dtype:
            return torch.float32
        return self.save_dtype or (checkpoint.dtype_of(name) if checkpoint else self.fresh_dtype)

    @property
    def dtype_name(self) -> str:
        """The type that the trained model is stored in, as config.json names it."""
        return str(self.dtype_of(self.shape.family.embedding)).removeprefix("torch.")

    def start(self, recipe: Recipe) -> Start:
        """The model without weights, its first weights and its masks.

        Raises:
            UserError: if attention is to stay within documents, and the model has layers that carry a state across.
        """
        if recipe.attention == "document" and self.shape.carries_state:
            raise UserError(
                f"`attention`: layers of a {self.shape.family.name} carry a state from one document to the next; train "
                "it with attention: window"
            )
        model = skeleton(self.config, self.directory)
        if self.checkpoint is None:
            return Start(model, fresh_weights(model, recipe.init, seed=recipe.seed), self.masks)
        stored, linears, zeros = stored_weights(self.checkpoint), set(linear_names(self.shape)), ZeroCount()

        def weight(name: str) -> Tensor:
            tensor = stored(name)
            if problem := overflow(name, tensor, self.dtype_of(name)):
                raise UserError(f"{self.directory}: {problem}; choose `save_dtype` bfloat16 or float32")
            if name in linears:
                zeros.add(tensor == 0, self.masks.get(name))
                zeros.add_revived(tensor == 0, self.masks.get(name))
            return tensor

        advice = "training fills them; `keep_zeros` keeps them at zero"
        return Start(model, weight, self.masks, lambda: zeros.warn(self.directory, advice))

    def mask_zeros(self, folder: Path) -> Origin:
        """Make masks of the zeros in the linears, beside the masks that there are; all processes together.

        Args:
            folder: where the plan with the masks is written, once for a run; the first process writes.

        Raises:
            UserError: if no weight is zero.
        """
        assert self.checkpoint is not None
        if distributed.is_main() and not (folder / JSON_FILE).is_file():
            masks = _NonzeroMasks(self.checkpoint)
            folder.mkdir(exist_ok=True)
            total = self.shape.block_weights
            fields = {
                "masks": masks,
                "zeroed": masks.zeros,
                "source": self.checkpoint.digest,
                "summary": {"detail": f"{masks.zeros:,} of {total:,} block weights were zero and are masked"},
            }
            Plan.keeping_all("keep-zeros", "sparse", {"keep_zeros": True}, self.shape, **fields).save(folder)
        distributed.barrier()
        return dataclasses.replace(self, masks=load_masks(folder), plan=folder)


class _NonzeroMasks(Mapping[str, Tensor]):
    """The weights that are not zero, of each linear that has zeros; each mask is made when it is used.

    Raises:
        UserError: when made, if no weight is zero.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._zeros: dict[str, int] = {}
        names = linear_names(checkpoint.shape)
        with track("count zeros", len(names)) as progress:
            for name in names:
                if count := int((~self._mask(name)).count_nonzero()):
                    self._zeros[name] = count
                progress.advance()
        if not self._zeros:
            raise UserError(f"`keep_zeros`: no weight of {checkpoint.directory}'s block linears is zero; leave it out")

    @property
    def zeros(self) -> int:
        """Number of weights that the masks drop."""
        return sum(self._zeros.values())

    def _mask(self, name: str) -> Tensor:
        nonzero, masks = self._checkpoint.tensor(name) != 0, self._checkpoint.masks
        return nonzero & masks[name] if name in masks else nonzero

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._zeros:
            raise KeyError(name)
        return self._mask(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._zeros)

    def __len__(self) -> int:
        return len(self._zeros)


def open_origin(request: TrainRequest, dtype: str) -> Origin:
    """Open the model that the request names.

    Args:
        dtype: of the computation, which a model of fresh weights is stored in.

    Raises:
        UserError: if there is no such checkpoint or configuration.
    """
    types = (getattr(torch, dtype), getattr(torch, request.save_dtype) if request.save_dtype else None)
    if not request.from_scratch:
        checkpoint = Checkpoint(local_checkpoint(request.init))
        fields = (checkpoint.directory, checkpoint.raw_config, checkpoint.config, checkpoint.shape, checkpoint)
        repository = repository_of(request.init, checkpoint.directory)
        return Origin(*fields, checkpoint.masks, checkpoint.directory, *types, repository)
    directory = Path(request.like)
    directory = directory.parent if directory.name == "config.json" else local_checkpoint(request.like, weights=False)
    if not (directory / "config.json").is_file():
        raise UserError(f"`like`: {request.like} has no config.json; name a checkpoint or its config.json")
    raw, config, shape, whole = read_config(directory / "config.json")
    if whole:
        raise UserError(
            f"`like`: {request.like} is an image-text model, and its vision tower is not drawn anew; name a language "
            "model, or train these weights with `init`"
        )
    return Origin(directory, raw, config, shape, None, stored_masks(directory), directory, *types)
