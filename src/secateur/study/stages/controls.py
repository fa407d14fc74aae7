"""Controls: pruned models that lack a part of what pruning inherits.

A mask has positions and structure: some rows and columns keep more weights than others, and there may be a pattern.
The weights of a tensor have a distribution and an arrangement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.model.expert_matrices import weight_matrices
from secateur.model.families import Axis
from secateur.pruning.pattern import Pattern

__all__ = ["each_matrix", "permuted_mask", "random_mask", "redrawn_linears", "shuffle_weights"]


def permuted_mask(mask: Tensor, name: str, seed: int, pattern: Pattern | None = None) -> Tensor:
    """Permute the rows and the columns of a mask: the numbers of weights in rows and columns stay, at other places.

    Args:
        mask: bool [out, in], True for weights that stay.
        name: of the tensor; with ``seed`` it determines the permutation.
        pattern: N:M of the mask: columns then move in groups of M.
    """
    generator = _generator(seed, name)
    out, width = mask.shape
    group = pattern.group if pattern else 1
    rows = torch.randperm(out, generator=generator)
    groups = torch.randperm(width // group, generator=generator)
    columns = (groups[:, None] * group + torch.arange(group)).reshape(-1)
    return mask[rows][:, columns]


def random_mask(mask: Tensor, name: str, seed: int, pattern: Pattern | None = None) -> Tensor:
    """Draw a mask that keeps as many weights of the linear at random; with a pattern, as many of each group.

    Args and result are those of :func:`permuted_mask`.
    """
    group = pattern.group if pattern else mask.numel()
    noise = torch.rand(mask.numel() // group, group, generator=_generator(seed, name))
    counts = mask.reshape(-1, group).sort(dim=1, descending=True).values  # as many True as before, all in front
    return torch.empty_like(counts).scatter_(1, noise.argsort(dim=1), counts).reshape(mask.shape)


def each_matrix(
    control: Callable[[Tensor, str, int, Pattern | None], Tensor],
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, tuple[Axis, ...]],
    seed: int,
    pattern: Pattern | None,
) -> dict[str, Tensor]:
    """Apply :func:`permuted_mask` or :func:`random_mask` to each mask; of routed experts, to each of their matrices.

    Args:
        tensors: name -> spaces of its axes.
    """
    changed = {}
    for name, mask in masks.items():
        if mask.dim() == 2:
            changed[name] = control(mask, name, seed, pattern)
            continue
        changed[name] = torch.empty_like(mask)
        for expert, (before, after) in enumerate(zip(mask, changed[name], strict=True)):
            views = zip(weight_matrices(before, tensors[name]), weight_matrices(after, tensors[name]), strict=True)
            for place, (source, target) in enumerate(views):
                target.copy_(control(source, f"{name}.{expert}.{place}", seed, pattern))
    return changed


def redrawn_linears(
    model: nn.Module, draw: Callable[[str], Tensor], stored: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """Draw the linears, the head among them, and take embeddings and norms as stored; a tied head is an embedding.

    Routers and routed experts are linears as well.

    This is the from-scratch baseline of sparse models in the authors' code of arXiv:2606.14150 (``reinit.py``).

    Args:
        model: says which parameters are of linears; it may be without weights.
    """

    def weight(name: str) -> Tensor:
        module = model.get_submodule(name.rpartition(".")[0])
        is_linear = isinstance(module, nn.Linear) or hasattr(module, "num_experts")
        return draw(name) if is_linear else stored(name)

    return weight


def shuffle_weights(
    weights: Callable[[str], Tensor], masks: Mapping[str, Tensor], seed: int
) -> Callable[[str], Tensor]:
    """Permute the weights within each tensor. Masked weights stay zero.

    Args:
        weights: name of a parameter -> its value.
        masks: name -> bool, True for weights that stay.
    """

    def read(name: str) -> Tensor:
        value = weights(name)
        mask = masks[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
        values = value[mask]
        order = torch.randperm(len(values), generator=_generator(seed, name))
        return torch.zeros_like(value).masked_scatter_(mask, values[order])

    return read


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"control:{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
