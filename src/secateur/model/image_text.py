"""The image-text model around a checkpoint's language model: its tensors besides, and its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UserError
from secateur.model.config_file import WholeConfig
from secateur.model.families import Axis, Family
from secateur.model.safetensors_io import Stored, TensorFile
from secateur.model.shapes import Shape
from secateur.model.wrappers import Wrapper
from secateur.progress import notify_once

__all__ = ["ImageTextModel"]

_IGNORED = ("mtp.",)  #: stored beside some models, and not read by transformers


@dataclass(frozen=True)
class ImageTextModel:
    """What surrounds a language model in the files of an image-text model."""

    whole: WholeConfig
    names: Mapping[str, str]  #: name of a tensor of the language model -> name in the file
    outside: Mapping[str, TensorFile]  #: name in the file of each tensor outside the language model -> its file
    family: Family

    @classmethod
    def of(
        cls, whole: WholeConfig, files: Mapping[str, TensorFile], names: Mapping[str, str], shape: Shape, where: str
    ) -> ImageTextModel:
        """Find the tensors outside the language model.

        Args:
            files: stored name -> file, of all tensors.
            names: of the language model's tensors, see :func:`secateur.model.wrappers.tower_names`.

        Raises:
            UserError: if one that follows the hidden size is missing, or has another size.
        """
        inside = set(names.values())
        ignored = [name for name in files if name.startswith(_IGNORED)]
        if ignored:
            notify_once(f"{where}: left out, no model of transformers reads them: {ignored[0]} and what is beside it")
        outside = {name: file for name, file in files.items() if name not in inside and name not in ignored}
        kind = whole.config.model_type
        if missing := whole.wrapper.missing(outside):
            raise UserError(f"{where}: lacks the tensor {missing[0]} of a {kind} model")
        if not any("vis" in name and not whole.wrapper.axes(name) for name in outside):
            raise UserError(
                f"{where}: lacks the vision tower of a {kind} model; restore its weights, or save the language model "
                "alone, with its own config.json"
            )
        for name, file in outside.items():
            for dimension, axis in enumerate(whole.wrapper.axes(name) or ()):
                size = file.size(name)
                if axis and (dimension >= len(size) or size[dimension] != shape.hidden):
                    raise UserError(f"{where}: {name} has size {size}, but axis {dimension} should be {shape.hidden}")
        return cls(whole, names, outside, shape.family)

    @property
    def wrapper(self) -> Wrapper:
        """The row of the table."""
        return self.whole.wrapper

    @property
    def parameters(self) -> int:
        """The number of parameters outside the language model."""
        return sum(torch.Size(file.size(name)).numel() for name, file in self.outside.items())

    def stored_name(self, name: str) -> str:
        """The name in the file of a tensor of the language model, which may have another number of layers."""
        if name in self.names:
            return self.names[name]
        start = f"{self.family.layers}."
        example = next(stored for text, stored in self.names.items() if text.startswith(start))
        prefix = example.partition(f"{self.family.layers.removeprefix(f'{self.family.prefix}.')}.")[0]
        return f"{prefix}{name.removeprefix(f'{self.family.prefix}.')}"

    def tensors(
        self, tower: Iterable[Stored], indices: Callable[[Axis], Tensor | None] = lambda _: None
    ) -> Iterator[Stored]:
        """The tensors of the whole model: those of the language model under their names in the file, and the others.

        Args:
            tower: the tensors of the language model.
            indices: a space -> the indices to keep of an axis in it; None for all.
        """
        for stored in tower:
            yield dataclasses.replace(stored, name=self.stored_name(stored.name))
        for name, file in self.outside.items():
            keep = [indices(axis) if axis else None for axis in self.wrapper.axes(name) or ()]
            size = list(file.size(name))
            size[: len(keep)] = [s if k is None else len(k) for s, k in zip(size, keep, strict=False)]
            yield Stored(name, file.dtype(name), tuple(size), partial(_parts, file, name, keep))


def _parts(file: Any, name: str, keep: list[Tensor | None]) -> tuple[Tensor]:
    tensor: Tensor = file.tensor(name)
    for dimension, indices in enumerate(keep):
        tensor = tensor if indices is None else tensor.index_select(dimension, indices)
    return (tensor,)
