"""The recipe of a training run: optimiser, schedule, batch (arXiv:2606.14150, scaled by the caller)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from secateur.config import RUNTIME, Count, Fraction, IdentityKey, Positive, Proportion, spec
from secateur.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn, optim

__all__ = [
    "ENOUGH_STEPS",
    "FEW_STEPS",
    "Distill",
    "InitSpec",
    "Recipe",
    "few_steps",
    "learning_rate",
    "make_optimizer",
    "set_rate",
]

FEW_STEPS = 50  #: optimiser steps below which a run is warned of
ENOUGH_STEPS = 200  #: optimiser steps that the warning aims at
_SHORT_WINDOW = 64  #: tokens in the shortest window that an error offers

Seed = Annotated[int, Field(ge=0, lt=2**62)]
Scale = Annotated[float, Field(gt=0)]


@spec
class InitSpec:
    """The distribution of fresh weights; norms that scale by one and biases of zero are the same for all kinds.

    ``fan-in``: a normal of ``1 / sqrt(fan_in)`` for linears, queries divided by ``sqrt(head_dim)`` besides, as MaxText
    does in the study of arXiv:2606.14150. Embeddings, and a head tied to them, are a normal of ``std``.
    """

    kind: Literal["truncated-normal", "fan-in"] = "truncated-normal"
    std: Scale = 0.02  #: of the normal before its truncation at two deviations; for ``fan-in``, of embeddings


def _as_init(value: Any) -> Any:
    """Let a file give the kind alone; a number, as in identities, is the default kind's ``std``."""
    if isinstance(value, str):
        return {"kind": value}
    return {"std": value} if isinstance(value, float | int) else value


def _as_decay(value: Any) -> Any:
    """Check the key ``decay``, which also takes the number that ``decay_share`` has had as its name."""
    if value in ("matrices", "all") or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(f"{value!r} is not known{did_you_mean(str(value), ('matrices', 'all'))}")


def _init_identity(init: InitSpec) -> Any:
    return init.std if init.kind == "truncated-normal" else init


@spec
class Recipe:
    """How every model of a study is trained."""

    sequence: Annotated[int, Field(ge=2)] = 8192  #: tokens in a window, the first of which is context only
    tokens_per_step: Count = 4_194_304
    peak_rate: Annotated[float, Field(gt=0)] = 3e-4
    #: after warm-up: a cosine; the peak, then a linear decay (wsd); the peak alone; or a linear decay alone
    schedule: Literal["cosine", "wsd", "constant", "linear"] = "cosine"
    decay_share: Annotated[Fraction, IdentityKey("decay")] = 0.2  #: share of the steps with a falling rate, for wsd
    final_share: Proportion = 0.1  #: the last step's rate, as a share of the peak
    warmup: Annotated[Proportion, Field(lt=1)] = 0.05  #: share of the steps with a rising rate
    #: the rate of the first step of n with a rising rate: a share 1/n of the peak, or zero
    warmup_from: Annotated[Literal["step", "zero"], IdentityKey(omit="step")] = "step"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    #: the parameters with weight decay: matrices, embeddings included, or norms and biases as well
    decay: Annotated[str | float, BeforeValidator(_as_decay), IdentityKey("decay_of", omit="matrices")] = "matrices"
    clip: Scale = 1.0  #: largest norm of the gradient
    #: when a sparse model's gradients are masked: before the norm is taken, or after clipping
    mask: Annotated[Literal["before-clip", "after-clip"], IdentityKey(omit="before-clip")] = "before-clip"
    init: Annotated[InitSpec, BeforeValidator(_as_init), IdentityKey("init_std", value=_init_identity)] = InitSpec()
    #: an older spelling of ``init.std``, moved there
    init_std: Annotated[Scale | None, RUNTIME] = None
    seed: Seed = 0  #: for drawing fresh weights
    data_seed: Seed = 0  #: for the order of a slice's windows
    attention: Literal["window", "document"] = "window"  #: attend within the window, or within each document
    micro_batch: Annotated[Positive, RUNTIME] = 8  #: windows at once; memory, not the result beyond rounding

    def __post_init__(self) -> None:
        if isinstance(self.decay, float):
            object.__setattr__(self, "decay_share", self.decay)
            object.__setattr__(self, "decay", "matrices")
        if self.init_std is not None:
            object.__setattr__(self, "init", dataclasses.replace(self.init, std=self.init_std))
            object.__setattr__(self, "init_std", None)
        if self.tokens_per_step % self.sequence:
            size = math.ceil(self.tokens_per_step / self.sequence) * self.sequence
            shorter = math.gcd(self.tokens_per_step, self.sequence)
            remedy = f"set it to {size}" + (f", or sequence to {shorter}" if shorter >= _SHORT_WINDOW else "")
            default = ", the default" if self.sequence == type(self).sequence else ""
            raise UserError(
                f"recipe.tokens_per_step: {self.tokens_per_step} is no multiple of recipe.sequence "
                f"{self.sequence}{default}; {remedy}"
            )

    def steps(self, tokens: int) -> int:
        """Number of optimiser steps for ``tokens``; the last step may be smaller."""
        return math.ceil(tokens / self.tokens_per_step)


