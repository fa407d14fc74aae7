"""Controls: a pruned model less some of what it inherits.

A mask says where weights stay, and has structure: rows and columns that keep more than others, and a pattern. The
weights have a distribution in each tensor, and an arrangement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.pruning.target import Pattern

__all__ = ["permuted_mask", "random_mask", "shuffle_weights"]


def permuted_mask(mask: Tensor, name: str, seed: int, pattern: Pattern | None = None) -> Tensor:
    """A mask with its rows and its columns permuted: as many weights stay in each row and column, but in others.

    Args:
        mask: bool [out, in], True where kept.
        name: of the tensor, which the permutation follows from together with ``seed``.
        seed: of it.
        pattern: N:M, if the mask has one: columns then move by groups of M.
    """
    generator = _generator(seed, name)
    out, width = mask.shape
    group = pattern.group if pattern else 1
    rows = torch.randperm(out, generator=generator)
    groups = torch.randperm(width // group, generator=generator)
    columns = (groups[:, None] * group + torch.arange(group)).reshape(-1)
    return mask[rows][:, columns]


def random_mask(mask: Tensor, name: str, seed: int, pattern: Pattern | None = None) -> Tensor:
    """A mask that keeps as many weights of the linear, anywhere; with a pattern as many of each group.

    Args and result are as those of :func:`permuted_mask`.
    """
    group = pattern.group if pattern else mask.numel()
    noise = torch.rand(mask.numel() // group, group, generator=_generator(seed, name))
    kept = mask.reshape(-1, group).sort(dim=1, descending=True).values
    return torch.empty_like(kept).scatter_(1, noise.argsort(dim=1), kept).reshape(mask.shape)


def shuffle_weights(
    weights: Callable[[str], Tensor], masks: Mapping[str, Tensor], seed: int
) -> Callable[[str], Tensor]:
    """Weights permuted within each tensor: the same values, and none at its place. Masked ones stay zero.

    Args:
        weights: name of a parameter -> its value.
        masks: name -> bool, True where kept.
        seed: of the permutations.
    """

    def read(name: str) -> Tensor:
        value = weights(name)
        kept = masks[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
        values = value[kept]
        order = torch.randperm(len(values), generator=_generator(seed, name))
        return torch.zeros_like(value).masked_scatter_(kept, values[order])

    return read


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"control:{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
