"""AlphaPruning: blocks whose weights have heavier-tailed spectra lose fewer weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EPSILON", "alpha_ratios", "hill_exponent"]

EPSILON = 0.3  #: ratios before the common factor lie within 1 - epsilon and 1 + epsilon


def hill_exponent(weight: Tensor) -> float:
    """``alpha = 1 + n / sum_{i in tail} ln(e_i / e_min)`` of the eigenvalues e of ``W^T W``.

    The tail is the upper half of the spectrum: the rule ``xmin_mid`` of the authors' code, which has two more.
    """
    import torch

    eigenvalues = torch.linalg.svdvals(weight.float()).double().square().sort().values
    tail = eigenvalues[len(eigenvalues) // 2 :].clamp_min(torch.finfo(torch.float64).tiny).log()
    excess = float((tail - tail[0]).sum())
    return 1 + len(tail) / max(excess, 1e-12)  # equal eigenvalues have no tail


def alpha_ratios(exponents: Sequence[float]) -> list[float]:
    """The ratio of each block up to a factor: its mean exponent, mapped linearly to [1 - epsilon, 1 + epsilon].

    A heavy tail has a small exponent. All ratios are then multiplied by the factor for which their mean, weighted by
    parameters, is the requested one (arXiv:2410.10912).
    """
    least, most = min(exponents), max(exponents)
    spread = most - least
    return [1 - EPSILON + 2 * EPSILON * (a - least) / spread if spread else 1.0 for a in exponents]
