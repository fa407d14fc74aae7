"""SparseGPT: weights by what their removal costs after the others have made up for it (arXiv:2301.00774, alg. 1)."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.reference.common import Kept, entering, linears, through, watching
from torch import Tensor

BLOCK = 128  #: columns whose mask is chosen at once
DAMPING = 0.01  #: of the Hessian's mean diagonal


@torch.no_grad()
def prune(model: Any, windows: Tensor, ratio: float, group: int | None = None) -> Kept:
    """Prune block after block; with ``group``, the share of each so many weights in a row, as in 2:4 for 4."""
    kept: Kept = {}
    states, arguments = entering(model, windows)
    for i, block in enumerate(model.model.layers):
        found = linears(block)
        size = {name: linear.in_features for name, linear in found.items()}
        hessians = {name: torch.zeros(n, n, device=windows.device) for name, n in size.items()}

        def see(name: str, x: Tensor, hessians: dict[str, Tensor] = hessians) -> None:
            tokens = x.flatten(0, 1)
            hessians[name] += 2 / len(windows) * tokens.T @ tokens

        with watching(found, see):
            through(block, states, arguments)
        for name, linear in found.items():
            weight, mask = _solve(linear.weight.data, hessians.pop(name), ratio, group)
            linear.weight.data = weight
            kept[f"mask.model.layers.{i}.{name}.weight"] = mask
        states = through(block, states, arguments)
    return kept


def _solve(weight: Tensor, hessian: Tensor, ratio: float, group: int | None) -> tuple[Tensor, Tensor]:
    """The weight that stays, [out, in], and its mask."""
    weight, columns = weight.clone(), weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        piece, errors = weight[:, start:stop].clone(), torch.zeros_like(weight[:, start:stop])
        factor = upper[start:stop, start:stop]
        mask = torch.ones_like(piece, dtype=torch.bool)
        if group is None:
            cost = piece.square() / factor.diagonal().square()
            mask = cost > cost.flatten().sort().values[int(ratio * cost.numel()) - 1]
        for j in range(stop - start):
            if group is not None and j % group == 0:
                cost = piece[:, j : j + group].square() / factor.diagonal()[j : j + group].square()
                lowest = cost.topk(int(ratio * group), dim=1, largest=False).indices
                mask.scatter_(1, j + lowest, False)
            column = piece[:, j]
            pruned = torch.where(mask[:, j], column, 0)
            error = (column - pruned) / factor[j, j]
            piece[:, j:] -= error[:, None] @ factor[j, j:][None]
            piece[:, j] = pruned
            errors[:, j] = error
        weight[:, start:stop] = piece
        kept[:, start:stop] = mask
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight, kept
