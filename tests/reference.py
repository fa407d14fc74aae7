"""The model that a plan describes, made in memory from the whole one, without anything of secateur's surgeon.

Layers are bypassed; channels keep their place, and what they would put out is silenced; a norm that runs over silenced
channels runs over the others alone. The family's row only says where modules are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from family_configs import cut_axes
from helpers import calibration, hf, logits, tiny_family, windows
from secateur.methods.base import WidthMethod
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import Family
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target


@dataclass(frozen=True)
class Pruned:
    """A checkpoint, what became of it, and why."""

    name: str
    directory: Path
    out: Path
    plan: Plan


class Zoo:
    """Tiny checkpoints of every family and what pruning made of them; each is made once and not changed.

    Args:
        root: an existing directory for all of them.
        given: checkpoints that are there already, by name.
    """

    def __init__(self, root: Path, given: Mapping[str, Path] | None = None) -> None:
        self.root, self.given = root, dict(given or {})
        self.directory = cache(self._directory)
        self.pruned = cache(self._pruned)
        self.untouched = cache(lambda name: logits(hf(self.directory(name)), windows()))

    def _directory(self, name: str) -> Path:
        return self.given[name] if name in self.given else tiny_family(self.root, name)

    def _pruned(self, name: str, method: str) -> Pruned:
        scorer = get_method(method)
        if scorer.granularity == "sparse":
            return self.prune(name, method, Target(ratio=0.5))
        axes = cut_axes(name, *scorer.axes) if isinstance(scorer, WidthMethod) and name not in self.given else ()
        return self.prune(name, method, Target(ratio=0.4, axes=axes))

    def prune(self, name: str, method: str, target: Target, **options: Any) -> Pruned:
        """Prune to a target of one's own."""
        checkpoint = Checkpoint(self.directory(name))
        plan = make_plan(checkpoint, method, target, calibration(windows()), options=options, batch=2)
        return self.cut(name, plan)

    def add(self, name: str, model: PreTrainedModel) -> str:
        """Save a model as a checkpoint of this name."""
        model.save_pretrained(self.root / name)
        self.given[name] = self.root / name
        return name

    def cut(self, name: str, plan: Plan) -> Pruned:
        out = self.root / f"{name}-{len(list(self.root.iterdir()))}"
        out.mkdir()
        write_pruned(Checkpoint(self.directory(name)), plan, out)
        return Pruned(name, self.directory(name), out, plan)

    def keeping_all(self, name: str, **fields: Any) -> Plan:
        """A plan that keeps all but what is said."""
        record = {"summary": {"detail": "by hand"}, "calibration": calibration(windows()).record()}
        shape = Checkpoint(self.directory(name)).shape
        return Plan.keeping_all("hand", "width", {"ratio": 0.5, "of": "non_embedding"}, shape, **record, **fields)


def opened(directory: Path) -> PreTrainedModel:
    """The model as plain transformers opens it, which finds every weight and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def reference(pruned: Pruned, *, filled: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The whole model that was pruned, :func:`silenced`."""
    return silenced(hf(pruned.directory), pruned.plan, filled=filled)


