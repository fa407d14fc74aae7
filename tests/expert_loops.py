"""Routed experts of transformers' own modules, taken apart for loops that tests compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def experts_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of routed experts by their names."""
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


@torch.no_grad()
def routed(model: PreTrainedModel, ids: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What enters each module of experts: states [tokens, hidden], experts [tokens, k] and weights [tokens, k]."""
    entered: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, module in experts_of(model).items():

        def record(_module: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            entered[name] = arguments  # type: ignore[assignment]

        module.register_forward_pre_hook(record)
    model(input_ids=ids, use_cache=False)
    return entered


def parts(gate_up: Tensor, down: Tensor, transposed: bool) -> list[Tensor]:
    """Gate, up and down of one expert as [out, in] views of its parts of the two tensors."""
    if transposed:
        return [gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T]
    return [*gate_up.split(len(gate_up) // 2), down]


def matrices(module: Any, expert: int) -> list[Tensor]:
    """Gate, up and down of one expert of a model, to be written to."""
    return parts(module.gate_up_proj.data[expert], module.down_proj.data[expert], is_transposed(module))


def is_transposed(module: Any) -> bool:
    return "GptOss" in type(module).__name__


def hidden_of(module: Any, expert: int, x: Tensor) -> Tensor:
    """What an expert's down-projection reads, written out for both kinds of gates."""
    gate, up, _ = matrices(module, expert)
    if not is_transposed(module):
        return nn.functional.silu(x @ gate.T) * (x @ up.T)
    bias = module.gate_up_proj_bias[expert]
    g = (x @ gate.T + bias[::2]).clamp(max=7.0)
    u = (x @ up.T + bias[1::2]).clamp(-7.0, 7.0)
    return (u + 1) * g * torch.sigmoid(1.702 * g)


def planned(module: Any, tensors: Mapping[str, Tensor], name: str, expert: int) -> list[Tensor]:
    """The masks, or new weights, of gate, up and down of an expert in a plan."""
    gate_up, down = (tensors[f"{name}.{tensor}"][expert] for tensor in ("gate_up_proj", "down_proj"))
    return parts(gate_up, down, is_transposed(module))
