"""The recipe of a training run: optimiser, schedule, batch (arXiv:2606.14150, scaled by the caller)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from secateur.config import RUNTIME, Count, Fraction, Positive, spec
from secateur.errors import UserError

if TYPE_CHECKING:
    from torch import nn, optim

__all__ = ["Distill", "Recipe", "learning_rate", "make_optimizer", "set_rate"]


Seed = Annotated[int, Field(ge=0, lt=2**62)]


@spec
class Recipe:
    """How every model of a study is trained."""

    sequence: Annotated[int, Field(ge=2)] = 8192  #: tokens in a window, the first of which is context only
    tokens_per_step: Count = 4_194_304
    peak_rate: Annotated[float, Field(gt=0)] = 3e-4
    #: after warm-up: a cosine; the peak, then a linear decay (wsd); the peak alone; or a linear decay alone
    schedule: Literal["cosine", "wsd", "constant", "linear"] = "cosine"
    decay: Fraction = 0.2  #: share of the steps with a falling rate, for wsd
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.1  #: the last step's rate, as a share of the peak
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  #: share of the steps with a rising rate
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  #: on matrices only
    clip: Annotated[float, Field(gt=0)] = 1.0  #: largest norm of the gradient
    init_std: Annotated[float, Field(gt=0)] = 0.02  #: of the truncated normal that fresh weights are drawn from
    seed: Seed = 0  #: for drawing fresh weights
    data_seed: Seed = 0  #: for the order of a slice's windows
    attention: Literal["window", "document"] = "window"  #: attend within the window, or within each document
    micro_batch: Annotated[Positive, RUNTIME] = 8  #: windows at once; memory, not the result beyond rounding

    def __post_init__(self) -> None:
        if self.tokens_per_step % self.sequence:
            raise UserError(
                f"recipe.tokens_per_step: {self.tokens_per_step} is no multiple of recipe.sequence {self.sequence}"
            )

    def steps(self, tokens: int) -> int:
        """Number of optimiser steps for ``tokens``; the last step may be smaller."""
        return math.ceil(tokens / self.tokens_per_step)


@spec
class Distill:
    """How a student is taught."""

    kind: Literal["distill"] = "distill"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  #: both distributions are softened by it
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0  #: share of the divergence; the rest is the language-model loss
    top_k: Positive | None = None  #: the teacher's likeliest ids that count apart; None for all


def set_rate(optimizer: optim.Optimizer, rate: float, recipe: Recipe) -> None:
    """Set the schedule's rate in all groups; a group with its own ``peak_rate`` gets the same share of that peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * rate / recipe.peak_rate if "peak_rate" in group else rate


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of ``step`` of ``steps``: linear warm-up, then down to ``final_share`` of the peak at the last step.

    A cosine falls from the end of the warm-up on. ``wsd`` (arXiv:2404.06395) stays at the peak and falls linearly over
    the last ``decay`` of the steps; ``constant`` and ``linear`` are its two parts, as runs of their own, so that runs
    of several lengths can share the first.
    """
    warm = math.ceil(recipe.warmup * steps)
    if step < warm:
        return recipe.peak_rate * (step + 1) / warm
    if recipe.schedule == "constant":
        height = 1.0
    elif recipe.schedule == "cosine":
        progress = (step - warm) / max(1, steps - 1 - warm)
        height = (1 + math.cos(math.pi * progress)) / 2
    else:
        share = recipe.decay if recipe.schedule == "wsd" else 1.0
        falling = max(1, min(math.ceil(share * steps), steps - warm))
        height = min(1.0, (steps - 1 - step) / falling)
    return recipe.peak_rate * (recipe.final_share + (1 - recipe.final_share) * height)


def make_optimizer(
    weights: Iterable[nn.Parameter], recipe: Recipe, extra_groups: Sequence[Mapping[str, Any]] = ()
) -> optim.AdamW:
    """AdamW with weight decay on matrices only: norms and biases have none.

    Args:
        weights: parameters that follow the recipe's schedule.
        extra_groups: optimizer groups with a ``peak_rate`` each and without decay.
    """
    from torch import optim

    parameters = list(weights)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    groups = [group for group in groups if group["params"]]
    groups += [{"weight_decay": 0.0, "lr": group["peak_rate"], **group} for group in extra_groups]
    return optim.AdamW(groups, lr=recipe.peak_rate, betas=betas, eps=recipe.epsilon, fused=True)
