"""Minitron-width: hidden and FFN channels by the magnitude of their activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibrate.stats import AbsMeanByPosition
from secateur.methods import Statistics, WidthMethod


class MinitronWidth(WidthMethod):
    r"""``S_c = sum_t (mean_b |x_btc|)^2``: batch mean, squared and summed over positions (arXiv:2407.14679, 2.2).

    Hidden channels are read at the output of every norm of the blocks and summed over them; FFN channels at the input
    of their layer's down-projection.
    """

    source = "arXiv:2407.14679"
    needs: ClassVar = {"hidden": (AbsMeanByPosition,), "ffn": (AbsMeanByPosition,)}

    def score(self, space: str, sites: Sequence[Statistics]) -> Tensor:
        return torch.stack([site[AbsMeanByPosition].square().sum(dim=0) for site in sites]).sum(dim=0)
