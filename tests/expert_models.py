"""Tiny random mixtures of experts, and what transformers' own modules say of their experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from expert_configs import MIXTURES
from helpers import hf, random_model
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan


def tiny_mixture(folder: Path, name: str, *, fused: bool = False, seed: int = 0, **config: Any) -> Path:
    """Write a random checkpoint of ``MIXTURES[name]`` below ``folder`` and return its directory.

    Args:
        fused: whether all experts of a layer lie in one tensor, as in memory, instead of in the family's own spelling.
    """
    out = folder / f"{name}-{'fused' if fused else 'own'}-{seed}"
    random_mixture(name, seed=seed, **config).save_pretrained(out, save_original_format=not fused)
    return out


@torch.no_grad()
def random_mixture(name: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of ``MIXTURES[name]`` whose correction biases are of the size of the scores that they correct."""
    model = random_model({**MIXTURES[name], **config}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor_name, tensor in sorted({**dict(model.named_buffers()), **dict(model.named_parameters())}.items()):
        if tensor_name.endswith("e_score_correction_bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@dataclass
class Routed:
    """What one layer's experts read in one pass of the whole model, window by window."""

    experts: nn.Module
    states: Tensor  #: [tokens, hidden]
    index: Tensor  #: [tokens, k]
    weights: Tensor  #: [tokens, k]

    @torch.no_grad()
    def norm(self, expert: int, token: int) -> float:
        """The norm of what an expert puts out for a token, by the model's own module."""
        state = self.states[token : token + 1]
        output = self.experts(state, torch.tensor([[expert]]), torch.ones(1, 1))
        return float(output.double().norm())


def routed_experts(directory: Path, ids: Tensor) -> dict[int, Routed]:
    """Layer -> what its experts read, observed in the model that plain transformers opens."""
    model, path = hf(directory), Checkpoint(directory).family.experts
    routed: dict[int, Routed] = {}
    for layer, block in enumerate(model.model.layers):
        module = dict(block.named_modules()).get(path)
        if module is None:
            continue

        def hook(experts: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            states, index, weights = (argument.detach().clone() for argument in args)
            routed[layer] = Routed(experts, states, index, weights)

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for of_layer in routed.values():
        of_layer.experts._forward_pre_hooks.clear()
    return routed


def naive_scores(routed: Routed, experts: int) -> dict[str, Tensor]:
    """Method -> scores of a layer's experts, one token and one choice at a time."""
    tokens, norms, weighted = (torch.zeros(experts, dtype=torch.float64) for _ in range(3))
    for token, row in enumerate(routed.index.tolist()):
        for slot, expert in enumerate(row):
            norm = routed.norm(expert, token)
            tokens[expert] += 1
            norms[expert] += norm
            weighted[expert] += float(routed.weights[token, slot]) * norm
    mean = tokens.clamp(min=1)
    return {"reap": weighted / mean, "expert-frequency": tokens, "expert-activation": norms / mean}


class _Banned(TorchFunctionMode):
    """Makes the router's logits of some experts minus infinity: the result of every linear map to all experts."""

    def __init__(self, lost: Tensor, experts: int) -> None:
        super().__init__()
        self.lost, self.experts = lost, experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            assert out.shape[-1] == self.experts
            out = out.index_fill(-1, self.lost, -torch.inf)
        return out


@torch.no_grad()
def without_experts(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The whole model, whose routers cannot choose the experts that a plan drops.

    Their logits are minus infinity. Where a correction bias is added to the scores of the logits, which are then zero,
    it is minus infinity as well: a router of this kind may choose an expert of score zero.
    """
    family, count = plan.before.family, plan.before.experts
    for layer, keep in plan.keep_experts.items():
        lost = torch.tensor([expert for expert in range(count) if expert not in keep.tolist()], dtype=torch.long)
        block = model.get_submodule(f"{family.layers}.{layer}")
        parent = block.get_submodule(family.experts.rpartition(".")[0])
        router: nn.Module = parent.router if hasattr(parent, "router") else parent.gate  # type: ignore[assignment]
        modes: list[_Banned] = []

        def enter(_module: nn.Module, _args: Any, lost: Tensor = lost, modes: list[_Banned] = modes) -> None:
            modes.append(_Banned(lost, count))
            modes[-1].__enter__()

        def leave(_module: nn.Module, _args: Any, _out: Any, modes: list[_Banned] = modes) -> None:
            nothing: tuple[type[BaseException] | None, BaseException | None, TracebackType | None] = (None, None, None)
            modes.pop().__exit__(*nothing)

        router.register_forward_pre_hook(enter)
        router.register_forward_hook(leave)
        for name, tensor in (*router.named_buffers(), *router.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                tensor.index_fill_(-1, lost, -torch.inf)
    return model


@torch.no_grad()
def without_expert_channels(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The whole model, whose experts' down-projections have zeros for the channels that a plan drops."""
    family, width = plan.before.family, plan.before.expert_ffn
    for layer, keep in plan.keep_expert_ffn.items():
        down = model.get_parameter(f"{family.layers}.{layer}.{family.experts}.down_proj")
        for expert, channels in enumerate(keep.tolist()):
            dropped = [channel for channel in range(width) if channel not in channels]
            (down[expert].T if family.name == "gpt_oss" else down[expert])[:, dropped] = 0
    return model
