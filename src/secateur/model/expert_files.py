"""Tensors over all experts of a layer, as files hold them: expert by expert, in one piece, or under another name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UserError
from secateur.model.safetensors_io import Stored
from secateur.model.shapes import Shape

__all__ = ["ExpertFiles", "as_stored", "by_memory_name", "stored_names"]

Places = dict[str, tuple[Any, str]]  #: name of a tensor -> its file, and its name there


@dataclass(frozen=True)
class ExpertFiles:
    """One tensor over all experts [experts, rows, columns], read from the parts that files hold of each expert.

    It has the interface of a :class:`~secateur.model.safetensors_io.TensorFile`, whatever name it is asked for.
    """

    parts: tuple[tuple[tuple[Any, str], ...], ...]  #: for each expert, the file and the name of each part, in order

    def size(self, name: str) -> tuple[int, ...]:
        """The size of the whole tensor.

        Raises:
            UserError: if experts differ in size.
        """
        sizes = {tuple(file.size(stored) for file, stored in parts) for parts in self.parts}
        if len(sizes) > 1:
            raise UserError(f"{name}: experts differ in size: {' and '.join(map(str, sorted(sizes)[:2]))}")
        (rows,) = sizes
        return (len(self.parts), sum(size[0] for size in rows), *rows[0][1:])

    def dtype(self, _name: str) -> torch.dtype:
        """The type that the first expert is stored in."""
        file, stored = self.parts[0][0]
        return file.dtype(stored)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The experts from ``start`` to before ``stop``: a copy."""
        dtype = self.dtype(name)
        experts = [
            torch.cat([file.tensor(stored).to(dtype) for file, stored in parts]) for parts in self.parts[start:stop]
        ]
        return torch.stack(experts)

    def tensor(self, name: str) -> Tensor:
        """All experts."""
        return self.rows(name, 0, len(self.parts))


#: the numbers that four bits stand for in MXFP4: three of magnitude, after one of sign
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class PackedExperts:
    """One tensor over all experts [experts, inputs, outputs], read from MXFP4: four bits a weight, one scale for 32.

    ``weight = FP4 * 2^(scale - 127)`` (OCP Microscaling Formats 1.0). Files hold it transposed, as ``*_blocks`` uint8
    [experts, outputs, inputs / 32, 16], the lower four bits of a byte first, and ``*_scales`` uint8 [experts, outputs,
    inputs / 32]. It has the interface of :class:`ExpertFiles`.
    """

    blocks: tuple[Any, str]  #: the file, and the name in it
    scales: tuple[Any, str]

    def size(self, name: str) -> tuple[int, ...]:
        """The size of the whole tensor.

        Raises:
            UserError: if blocks and scales do not belong together.
        """
        (blocks, blocks_name), (scales, scales_name) = self.blocks, self.scales
        size = blocks.size(blocks_name)
        if len(size) != 4 or scales.size(scales_name) != size[:-1]:
            raise UserError(f"{name}: blocks of size {size} and scales of size {scales.size(scales_name)} do not match")
        experts, outputs, groups, width = size
        return (experts, groups * width * 2, outputs)

    def dtype(self, _name: str) -> torch.dtype:
        """The type that it is read as, which holds every value of MXFP4 exactly."""
        return torch.bfloat16

    def rows(self, _name: str, start: int, stop: int) -> Tensor:
        """The experts from ``start`` to before ``stop``."""
        return torch.stack([self._expert(expert) for expert in range(start, stop)])

    def tensor(self, name: str) -> Tensor:
        """All experts."""
        return self.rows(name, 0, self.size(name)[0])

    def _expert(self, expert: int) -> Tensor:
        (blocks, scales) = (file.rows(n, expert, expert + 1)[0] for file, n in (self.blocks, self.scales))
        numbers = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2)  # [outputs, groups, 32]
        values = torch.tensor(_FP4, dtype=torch.bfloat16)[numbers.int()]
        return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).T.contiguous()


def _spellings(shape: Shape) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the name of each tensor that files may spell otherwise, and its names there: for each expert, each part."""
    family = shape.family
    for layer in range(shape.layers):
        for rest, parts in family.stored.items():
            if rest in shape.block_tensors(layer):
                count = shape.experts if "{expert}" in parts[0] else 1
                names = [[family.block_tensor(layer, part.format(expert=e)) for part in parts] for e in range(count)]
                yield family.block_tensor(layer, rest), names


def stored_names(shape: Shape) -> set[str]:
    """The names that files may have for tensors whose name in memory is another one."""
    return {part for _, experts in _spellings(shape) for parts in experts for part in parts}


def by_memory_name(places: Mapping[str, tuple[Any, str]], shape: Shape) -> tuple[Places, set[str]]:
    """Find the tensors of a model under their names in memory.

    Args:
        places: name in files -> file and name there.

    Returns:
        Name in memory -> file and name there; and the names of the tensors that files spell as the row's column
        ``stored`` says. Where parts are missing, nothing is joined, and they stay under their own names.
    """
    by_name, spelled = dict(places), set()
    for name, experts in _spellings(shape):
        if name in by_name or any(part not in by_name for parts in experts for part in parts):
            continue
        located = tuple(tuple(by_name.pop(part) for part in parts) for parts in experts)
        joined = len(experts) > 1 or len(experts[0]) > 1
        by_name[name] = (ExpertFiles(located), name) if joined else located[0][0]
        spelled.add(name)
    for name in _expert_tensors(shape):
        packed = [f"{name}_blocks", f"{name}_scales"]
        if name not in by_name and all(part in by_name for part in packed):
            blocks, scales = (by_name.pop(part) for part in packed)
            by_name[name] = (PackedExperts(blocks, scales), name)
    return by_name, spelled


def _expert_tensors(shape: Shape) -> Iterator[str]:
    """Yield the names in memory of the matrices of all experts of a layer."""
    for layer in range(shape.layers):
        for rest in shape.expert_weights(layer):
            yield shape.family.block_tensor(layer, rest)


def as_stored(tensors: Iterable[Stored], shape: Shape) -> list[Stored]:
    """Spell tensors that are named as in memory as published files of the family do.

    Args:
        tensors: each yields all its values at once.
    """
    spellings = dict(_spellings(shape)) if shape.family.stored else {}
    stored: list[Stored] = []
    for tensor in tensors:
        experts = spellings.get(tensor.name, [[tensor.name]])
        if experts == [[tensor.name]]:
            stored.append(tensor)
        elif len(experts) == 1:
            stored.append(Stored(experts[0][0], tensor.dtype, tensor.size, tensor.parts))
        else:
            stored += _split(tensor, experts)
    return stored


def _split(tensor: Stored, experts: list[list[str]]) -> Iterator[Stored]:
    """Split a tensor over all experts into the parts that files hold of each."""
    rows = tensor.size[1] // len(experts[0])

    def part(expert: int, number: int) -> Iterator[Tensor]:
        (values,) = tensor.parts()
        yield values[expert, number * rows : (number + 1) * rows]

    for expert, names in enumerate(experts):
        for number, name in enumerate(names):
            size = (rows, *tensor.size[2:])
            yield Stored(name, tensor.dtype, size, lambda expert=expert, number=number: part(expert, number))