def few_steps(tokens: int, tokens_per_step: int, sequence: int) -> tuple[int, int, int] | None:
    """Say how many optimiser steps a budget gives, where they are fewer than :data:`FEW_STEPS`.

    Returns:
        The steps; the ``tokens_per_step`` that gives at least :data:`ENOUGH_STEPS`, or one window if even that gives
        fewer; and the steps with it. None where the budget gives enough steps.
    """
    steps = math.ceil(tokens / tokens_per_step)
    size = max(1, tokens // ENOUGH_STEPS // sequence) * sequence
    if steps >= FEW_STEPS:
        return None
    return steps, size, math.ceil(tokens / size)


@spec
class Distill:
    """How a student is taught."""

    kind: Literal["distill"] = "distill"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  #: both distributions are softened by it
    alpha: Annotated[Proportion, Field(gt=0)] = 1.0  #: share of the divergence; the rest is the language-model loss
    top_k: Positive | None = None  #: the teacher's likeliest ids that count apart; None for all


def set_rate(optimizer: optim.Optimizer, rate: float, recipe: Recipe) -> None:
    """Set the schedule's rate in all groups; a group with its own ``peak_rate`` gets the same share of that peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * rate / recipe.peak_rate if "peak_rate" in group else rate


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of ``step`` of ``steps``: linear warm-up, then down to ``final_share`` of the peak at the last step.

    A cosine falls from the end of the warm-up on. ``wsd`` (arXiv:2404.06395) stays at the peak and falls linearly over
    the last ``decay_share`` of the steps; ``constant`` and ``linear`` are its two parts, as runs of their own, so that
    runs of several lengths can share the first.
    """
    warm = math.ceil(recipe.warmup * steps)
    if step < warm:
        return recipe.peak_rate * (step + (recipe.warmup_from == "step")) / warm
    if recipe.schedule == "constant":
        height = 1.0
    elif recipe.schedule == "cosine":
        progress = (step - warm) / max(1, steps - 1 - warm)
        height = (1 + math.cos(math.pi * progress)) / 2
    else:
        share = recipe.decay_share if recipe.schedule == "wsd" else 1.0
        falling = max(1, min(math.ceil(share * steps), steps - warm))
        height = min(1.0, (steps - 1 - step) / falling)
    return recipe.peak_rate * (recipe.final_share + (1 - recipe.final_share) * height)


def make_optimizer(
    weights: Iterable[nn.Parameter], recipe: Recipe, extra_groups: Sequence[Mapping[str, Any]] = ()
) -> optim.AdamW:
    """AdamW with weight decay on matrices, or on all parameters.

    Args:
        weights: parameters that follow the recipe's schedule.
        extra_groups: optimizer groups with a ``peak_rate`` each and without decay.
    """
    from torch import optim

    parameters = list(weights)
    vectors_decay = recipe.weight_decay if recipe.decay == "all" else 0.0
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": vectors_decay},
    ]
    betas = (recipe.beta1, recipe.beta2)
    groups = [group for group in groups if group["params"]]
    groups += [{"weight_decay": 0.0, "lr": group["peak_rate"], **group} for group in extra_groups]
    return optim.AdamW(groups, lr=recipe.peak_rate, betas=betas, eps=recipe.epsilon, fused=True)
