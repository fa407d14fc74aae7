"""Frozen weights in four bits (NF4 of QLoRA, arXiv:2305.14314), through bitsandbytes.

A weight [out, in] becomes bytes [out, 9 in / 16]: in each row two codes a byte, then the float32 scales of its blocks
of 64 weights. One tensor holds both, so that sharding by rows keeps them together and no mixed precision rounds the
scales. The scales are not quantised again, as the paper does: 4.5 bits a weight. NF4 has an exact zero.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.training.adapter import FOUR_BIT_BLOCK

__all__ = ["FourBitLinear", "is_packed", "pack", "plain_size", "plain_weight"]

_KIND = "nf4"


@functools.cache
def _library() -> Any:
    """The functions of bitsandbytes, without its notices of kernels that are not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional  # imported late: an optional dependency

    return functional


class FourBitLinear(nn.Linear):
    """A frozen linear whose weight is packed; it is unpacked forwards and again backwards."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.bias = base.bias
        size = base.out_features, base.in_features * 9 // 16
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` times the transposed weight, plus the bias."""
        return _FrozenProduct.apply(input, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """``x @ W.T + b`` for a packed ``W`` without a gradient; only the bytes are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        return linear(x, plain_weight(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        (packed,) = ctx.saved_tensors
        return gradient @ plain_weight(packed, gradient.dtype), None, None


def is_packed(tensor: Tensor) -> bool:
    """Whether a parameter's tensor is a packed weight."""
    return tensor.dtype == torch.uint8


def plain_size(tensor: Tensor) -> torch.Size:
    """The size of a weight, packed or not."""
    if not is_packed(tensor):
        return tensor.shape
    rows, columns = tensor.shape
    return torch.Size((rows, columns * 16 // 9))


def pack(weight: Tensor) -> Tensor:
    """Quantise a weight [out, in], ``in`` a multiple of 64, to bytes [out, 9 in / 16]."""
    codes, state = _library().quantize_4bit(weight.float().contiguous(), blocksize=FOUR_BIT_BLOCK, quant_type=_KIND)
    rows = weight.shape[0]
    return torch.cat((codes.view(rows, -1), state.absmax.view(torch.uint8).view(rows, -1)), dim=1)


def plain_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [out, in] in ``dtype``, unpacked if it is packed."""
    if not is_packed(weight):
        return weight
    library, (rows, columns) = _library(), plain_size(weight)
    scales = weight[:, columns // 2 :].contiguous().view(torch.float32).flatten()
    state = library.QuantState(
        scales,
        shape=torch.Size((rows, columns)),
        code=library.get_4bit_type(_KIND, device=weight.device, blocksize=FOUR_BIT_BLOCK),
        blocksize=FOUR_BIT_BLOCK,
        quant_type=_KIND,
        dtype=dtype,
    )
    return library.dequantize_4bit(weight[:, : columns // 2].reshape(-1, 1), state)
