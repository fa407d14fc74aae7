"""The model that a plan describes, made in memory from the whole one, without anything of secateur's surgeon.

Nothing is sliced here. Layers are bypassed; channels keep their place, and what they would put out is silenced; a norm
that runs over silenced channels counts the others alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers import calibration, hf, logits, tiny_family, windows, without_layers
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

#: what of a pruned model gets a bias from FLAP
COMPENSATED: dict[str, tuple[str, ...]] = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": (),
    "qwen2": (),
    "qwen3": ("self_attn.o_proj",),
    "gemma3": ("self_attn.o_proj",),
    "olmo2": ("self_attn.o_proj",),
    "phi3": (),
}


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
        self.root, self.given = root, given or {}
        self.directory = cache(self._directory)
        self.pruned = cache(self._pruned)
        self.untouched = cache(lambda name: logits(hf(self.directory(name)), windows()))

    def _directory(self, name: str) -> Path:
        return self.given[name] if name in self.given else tiny_family(self.root, name)

    def _pruned(self, name: str, method: str) -> Pruned:
        sparse = get_method(method).granularity == "sparse"
        return self.prune(name, method, Target(ratio=0.5 if sparse else 0.4))

    def prune(self, name: str, method: str, target: Target, **options: Any) -> Pruned:
        """Prune to a target of one's own."""
        checkpoint = Checkpoint(self.directory(name))
        plan = make_plan(checkpoint, method, target, calibration(windows()), options=options, batch=2)
        return self.cut(name, plan)

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
    _silence_hidden(model, plan.keep_hidden.tolist())
    for layer in plan.keep_layers.tolist():
        _silence_block(model, plan, layer, filled or {})
    return without_layers(model, set(range(plan.before.layers)) - set(plan.keep_layers.tolist()))


@torch.no_grad()
def calibration_means(pruned: Pruned) -> dict[str, Tensor]:
    """The mean input of each module that FLAP gives a bias, over the calibration set, in the whole model."""
    model, found = hf(pruned.directory), {}
    for path, module in model.named_modules():
        if path.partition(".layers.")[2].partition(".")[2] in COMPENSATED[pruned.plan.after.family.name]:

            def hook(_module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                found[path] = args[0].double().mean(dim=(0, 1)).float()

            module.register_forward_pre_hook(hook)
    model(input_ids=windows(), use_cache=False)
    assert len(found) == pruned.plan.before.layers * len(COMPENSATED[pruned.plan.after.family.name])
    return found


def assert_same_logits(got: PreTrainedModel, wanted: PreTrainedModel) -> None:
    ids = windows(3, 20, seed=9)  # longer than any window of attention
    a, b = logits(got, ids), logits(wanted, ids)
    assert float(b.std()) > 0.1
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _silence_hidden(model: PreTrainedModel, kept: list[int]) -> None:
    """Nothing is read from the dropped channels of the residual stream, and norms do not count them."""
    gone = [c for c in range(model.config.hidden_size) if c not in kept]
    if not gone:
        return
    table = model.model.embed_tokens.weight.clone()
    table[:, gone] = 0
    tied = model.config.tie_word_embeddings
    model.model.embed_tokens.weight = nn.Parameter(table)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parent in (*model.model.layers, model.model):
        for name, norm in parent.named_children():
            if name.endswith("norm"):
                _narrow(norm, kept)


def _silence_block(model: PreTrainedModel, plan: Plan, layer: int, filled: Mapping[str, Tensor]) -> None:
    block, before = model.model.layers[layer], plan.before
    path, heads = f"model.layers.{layer}", before.heads // before.kv_heads
    gone_ffn = [c for c in range(before.ffn) if c not in plan.keep_ffn[layer].tolist()]
    gone_kv = [h for h in range(before.kv_heads) if h not in plan.keep_kv[layer].tolist()]
    gone_query = [h * heads + i for h in gone_kv for i in range(heads)]
    query, kv = _channels(gone_query, before.head_dim), _channels(gone_kv, before.head_dim)
    for space, gone in (("ffn", gone_ffn), ("kv", query)):
        reader = before.family.reader(space)
        _fill(block.get_submodule(reader), gone, filled.get(f"{path}.{reader}"))
    if model.config.model_type == "olmo2" and gone_kv:  # its norms of queries and keys run over all heads
        for linear, gone in ((block.self_attn.q_proj, query), (block.self_attn.k_proj, kv)):
            linear.weight[gone] = 0
            if linear.bias is not None:
                linear.bias[gone] = 0
            norm = getattr(block.self_attn, "q_norm" if gone is query else "k_norm")
            _narrow(norm, [c for c in range(linear.out_features) if c not in gone])


def _channels(heads: Sequence[int], width: int) -> list[int]:
    return [head * width + i for head in heads for i in range(width)]


def _fill(module: nn.Module, gone: list[int], values: Tensor | None) -> None:
    """Replace those channels of a module's input, by zero if nothing else is said."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., gone] = 0.0 if values is None else values[gone]
        return (x,)

    module.register_forward_pre_hook(hook)


def _narrow(norm: nn.Module, kept: Sequence[int]) -> None:
    """Let a norm run over the kept channels alone: its mean, its variance and its weights; the others put out zero."""
    small = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(small, name, nn.Parameter(parameter[kept]))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(kept),)

    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy_(-1, torch.tensor(kept), small(x[..., kept]))

    norm.forward = forward
