"""Sheared LLaMA: learn gates on layers, channels and heads; a penalty drives their number to the target.

A gate ``z`` is sampled from a hard concrete distribution with a parameter ``a`` (``log alpha``): with ``u`` uniform in
(0, 1),  ``s = sigmoid((log u - log(1 - u) + a) / beta)``  and  ``z = clamp(s (zeta - gamma) + gamma, 0, 1)``, which is
exactly zero with positive probability. ``P(z > 0) = sigmoid(a - beta log(-gamma / zeta))``.

For each constraint, e.g. on the FFN channels of a layer, ``d`` is the mean of ``P(z > 0)`` over its gates minus the
target share, and ``lambda d + phi d^2`` is added to the loss. Weights and gates descend its gradient; ``lambda`` and
``phi`` ascend it, but only once the target has fallen to the requested shape. Earlier they would accumulate the lag of
the gates behind the target and overshoot.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from secateur.config import Positive, Proportion, spec
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
    START: ClassVar[float] = 4.0  #: initial ``a``: nine gates in ten are one, and 99% are open
    LIMIT: ClassVar[float] = math.log(100)

    steps: Positive = 320  #: the paper takes 3200
    windows: Positive = 16
    rate: Annotated[float, Field(ge=0)] = 1e-4
    mask_rate: Annotated[float, Field(gt=0)] = 1.0
    multiplier_rate: Annotated[float, Field(gt=0)] = (
        60.0  #: a step adds this times ``d`` to lambda and times ``d^2`` to phi
    )
    phi: Annotated[float, Field(ge=0)] = 200.0  #: starting from zero, as the paper does, needs more steps
    warmup: Annotated[Proportion, Field(lt=1)] = 0.2
    seed: Annotated[int, Field(ge=0)] = 42

    def sample_gates(self, a: Tensor, u: Tensor) -> Tensor:
        return self._stretch(((u.logit() + a) / self.BETA).sigmoid())

    def eval_gates(self, a: Tensor) -> Tensor:
        return self._stretch(a.sigmoid())

    def open_probability(self, a: Tensor) -> Tensor:
        return (a - self.BETA * math.log(-self.GAMMA / self.ZETA)).sigmoid()

    def penalty(self, d: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The terms of the Lagrangian, summed over the constraints."""
        return (linear * d + quadratic * d.square()).sum()

    def _stretch(self, s: Tensor) -> Tensor:
        return (s * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)