@torch.no_grad()
def silenced(model: PreTrainedModel, plan: Plan, *, filled: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The whole model, with what the plan drops silenced.

    Args:
        model: the model, which is changed.
        plan: what to keep.
        filled: module -> what its dropped inputs are taken to be, instead of zero.
    """
    for name, values in plan.weights.items():
        model.get_parameter(name).copy_(values)
    for name, mask in plan.masks.items():
        model.get_parameter(name).masked_fill_(~mask, 0)
    blocks = model.get_submodule(plan.before.family.layers)
    _silence_hidden(model, plan)
    for layer, block in enumerate(blocks):
        if layer in plan.keep_layers.tolist():
            _silence_block(block, plan, layer, filled or {})
        else:
            block.forward = lambda hidden_states, *_, **__: hidden_states
    return model


def compensated(family: Family) -> tuple[str, ...]:
    """The modules of a block whose dropped inputs FLAP replaces by a bias."""
    readers = [family.reader(space) for space in ("kv", "ffn") if space in family.axes]
    return tuple(reader for reader in readers if family.can_have_bias(reader))


@torch.no_grad()
def calibration_means(pruned: Pruned) -> dict[str, Tensor]:
    """The mean input of each module that FLAP gives a bias, over the calibration set, in the whole model."""
    model, means = hf(pruned.directory), {}
    modules = compensated(pruned.plan.after.family)
    for path, module in model.named_modules():
        if path.endswith(tuple(f".{name}" for name in modules)):

            def hook(_module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                means[path] = args[0].double().mean(dim=(0, 1)).float()

            module.register_forward_pre_hook(hook)
    model(input_ids=windows(), use_cache=False)
    assert len(means) >= len(modules)
    return means


def assert_same_logits(got: PreTrainedModel, wanted: PreTrainedModel) -> None:
    ids = windows(3, 20, seed=9)  # longer than any window of attention
    a, b = logits(got, ids), logits(wanted, ids)
    assert float(b.std()) > 0.1
    close(a, b)


def close(got: Tensor, wanted: Tensor) -> None:
    """Compare logits: equal but for rounding, which is larger where the logits are."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=max(1e-4, 1e-4 * float(wanted.std())))


def _silence_hidden(model: PreTrainedModel, plan: Plan) -> None:
    """Take dropped channels out of the residual stream: out of the embedding's output and out of every norm."""
    keep, family = plan.keep_hidden, plan.before.family
    if len(keep) == plan.before.hidden:
        return
    mask = torch.zeros(plan.before.hidden)
    mask[keep] = 1
    embedding = model.get_submodule(family.embedding.removesuffix(".weight"))
    embedding.register_forward_hook(lambda _module, _args, out: out * mask)
    stack = model.get_submodule(family.layers)
    for parent in (model.base_model, *stack):
        for name, module in parent.named_children():
            if "norm" in type(module).__name__.lower():
                setattr(parent, name, NormOfSome(module, keep))


def _silence_block(block: nn.Module, plan: Plan, layer: int, filled: Mapping[str, Tensor]) -> None:
    before, family = plan.before, plan.before.family
    kv, query = (
        channels(plan.keep_kv[layer], before.head_dim * width) for width in (1, before.heads // before.kv_heads)
    )
    modules = dict(block.named_modules())
    for space, keep, total in (
        ("ffn", plan.keep_ffn[layer], before.ffn),
        ("kv", query, before.heads * before.head_dim),
    ):
        if len(keep) < total and (reader := family.reader(space)) in modules:
            _fill(modules[reader], keep, filled.get(f"{family.layers}.{layer}.{reader}"))
    if len(kv) < before.kv_heads * before.head_dim:
        for path in norms_over_heads(block, before):
            parent, _, name = path.rpartition(".")
            norm = NormOfSome(modules[path], query if name.startswith("q") else kv)
            setattr(block.get_submodule(parent), name, norm)


def norms_over_heads(block: nn.Module, shape: Shape) -> list[str]:
    """The norms of a block's queries and keys that run over all heads together; none where each head has its own."""
    attention = f"{shape.family.reader('kv').rpartition('.')[0]}."
    sizes = {(shape.heads * shape.head_dim,), (shape.kv_heads * shape.head_dim,)} - {(shape.head_dim,)}
    return [
        path
        for path, module in block.named_modules()
        if path.startswith(attention)
        and "norm" in type(module).__name__.lower()
        and getattr(module, "weight", torch.empty(0)).shape in sizes
    ]


def channels(heads: Tensor, width: int) -> Tensor:
    """The channels of heads that have ``width`` each."""
    return (heads[:, None] * width + torch.arange(width)).reshape(-1)


def _fill(module: nn.Module, keep: Tensor, values: Tensor | None) -> None:
    """Replace all but those channels of a module's input, by zero where `values` is None."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = torch.zeros_like(args[0]) if values is None else values.expand_as(args[0]).clone()
        x[..., keep] = args[0][..., keep]
        return (x, *args[1:])

    module.register_forward_pre_hook(hook)


class NormOfSome(nn.Module):
    """A norm whose mean (and variance) runs over some channels; the others come out as zero."""

    def __init__(self, norm: nn.Module, channels: Tensor) -> None:
        super().__init__()
        self.norm, self.channels = copy.deepcopy(norm), channels
        for name, parameter in norm.named_parameters():
            setattr(self.norm, name, nn.Parameter(parameter[channels]))
        if hasattr(norm, "normalized_shape"):
            self.norm.normalized_shape = (len(channels),)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., self.channels] = self.norm(x[..., self.channels])
        return out
