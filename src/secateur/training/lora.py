"""Adapters on a model in training, through PEFT: put in, masked where the model is sparse, merged, and saved.

PEFT wraps a linear: ``q_proj`` becomes a module with ``base_layer`` (frozen), ``lora_A`` and ``lora_B``. The rest of
the training code sees the names of the model as it was (:func:`plain_name`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.model.shapes import Shape
from secateur.training.adapter import Adapter, adapted_linears, four_bit_linears, plain_name
from secateur.training.four_bit import FourBitLinear, pack, plain_weight
from secateur.training.init import generator_of
from secateur.training.origin import Start
from secateur.training.parallel import full_tensor

__all__ = ["MaskedLinear", "add_adapter", "factors", "merge_into", "peft_config"]

_NAME = "default"  #: PEFT's name of the adapter
_MASK = ".lora_mask"


class MaskedLinear(Linear):
    """A linear with the weight ``W + s M * (B A)``."""

    lora_mask: nn.Parameter  #: ``M``, bool [out, in]; a parameter, so that FSDP shards it

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """``x`` times the transposed masked weight, plus the bias."""
        base: Any = self.get_base_layer()
        a, b = self.lora_A[_NAME].weight, self.lora_B[_NAME].weight
        result = _MaskedProduct.apply(x, base.weight, self.lora_mask, a, b, self.scaling[_NAME])
        return result if base.bias is None else result + base.bias


class _MaskedProduct(torch.autograd.Function):
    """``x @ (W + s M * (B A)).T`` for a frozen ``W``; the sum is made again backwards, so that none is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, mask, a, b)
        ctx.scale = scale
        return linear(x, _masked_sum(plain_weight(weight, x.dtype), mask, a, b, scale))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        x, weight, mask, a, b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ _masked_sum(plain_weight(weight, x.dtype), mask, a, b, ctx.scale)
        grad_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        grad_weight.mul_(mask).mul_(ctx.scale)
        return grad_x, None, None, b.T @ grad_weight, grad_weight @ a.T, None


def _masked_sum(weight: Tensor, mask: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``M * (W + s B A)``, which is ``W + s M * (B A)``, since ``W`` is zero outside its mask."""
    return torch.addmm(weight, b, a, alpha=scale).mul_(mask)


def add_adapter(start: Start, adapter: Adapter, *, seed: int) -> Start:
    """Put an adapter into a model without weights, and freeze all else.

    ``A`` is drawn as by the authors' and PEFT's code, uniform within ``1 / sqrt(in)``; ``B`` is zero, so that the model
    begins as it is.

    Args:
        start: its masks are those of the update as well.
        seed: equal seeds give an equal ``A``.

    Returns:
        The same model with the adapter, and a function that has values for its new names as well.

    Raises:
        UserError: if a target matches no linear, or the rank is larger than a side of one.
    """
    model, masks = start.model, start.masks
    shape = Shape.of_config(model.config, where="the model")
    names = adapted_linears(adapter, shape)
    packed = {f"{name}.weight" for name in four_bit_linears(adapter, shape)}
    config = peft_config(adapter, list(names))
    model.requires_grad_(False)
    for name in names:
        (owner, _, leaf), weight = name.rpartition("."), f"{name}.weight"
        with torch.device("meta"):
            base = model.get_submodule(name)
            adapted = _adapt(FourBitLinear(base) if weight in packed else base, config, weight in masks)
        setattr(model.get_submodule(owner), leaf, adapted)
    stored = start.weights

    def value(name: str) -> Tensor:
        if name.endswith(f".lora_A.{_NAME}.weight"):
            size = model.get_parameter(name).shape
            draws = torch.empty(size).uniform_(-1, 1, generator=generator_of(seed, plain_name(name)))
            return draws * size[1] ** -0.5
        if name.endswith(f".lora_B.{_NAME}.weight"):
            return torch.zeros(model.get_parameter(name).shape)
        if name.endswith(_MASK):
            return masks[f"{name.removesuffix(_MASK)}.weight"]
        plain = plain_name(name)
        return pack(stored(plain)) if plain in packed else stored(plain)

    return dataclasses.replace(start, weights=value)


def _adapt(base: Any, config: LoraConfig, masked: bool) -> Linear:
    """PEFT's layer around a linear, with a place for a mask.

    It is made here, not by ``inject_adapter_in_model``, which takes the FFN linears of a mixture for its experts.
    """
    factors: dict[str, Any] = {"r": config.r, "lora_alpha": config.lora_alpha}
    if not masked:
        return Linear(base, _NAME, config=config, **factors)
    layer = MaskedLinear(base, _NAME, config=config, **factors)
    size = base.out_features, base.in_features
    layer.lora_mask = nn.Parameter(torch.empty(size, dtype=torch.bool), requires_grad=False)
    return layer


def merge_into(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """A function from a weight's name and its whole frozen value to the value with the adapter; others stay.

    All processes call it together. Of a model without an adapter it changes nothing.
    """
    modules = {f"{name}.weight": module for name, module in _adapted(model)}

    def merged(name: str, whole: Tensor) -> Tensor:
        if name not in modules:
            return whole
        module, whole = modules[name], plain_weight(whole, torch.float32)
        a, b = _factors(module)
        mask = getattr(module, "lora_mask", None)
        if mask is None:
            return torch.addmm(whole, b, a, alpha=module.scaling[_NAME])
        return _masked_sum(whole, full_tensor(mask), a, b, module.scaling[_NAME]).add_(0.0)  # turns -0.0 into 0.0

    return merged


def peft_config(adapter: Adapter, names: list[str]) -> LoraConfig:
    """PEFT's description of an adapter on the linears ``names``."""
    assert adapter.alpha is not None
    alpha: Any = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha  # PEFT's type is int
    return LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each adapted linear."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))


def factors(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Name of each adapted linear and its ``A`` and ``B``, whole; all processes together."""
    return ((name, _factors(module)) for name, module in _adapted(model))


def _factors(module: Any) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of an adapted linear, whole; all processes together."""
    return full_tensor(module.lora_A[_NAME].weight.detach()), full_tensor(module.lora_B[_NAME].weight.detach())
