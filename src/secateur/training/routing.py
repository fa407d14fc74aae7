"""The balance of routed experts in training: the loss that keeps it, and figures that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.model.families import family_of
from secateur.model.shapes import Shape

__all__ = ["RouterBalance", "balance_of", "router_modules", "train_routers_alone"]


def balance_of(config: Any) -> float:
    """The coefficient of the balance in the loss, as the model's config has it; 0 where it has none."""
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def router_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of a mixture, layer by layer; none for a dense model."""
    family = family_of(model.config.model_type, where="the model")
    if not family.experts:
        return []
    shape = Shape.of_config(model.config, where="the model")
    owners = [
        model.get_submodule(f"{family.layers}.{layer}.{family.experts}".rpartition(".")[0])
        for layer in range(shape.layers)
        if shape.has_space("experts", layer)
    ]
    return [owner.get_submodule("gate" if hasattr(owner, "gate") else "router") for owner in owners]


def train_routers_alone(model: PreTrainedModel) -> None:
    """Freeze every parameter of a mixture but the weights and biases of its routers."""
    model.requires_grad_(False)
    for router in router_modules(model):
        for parameter in router.parameters(recurse=False):
            parameter.requires_grad_(True)


class RouterBalance:
    """Watches the routers of a model: how evenly they spread the tokens of a batch over the experts.

    With ``f_j`` the mean number of experts j among the chosen of a token, and ``P_j`` the mean of the softmax of the
    router's logits, over the tokens of all layers together (arXiv:2101.03961, eq. 4, as transformers computes it)::

        balance = experts * sum_j f_j * P_j

    It equals the number of experts of a token where all are chosen alike.

    Args:
        routers: of a mixture (:func:`router_modules`); they get hooks.
        coefficient: of ``balance`` in the loss; 0 for figures alone.
    """

    def __init__(self, routers: Sequence[nn.Module], coefficient: float) -> None:
        self.routers, self.coefficient = routers, coefficient
        self._outputs: list[tuple[Tensor, Tensor]] = []  # logits [tokens, experts] and chosen experts [tokens, k]
        self._figures: dict[str, float] = {}
        for router in self.routers:
            router.register_forward_hook(self._watch)

    def _watch(self, _module: nn.Module, _arguments: Any, result: tuple[Tensor, Tensor, Tensor]) -> None:
        self._outputs.append((result[0], result[2]))

    def begin(self) -> None:
        """Forget the batch before."""
        self._outputs = []

    def loss(self) -> Tensor:
        """The balance of the batch, times the coefficient: a scalar, differentiable in the routers."""
        outputs = self._outputs[: len(self.routers)]  # blocks that are recomputed add theirs once more
        logits = torch.cat([logits.flatten(0, -2) for logits, _ in outputs]).float()
        choices = torch.cat([experts.flatten(0, -2) for _, experts in outputs])
        experts = logits.shape[-1]
        counts = torch.bincount(choices.flatten(), minlength=experts).to(logits) / len(choices)
        balance = experts * (counts * logits.softmax(dim=-1).mean(dim=0)).sum()
        busiest = max(torch.bincount(index.flatten(), minlength=experts).max() / index.numel() for _, index in outputs)
        self._figures = {"router_balance": balance.item(), "busiest_expert": float(busiest) * experts}
        return self.coefficient * balance

    def figures(self) -> Mapping[str, float]:
        """``router_balance`` of the last batch, and the load of its busiest expert as a multiple of an even share."""
        return self._figures
