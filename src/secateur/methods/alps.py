"""ALPS: the mask and the weights that stay, found together by ADMM and refined by conjugate gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from secateur.calibration.statistics import Gram
from secateur.config import Positive, spec
from secateur.methods.base import Selector, Statistics, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

_CHECK = 3  #: ADMM steps between looks at the mask
_LEAST_STEPS = 30  #: before a mask that hardly moves ends the search
_STILL = 3e-4  #: share of the remaining weights whose change counts as none
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  #: share of the remaining weights that changed -> factor of rho


class _Problem(NamedTuple):
    """What all linears of one input share. H is the damped Gram matrix, scaled to a diagonal of ones."""

    scale: Tensor  #: root of H's diagonal before it was scaled, [in]
    hessian: Tensor  #: H, [in, in]
    values: Tensor  #: its eigenvalues, [in]
    vectors: Tensor  #: its eigenvectors, in columns [in, in]


@spec
class ALPS(WeightMethod):
    r"""Minimise ``||X (V - W)^T||^2`` over weights V with k entries (arXiv:2406.07831, algorithms 1 and 2).

    With W and H scaled so that H has a diagonal of ones, ADMM splits V into B with all entries and D with k:

        B = (W H - L + rho D) (H + rho I)^-1;    D = the k largest of B + L / rho;    L = L + rho (B - D)

    ``rho`` grows while the mask of D moves less and less. Then conjugate gradients minimise the error under the mask of
    the k largest of B. The schedule of ``rho`` and the numbers of steps are those of the authors' code.
    """

    source = "arXiv:2406.07831"
    needs = (Gram,)
    compare = "linear"
    damping: Annotated[float, Field(gt=0)] = 0.01
    rho: Annotated[float, Field(gt=0)] = 0.1
    steps: Positive = 300
    refinement: Annotated[int, Field(ge=0)] = 10

    def prepare(self, stats: Statistics) -> _Problem:
        import torch

        gram = stats[Gram].double()
        size = gram.diagonal().mean()
        gram = gram / torch.where(size > 0, size, 1.0)
        gram.diagonal().add_(self.damping if size > 0 else 1.0)
        scale = gram.diagonal().sqrt()
        hessian = gram / scale / scale[:, None]
        values, vectors = torch.linalg.eigh(hessian)
        dtype = stats[Gram].dtype
        return _Problem(scale.to(dtype), hessian.to(dtype), values.clamp_min(0).to(dtype), vectors.to(dtype))

    def score(self, weight: Tensor, stats: _Problem) -> Tensor:
        return (weight * stats.scale).square()

    def prune(self, weight: Tensor, stats: _Problem, select: Selector) -> tuple[Tensor, Tensor]:
        dense = weight * stats.scale
        mask = select(dense.square())
        if mask.all():  # nothing goes, so nothing has to make up for it
            return weight.clone(), mask
        weight, mask = self._split(dense, mask, stats, select)
        return self._refine(dense, weight, mask, stats).div_(stats.scale), mask

    def _split(self, dense: Tensor, mask: Tensor, problem: _Problem, select: Selector) -> tuple[Tensor, Tensor]:
        """Find weights and their mask by ADMM, from the scaled weights and the mask of the largest; all [out, in]."""
        import torch

        target, rho, has_grown = dense @ problem.hessian, self.rho, False
        free, multiplier = dense, torch.zeros_like(dense)
        last, start = mask, dense.masked_fill(~mask, 0)
        sparse = start
        for step in range(1, self.steps + 1):
            free = ((target - multiplier + rho * sparse) @ problem.vectors / (problem.values + rho)) @ problem.vectors.T
            sum_ = free + multiplier / rho
            mask = select(sum_.square())
            sparse = sum_.masked_fill(~mask, 0)
            multiplier = multiplier + rho * (free - sparse)
            if step % _CHECK:
                continue
            change = int((mask != last).count_nonzero()) / max(1, int(mask.count_nonzero()))
            last = mask
            if (has_grown and not change) or (step >= _LEAST_STEPS and change < _STILL):
                break
            if change > _GROWTH[1][0] or has_grown:
                has_grown = True
                rho = min(1e6, rho * next(factor for least, factor in _GROWTH if change > least))
                continue
            rho /= 5  # too stiff from the start: again from the dense weights where the mask moved at all
            if change:
                free, multiplier = dense, torch.zeros_like(dense)
                sparse = start
        mask = select(free.square())
        return free.masked_fill(~mask, 0), mask

    def _refine(self, dense: Tensor, weight: Tensor, mask: Tensor, problem: _Problem) -> Tensor:
        """Minimise the error of each row under its mask by conjugate gradients, from ``weight``."""
        import torch

        least = torch.finfo(dense.dtype).tiny
        residual = ((dense - weight) @ problem.hessian).masked_fill_(~mask, 0)
        direction, power = residual, residual.square().sum(dim=1, keepdim=True)
        for _ in range(self.refinement):
            image = direction @ problem.hessian
            step = power / (direction * image).sum(dim=1, keepdim=True).clamp_min(least)
            weight = weight + step * direction
            residual = (residual - step * image).masked_fill_(~mask, 0)
            last, power = power, residual.square().sum(dim=1, keepdim=True)
            direction = residual + power / last.clamp_min(least) * direction
        return weight
