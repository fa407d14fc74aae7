"""Shortened LLaMA: layers by the first-order effect of their weights on the loss, or by the perplexity without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.calibration.statistics import MeanGradient
from secateur.config import spec
from secateur.methods.base import LayerMethod, Place, RemovalMethod

if TYPE_CHECKING:
    from torch import Tensor


@spec
class ShortenedLlama(LayerMethod):
    r"""Taylor: ``S = sum_W sum_ij |dL/dW_ij * W_ij|`` over the weights W of the block (arXiv:2402.02834, 3.1)."""

    source = "arXiv:2402.02834"
    needs = (MeanGradient,)
    keep_first: int = 0  #: Taylor+ in the paper has 4
    keep_last: int = 0  #: Taylor+ in the paper has 2

    def score(self, layer: Place) -> Tensor:
        import torch

        if layer.layer < self.keep_first or layer.layer >= layer.shape.layers - self.keep_last:
            return torch.tensor(torch.inf)
        gradient = layer.gradient(MeanGradient)
        return torch.stack([(weight * gradient[name]).abs().sum() for name, weight in layer.weights.items()]).sum()


@spec
class ShortenedLlamaPerplexity(RemovalMethod):
    r"""PPL: ``S_n = exp(L(model without layer n))``, layers removed at once (arXiv:2402.02834, 3.1)."""

    source = "arXiv:2402.02834"
    contiguous = False

    def score(self, full: float, pruned: Tensor) -> Tensor:
        return pruned.exp()
