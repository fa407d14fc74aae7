"""SparseGPT: weights by the error that their removal leaves after the others have made up for it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.calibrate.stats import Gram
from secateur.errors import UserError
from secateur.methods import Selector, Statistics, WeightMethod
from secateur.spec import Positive, spec


@spec
class SparseGPT(WeightMethod):
    r"""``S_ij = W_ij^2 / [U_jj]^2`` with ``U^T U = H^-1`` and ``H = 2 X X^T + damping`` (arXiv:2301.00774, alg. 1).

    Columns are pruned from left to right. The error ``E_:j = W_:j / U_jj`` of a column's pruned weights is spread over
    the columns behind it, ``W_:k -= E_:j U_jk``: at once within a block of columns, in one product behind it. The mask
    is chosen once for each block from the weights as they are by then; for N:M, once for each M columns.
    """

    source = "arXiv:2301.00774"
    needs = (Gram,)
    compare = "linear"
    block: Positive = 128  #: columns in a block
    damping: Annotated[float, Field(gt=0)] = 0.01  #: added to the diagonal of H, as a share of its mean

    def score(self, weight: Tensor, stats: Statistics) -> Tensor:
        return weight.square() / self._factor(2 * stats[Gram]).diagonal().square()

    def prune(self, weight: Tensor, stats: Statistics, select: Selector) -> tuple[Tensor, Tensor]:
        hessian = 2 * stats[Gram]
        factor = self._factor(hessian)
        dead = hessian.diagonal() == 0  # an input that is always zero needs no weight
        columns = weight.masked_fill(dead, 0).T.contiguous()  # transposed, so that a column lies in one piece
        kept = torch.ones_like(columns, dtype=torch.bool)
        span = select.span or self.block
        width = max(self.block // span, 1) * span
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            errors = torch.zeros_like(columns[start:stop])
            for j in range(start, stop):
                if (j - start) % span == 0:
                    chosen = slice(j, min(j + span, stop))
                    kept[chosen] = select(columns[chosen].T.square() / factor.diagonal()[chosen].square()).T
                errors[j - start] = columns[j].masked_fill(kept[j], 0) / factor[j, j]
                columns[j:stop].addr_(factor[j, j:stop], errors[j - start], alpha=-1)
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return columns.masked_fill(~kept, 0).T.contiguous(), kept.T.contiguous()

    def _factor(self, hessian: Tensor) -> Tensor:
        """The upper Cholesky factor U of the damped Hessian's inverse, ``H^-1 = U^T U``: [in, in].

        It is that of the Hessian divided by its mean diagonal, which changes no score's rank and no update.
        """
        mean = hessian.diagonal().mean()
        scaled = hessian / torch.where(mean > 0, mean, 1.0)
        dead = (hessian.diagonal() == 0).to(scaled)
        for power in range(8):  # float32 may still see a singular matrix: damp more until it does not
            damped = scaled + torch.diag(dead + self.damping * 10**power)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and torch.isfinite(factor).all():
                    return factor
        raise UserError(f"--option damping={self.damping:g}: too small to invert the Hessian of this calibration text")
