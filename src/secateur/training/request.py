"""What to train, and how: the request that Python and the command line share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.config import AnyPath, Count, Offset, Positive, load_yaml, parse, parse_value, spec
from secateur.errors import UserError
from secateur.hub import check_repository
from secateur.training.adapter import read_adapter
from secateur.training.recipe import Recipe

__all__ = ["TrainRequest", "read_recipe"]

_DISTILLING = ("temperature", "alpha", "top_k")


@spec
class TrainRequest:
    """A training run: which weights, on which tokens, by which recipe, computed how.

    Attributes:
        out: new directory to write.
        init: ``scratch``, or a checkpoint (a directory, a Hub name, a pruned or trained result).
        tokens: exact budget: 700_000, "700k", "50B" ...
        data: ``shards:DIR``, as ``secateur data`` writes it.
        like: checkpoint or config.json of the shape, for ``scratch``.
        keep_zeros: mask the weights of the block linears that are zero in ``init``, so that they stay zero.
        adapter: train an adapter (LoRA) and freeze the weights: an :class:`Adapter`, a mapping of its fields, or text
            such as ``rank=16,alpha=32,targets=all``. Of a sparse model its update is masked.
        merge: write the weights with the adapter in them, and the adapter in ``adapter/``. Without it the adapter alone
            is written.
        only: the part that is trained, ``router``: the routers of a mixture, all else staying as it is. None for all.
        skip: tokens of the data to leave out before the first.
        recipe: a :class:`Recipe`, a mapping of its fields, or a YAML file.
        teacher: checkpoint to distil from, of the model's vocabulary; or ``logits:DIR``, what ``secateur teach`` has
            saved of one.
        temperature: softens both distributions; with a teacher. None for 1.
        alpha: share of the divergence from the teacher in the loss. None for 1.
        top_k: compare the teacher's likeliest ids, all others as one. None for all, or for all that are saved.
        points: measurements of the held-out loss along the run.
        heldout_windows: windows that it is measured on, at most.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of what is computed; weights, moments and sums stay float32.
        micro_batch: windows at once in a process; None for the recipe's.
        recompute: recompute the activations within blocks in the backward pass.
        compile: compile the blocks with torch.compile.
        replicas: groups of processes that each hold the model.
        save_dtype: type to store the trained model in; None for that of ``init``, or of what is computed for
            ``scratch``.
        save_every: steps between checkpoints.
        save_minutes: minutes after which a checkpoint is written besides.
        keep: checkpoints of the run that stay.
        track: trackers that receive the metrics.
        push_to_hub: repository of the Hugging Face Hub, ``ORG/NAME``, that the output is uploaded to.

    Raises:
        UserError: if a field is out of range, or fields contradict each other.
    """

    out: AnyPath
    init: Any
    tokens: Count
    data: str
    like: Any = None
    keep_zeros: bool = False
    adapter: Any = None
    merge: bool = False
    only: Literal["router"] | None = None
    skip: Offset = 0
    recipe: Any = dataclasses.field(default_factory=Recipe)
    teacher: Any = None
    temperature: float | None = None
    alpha: float | None = None
    top_k: Positive | None = None
    points: Positive = 8
    heldout_windows: Positive = 256
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch: Positive | None = None
    recompute: bool = False
    compile: bool = False
    replicas: Positive = 1
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    save_every: Positive = 100
    save_minutes: Annotated[float, Field(gt=0)] = 20.0
    keep: Positive = 2
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        check_repository(self.push_to_hub)
        recipe = self.recipe if isinstance(self.recipe, Recipe) else read_recipe(self.recipe)
        if self.micro_batch:
            recipe = dataclasses.replace(recipe, micro_batch=self.micro_batch)
        object.__setattr__(self, "recipe", recipe)
        if self.tokens < 2:
            raise UserError("`tokens`: one token predicts nothing; train on two or more")
        if self.from_scratch and self.like is None:
            raise UserError("`init`: scratch needs a shape; name a checkpoint or config.json of that shape with `like`")
        if not self.from_scratch and self.like is not None:
            raise UserError(f"`like`: the shape is that of `init` {self.init}; leave it out, or train from scratch")
        if self.from_scratch and self.keep_zeros:
            raise UserError("`keep_zeros`: fresh weights have no zeros to keep; name a checkpoint with `init`")
        if self.from_scratch and self.only:
            raise UserError(f"`only`: {self.only}: all else would stay random; name a checkpoint with `init`")
        self._check_adapter()
        if self.teacher is None and self._distilling:
            name = next(iter(self._distilling))
            raise UserError(f"`{name}`: says how to distil; name a teacher to distil from with `teacher`")
        _ = self.distill

    def _check_adapter(self) -> None:
        """Read the adapter, and refuse what contradicts it."""
        if self.adapter is None:
            if self.merge:
                raise UserError("`merge`: merges an adapter into the weights; describe one with `adapter`")
            return
        adapter = read_adapter(self.adapter)
        object.__setattr__(self, "adapter", adapter)
        if adapter.peak_rate:
            object.__setattr__(self, "recipe", dataclasses.replace(self.recipe, peak_rate=adapter.peak_rate))
        if self.from_scratch:
            raise UserError("`adapter`: fresh weights would stay random; name a checkpoint with `init`")
        if self.only:
            raise UserError(f"`only`: {self.only}: an adapter freezes the {self.only}; leave one of the two out")

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are fresh."""
        return isinstance(self.init, str) and self.init == "scratch"

    @property
    def _distilling(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _DISTILLING}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def distill(self) -> Any:
        """How to distil; None without a teacher."""
        from secateur.training.recipe import Distill

        return None if self.teacher is None else Distill(**self._distilling)


def read_recipe(source: Mapping[str, Any] | Path | str | None, settings: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from a mapping or a YAML file, with some keys set besides.

    Args:
        source: the mapping or file; None for the defaults.
        settings: ``KEY=VALUE`` texts, which take precedence.

    Raises:
        UserError: if the file is no mapping, a setting is malformed, or a value is out of range.
    """
    raw = {} if source is None else dict(source) if isinstance(source, Mapping) else load_yaml(Path(source))
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a mapping of keys to values, such as peak_rate: 1e-3")
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"`set`: {text} should be KEY=VALUE, such as peak_rate=1e-3")
        raw[key.strip()] = parse_value(value)
    return parse(Recipe, raw, origin="recipe")
