"""Prune one weight matrix, with the checks that every matrix of a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import UserError
from secateur.methods.base import WeightMethod
from secateur.methods.selection import Selector
from secateur.model.checkpoint import is_finite

__all__ = ["check_statistics", "prune_matrix"]


def check_statistics(stats: Mapping[type, Tensor], name: str, directory: Path) -> None:
    """Refuse statistics of the input of the matrix ``name`` that overflow."""
    if not all(is_finite(value) for value in stats.values()):
        raise UserError(f"{directory}: the input of {name} is too large: a sum of squares is infinite")


def prune_matrix(
    method: WeightMethod, weight: Tensor, shared: Any, select: Selector, name: str, directory: Path
) -> tuple[Tensor, Tensor]:
    """Prune a weight matrix [out, in]; return the pruned weight, and a mask that is True for weights that stay.

    Args:
        shared: what ``method.prepare`` made of the statistics of its input; None to prune by magnitude.
        select: with the mask of an earlier pruning, if there is one.
        name: for errors.
        directory: of the checkpoint, for errors.
    """
    if shared is None:
        keep = select(weight.abs())
        weight = weight.masked_fill(~keep, 0)
    else:
        weight, keep = method.prune(weight, shared, select)
    if select.mask is not None:  # a method may call the selector without saying which columns it scores
        keep = keep & select.mask
        weight = weight.masked_fill(~keep, 0)
    if not is_finite(weight):
        raise UserError(f"{directory}: pruning {name} gives NaN or infinity")
    return weight, keep
