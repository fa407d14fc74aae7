"""Sheared LLaMA: gates on layers, channels and heads are learned, and their number is driven to the shape asked for.

A gate ``z`` is drawn from a hard concrete distribution with a parameter ``a`` (``log alpha``): with ``u`` uniform in
(0, 1),  ``s = sigmoid((log u - log(1 - u) + a) / beta)``  and  ``z = clamp(s (zeta - gamma) + gamma, 0, 1)``, which is
exactly zero with a probability of its own. ``P(z > 0) = sigmoid(a - beta log(-gamma / zeta))``.

For each constraint, such as that on the FFN channels of a layer, ``d`` is the mean of ``P(z > 0)`` over its gates less
the share that is to stay, and ``lambda d + phi d^2`` is added to the loss. Weights and gates go down its gradient,
``lambda`` and ``phi`` up, until ``d`` is zero; up from the step on in which the target has come down to the shape, or
they would add up that the gates lag behind it, and drive them far beyond.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from secateur.config import Positive, spec
from secateur.methods.base import LearnedMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sheared"]


@spec
class Sheared(LearnedMethod):
    """Learned gates with Lagrange multipliers (arXiv:2310.06694, section 2.1; gates: arXiv:1712.01312)."""

    source: ClassVar[str] = "arXiv:2310.06694, equations 1-4; hard concrete gates: arXiv:1712.01312"
    BETA: ClassVar[float] = 2 / 3
    GAMMA: ClassVar[float] = -0.1
    ZETA: ClassVar[float] = 1.1
    START: ClassVar[float] = 4.0  #: of ``a``: all but one gate in ten are one at first, and all but a hundredth open
    LIMIT: ClassVar[float] = math.log(100)

    steps: Positive = 320  #: of training; the source takes 3200
    windows: Positive = 16  #: in a step
    rate: Annotated[float, Field(ge=0)] = 1e-4  #: peak learning rate of the weights; 0 leaves them as they are
    mask_rate: Annotated[float, Field(gt=0)] = 1.0  #: peak learning rate of the gates
    multiplier_rate: Annotated[float, Field(gt=0)] = 60.0  #: of lambda and phi, in each step times ``d`` and ``d^2``
    phi: Annotated[float, Field(ge=0)] = 200.0  #: at first; from zero, as in the source, few steps do not settle
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2  #: share of the steps in which the target comes down to the shape
    seed: Annotated[int, Field(ge=0)] = 42  #: of the gates' noise and of the order of the windows

    def sample_gates(self, a: Tensor, u: Tensor) -> Tensor:
        """Gates for uniform noise ``u`` in (0, 1), of the same size as ``a``."""
        return self._stretched(((u.logit() + a) / self.BETA).sigmoid())

    def eval_gates(self, a: Tensor) -> Tensor:
        """The gates without noise."""
        return self._stretched(a.sigmoid())

    def open_probability(self, a: Tensor) -> Tensor:
        """The probability that a gate is not zero."""
        return (a - self.BETA * math.log(-self.GAMMA / self.ZETA)).sigmoid()

    def penalty(self, d: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The Lagrangian's terms, summed over the constraints: all of size [constraints]."""
        return (linear * d + quadratic * d.square()).sum()

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)
