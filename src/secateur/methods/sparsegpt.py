"""SparseGPT: weights by the error that their removal leaves after the others have made up for it."""

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
    of the weights leaves the error ``||D X||^2 = ||D R||^2``, and column j of ``D R`` rests on the columns up to j
    alone. So they are settled from left to right: a pruned weight has ``D_ij = -W_ij``, and a kept one makes its own
    term zero, ``D_ij = -(sum over k < j of D_ik R_kj) / R_jj``. That is what the paper's updates ``W_:k -= E_:j U_jk``
    add up to, with no inverse. The mask is chosen once for each block of columns, from the weights as they are when
    all before it are settled; for N:M, once for each M columns.
    """

    source = "arXiv:2301.00774"
    needs = (Gram,)
    compare = "linear"
    block: Positive = 128  #: columns in a block
    damping: Annotated[float, Field(gt=0)] = 0.01  #: added to the diagonal of H, as a share of its mean

    def group_size(self, out: int, width: int) -> int:
        return out * min(self.block, width)

    def prepare(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """The factor R, back to front as :func:`_columns` reads it, and which inputs are always zero."""
        return self._factor(stats[Gram]), stats[Gram].diagonal() == 0

    def score(self, weight: Tensor, stats: tuple[Tensor, Tensor]) -> Tensor:
        return (weight * stats[0].diagonal().flip(0)).square()

    def prune(self, weight: Tensor, stats: tuple[Tensor, Tensor], select: Selector) -> tuple[Tensor, Tensor]:
        import torch

        factor, dead = stats
        change, kept = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
        span = select.span or self.block
        width = max(self.block // span, 1) * span
        for start in range(0, weight.shape[1], width):
            block = slice(start, min(start + width, weight.shape[1]))
            root = _columns(factor, block)
            columns = weight[:, block].masked_fill(dead[block], 0)  # an input that is always zero needs no weight
            error = change[:, :start] @ root[:start]
            change[:, block], kept[:, block] = _settle(columns, error, root[start:], span, select)
        return change.add_(weight).masked_fill_(dead, 0).masked_fill_(~kept, 0), kept

    def _factor(self, gram: Tensor) -> Tensor:
        """R, back to front: the lower Cholesky factor of H back to front, [in, in].

        It is that of H divided by its mean diagonal, which changes no score's rank and no update.
        """
        import torch

        size = gram.diagonal()
        mean = size.mean()
        for power in range(8):  # float32 may see a singular matrix: damp more until it does not
            factor = gram.flip(0, 1).div_(torch.where(mean > 0, mean, 1.0))
            factor.diagonal().add_((size == 0).to(gram).flip(0) + self.damping * 10**power)
            least = 8 * torch.finfo(gram.dtype).eps * factor.diagonal()  # below, a pivot is made of rounding
            failed = gram.new_empty((), dtype=torch.int32)
            torch.linalg.cholesky_ex(factor.T, out=(factor.T, failed))  # in its place: such a matrix is large
            if not failed and (factor.diagonal().square() > least).all():
                return factor.T
        raise UserError(f"`options`: damping={self.damping:g} cannot invert the Hessian of this text; raise it")


def _columns(factor: Tensor, block: slice) -> Tensor:
    """Some columns of R, as far down as they are not zero: [stop, columns]."""
    size = len(factor)
    return factor[size - block.stop :, size - block.stop : size - block.start].flip(0, 1)


def _settle(columns: Tensor, error: Tensor, root: Tensor, span: int, select: Selector) -> tuple[Tensor, Tensor]:
    """Prune a block of columns.

    Args:
        columns: their weights [out, columns].
        error: columns of ``D R`` as far as the settled columns before the block make them up, [out, columns].
        root: ``R`` within the block.
        span: columns whose mask is chosen at once.
        select: chooses it.

    Returns:
        The change of the weights, and what is kept.
    """
    import torch

    columns, error = columns.T.contiguous(), error.T.contiguous()  # a column in one piece
    change, kept = -columns, torch.ones_like(columns, dtype=torch.bool)
    for first in range(0, len(columns), span):
        now = slice(first, first + span)
        error[now].addmm_(root[:first, now].T, change[:first])
        weight = columns[now] - torch.linalg.solve_triangular(root[now, now].T, error[now], upper=False)
        kept[now] = select((weight.T * root.diagonal()[now]).square()).T
        for j in range(first, min(first + span, len(columns))):
            error[j].addmv_(change[first:j].T, root[first:j, j])
            change[j] = torch.where(kept[j], error[j] / -root[j, j], change[j])
    return change.T, kept.T
