"""SparseGPT: remove the weights whose removal leaves the least error after the others are updated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from secateur.calibration.statistics import Gram
from secateur.config import Positive, spec
from secateur.errors import UserError
from secateur.methods.base import Selector, Statistics, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class SparseGPT(WeightMethod):
    r"""``S_ij = W_ij^2 R_jj^2`` with ``R R^T = H``, R upper triangular, and ``H = 2 X X^T + damping``.

    This is algorithm 1 of arXiv:2301.00774, whose factor of the inverse, ``U^T U = H^-1``, is ``U = R^-1``. A change D
    of the weights leaves the error ``||D X||^2 = ||D R||^2``, and column j of ``D R`` depends only on the columns up
    to j. So columns are processed from left to right: a pruned weight has ``D_ij = -W_ij``, and a weight that stays
    makes its own term zero, ``D_ij = -(sum over k < j of D_ik R_kj) / R_jj``. The paper's updates ``W_:k -= E_:j U_jk``
    add up to the same, but need an inverse. The mask is chosen once for each block of columns, from the weights as
    updated for all columns before it; for N:M, once for each M columns.
    """

    source = "arXiv:2301.00774"
    needs = (Gram,)
    compare = "linear"
    block: Positive = 128
    damping: Annotated[float, Field(gt=0)] = 0.01

    def group_size(self, out: int, width: int) -> int:
        return out * min(self.block, width)

    def prepare(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Return the factor R, flipped as :func:`_columns` reads it, and a mask of inputs that are always zero."""
        return self._factor(stats[Gram]), stats[Gram].diagonal() == 0

    def score(self, weight: Tensor, stats: tuple[Tensor, Tensor]) -> Tensor:
        return (weight * stats[0].diagonal().flip(0)).square()

    def prune(self, weight: Tensor, stats: tuple[Tensor, Tensor], select: Selector) -> tuple[Tensor, Tensor]:
        import torch

        factor, dead = stats
        change, mask = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
        span = select.span or self.block
        width = max(self.block // span, 1) * span
        for start in range(0, weight.shape[1], width):
            block = slice(start, min(start + width, weight.shape[1]))
            root = _columns(factor, block)
            columns = weight[:, block].masked_fill(dead[block], 0)  # an input that is always zero needs no weight
            error = change[:, :start] @ root[:start]
            change[:, block], mask[:, block] = _prune_columns(columns, error, root[start:], span, select, start)
        return change.add_(weight).masked_fill_(dead, 0).masked_fill_(~mask, 0), mask

    def _factor(self, gram: Tensor) -> Tensor:
        """R with rows and columns reversed: the lower Cholesky factor of H reversed likewise, [in, in].

        H is divided by its mean diagonal, which changes neither the order of scores nor the updates.
        """
        import torch

        size = gram.diagonal()
        mean = size.mean()
        for power in range(8):  # more damping until the matrix is regular in float32
            factor = gram.flip(0, 1).div_(torch.where(mean > 0, mean, 1.0))
            factor.diagonal().add_((size == 0).to(gram).flip(0) + self.damping * 10**power)
            least = 8 * torch.finfo(gram.dtype).eps * factor.diagonal()  # a smaller pivot is rounding error
            failed = gram.new_empty((), dtype=torch.int32)
            torch.linalg.cholesky_ex(factor.T, out=(factor.T, failed))  # in place, since the matrix is large
            if not failed and (factor.diagonal().square() > least).all():
                return factor.T
        raise UserError(f"`options`: damping={self.damping:g} cannot invert the Hessian of this text; raise it")


def _columns(factor: Tensor, block: slice) -> Tensor:
    """Some columns of R, without the zeros below the diagonal: [stop, columns]."""
    size = len(factor)
    return factor[size - block.stop :, size - block.stop : size - block.start].flip(0, 1)


def _prune_columns(
    columns: Tensor, error: Tensor, root: Tensor, span: int, select: Selector, start: int
) -> tuple[Tensor, Tensor]:
    """Prune a block of columns.

    Args:
        columns: the weights [out, columns].
        error: the contribution of the columns before the block to ``D R``, [out, columns].
        root: ``R`` within the block.
        span: number of columns whose mask is chosen at once.
        start: number of the block's first column.

    Returns:
        The change of the weights, and the mask, both [out, columns].
    """
    import torch

    columns, error = columns.T.contiguous(), error.T.contiguous()  # contiguous columns
    change, mask = -columns, torch.ones_like(columns, dtype=torch.bool)
    for first in range(0, len(columns), span):
        group = slice(first, first + span)
        error[group].addmm_(root[:first, group].T, change[:first])
        weight = columns[group] - torch.linalg.solve_triangular(root[group, group].T, error[group], upper=False)
        scores = (weight.T * root.diagonal()[group]).square()
        mask[group] = select(scores, slice(start + first, start + first + span)).T
        for j in range(first, min(first + span, len(columns))):
            error[j].addmv_(change[first:j].T, root[first:j, j])
            change[j] = torch.where(mask[j], error[j] / -root[j, j], change[j])
    return change.T, mask.T
