"""Naive references for the methods, written from their formulas on plain transformers models: loops, no engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from family_configs import FAMILY_CONFIGS, FIRST
from helpers import hf, tiny_family, windows
from secateur.calibration.statistics import Statistic
from secateur.methods.base import WeightMethod
from secateur.methods.selection import Selector
from secateur.model.checkpoint import Checkpoint

VARIANTS = ("llama-tied", "llama-biased", "llama-bf16", "qwen3-biased", "gemma3-untied")
NAMES = (*FIRST, *VARIANTS)


@dataclass
class Subject:
    """A tiny checkpoint, the plain model of it, and a text."""

    name: str
    directory: Path
    ids: Tensor

    @classmethod
    def make(cls, directory: Path, name: str, layers: int = 5) -> Subject:
        config: dict[str, Any] = {"num_hidden_layers": layers}
        if "layer_types" in FAMILY_CONFIGS.get(name, {}):
            config["layer_types"] = [*["sliding_attention", "full_attention"] * layers][:layers]
        dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
        written = tiny_family(directory, name.removesuffix("-bf16"), dtype=dtype, **config)
        subject = cls(name, written, windows(4))
        _ = subject.dense
        gc.freeze()  # a block walk collects garbage; what making models has brought in need not be looked at again
        return subject

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.directory)

    def model(self) -> PreTrainedModel:
        """A new one, to be changed at will."""
        return hf(self.directory)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """One for all tests: not to be changed."""
        return self.model()

    @cached_property
    def seen(self) -> dict[str, tuple[Tensor, Tensor]]:
        return capture(self.dense, self.ids)

    @cached_property
    def gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean over windows of the gradient of a window's mean loss, and of its square."""
        model = self.model()
        mean = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
        square = {n: torch.zeros_like(g) for n, g in mean.items()}
        for window in self.ids:
            model.zero_grad()
            scores = model(input_ids=window[None], use_cache=False).logits[0]
            losses = [scores[t].logsumexp(0) - scores[t, window[t + 1]] for t in range(len(window) - 1)]
            (torch.stack(losses).sum() / len(losses)).backward()
            for n, p in model.named_parameters():
                assert p.grad is not None
                mean[n] += p.grad.double() / len(self.ids)
                square[n] += p.grad.double() ** 2 / len(self.ids)
        return mean, square

    @property
    def layers(self) -> int:
        return self.dense.config.num_hidden_layers

    @property
    def kv_heads(self) -> int:
        return self.dense.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.dense.config, "head_dim", None) or self.hidden // self.dense.config.num_attention_heads

    @property
    def group(self) -> int:
        """Query heads on one KV head."""
        return self.dense.config.num_attention_heads // self.kv_heads

    @property
    def hidden(self) -> int:
        return self.dense.config.hidden_size

    @property
    def ffn(self) -> int:
        return self.dense.config.intermediate_size


@torch.no_grad()
def capture(model: PreTrainedModel, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into each module and comes out of it, in one pass over all windows, in float64."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
            entered = args[0] if args else kwargs.get("hidden_states")
            left = out[0] if isinstance(out, tuple) else out
            if isinstance(entered, Tensor) and isinstance(left, Tensor):
                seen[name] = (entered.double(), left.double())

        return hook

    modules = [(n, m) for n, m in model.named_modules() if ".layers." in n]
    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in modules]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def bypass(model: PreTrainedModel, gone: Iterable[int]) -> PreTrainedModel:
    """Let those blocks hand on what they are given."""
    for layer in gone:
        model.model.layers[layer].forward = lambda states, *_args, **_kwargs: states
    return model


def linears(model: PreTrainedModel, layer: int) -> dict[str, nn.Linear]:
    """The linears of a block by their full name."""
    start = f"model.layers.{layer}."
    return {n: m for n, m in model.named_modules() if n.startswith(start) and isinstance(m, nn.Linear)}


def groups_lost(subject: Subject, kept: Tensor) -> list[int]:
    """The columns of the output projection that belong to KV heads that are not kept."""
    width = subject.group * subject.head_dim
    gone = sorted(set(range(subject.kv_heads)) - set(kept.tolist()))
    return [g * width + i for g in gone for i in range(width)]


Piece = tuple[str, Tensor]  #: name of a parameter, and the flat indices of some of its values


def pieces(subject: Subject, layer: int, space: str, unit: int) -> Iterator[Piece]:
    """Where a unit of ``kv`` or ``ffn`` lies in the weights of its block, a fused one part by part."""
    start, family = f"model.layers.{layer}.", subject.name.partition("-")[0]
    hidden, d, ffn = subject.hidden, subject.head_dim, subject.ffn
    queries = subject.kv_heads * subject.group * d

    def rows(name: str, first: int, count: int) -> Piece:
        width = 1 if "norm" in name else hidden
        return start + name, torch.tensor([r * width + c for r in range(first, first + count) for c in range(width)])

    def columns(name: str, first: int, count: int, width: int) -> Piece:
        return start + name, torch.tensor([r * width + c for r in range(hidden) for c in range(first, first + count)])

    if space == "ffn":
        fused = family == "phi3"
        yield rows("mlp.gate_up_proj.weight" if fused else "mlp.gate_proj.weight", unit, 1)
        yield rows("mlp.gate_up_proj.weight", ffn + unit, 1) if fused else rows("mlp.up_proj.weight", unit, 1)
        yield columns("mlp.down_proj.weight", unit, 1, ffn)
        return
    of_query, of_key = (unit * subject.group * d, subject.group * d), (unit * d, d)
    if family == "phi3":
        yield rows("self_attn.qkv_proj.weight", *of_query)
        yield rows("self_attn.qkv_proj.weight", queries + unit * d, d)
        yield rows("self_attn.qkv_proj.weight", queries + subject.kv_heads * d + unit * d, d)
    else:
        yield rows("self_attn.q_proj.weight", *of_query)
        yield rows("self_attn.k_proj.weight", *of_key)
        yield rows("self_attn.v_proj.weight", *of_key)
    if family == "olmo2":
        yield rows("self_attn.q_norm.weight", *of_query)
        yield rows("self_attn.k_norm.weight", *of_key)
    yield columns("self_attn.o_proj.weight", *of_query, queries)


def hidden_pieces(subject: Subject, channel: int) -> Iterator[Piece]:
    """Where a hidden channel lies in the weights of the whole model; a tied head is the embedding."""
    for name, parameter in subject.dense.named_parameters():
        if not name.endswith(".weight") or "q_norm" in name or "k_norm" in name:
            continue
        flat = torch.arange(parameter.numel()).reshape(parameter.shape)
        if parameter.dim() == 1:
            yield name, flat[channel : channel + 1]
        elif "o_proj" in name or "down_proj" in name:
            yield name, flat[channel]
        else:
            yield name, flat[:, channel]


def fits(kept: Iterable[int], scores: list[float], tolerance: float = 1e-5) -> None:
    """The kept are those of the highest scores, up to ties within rounding."""
    stay = sorted(set(kept))
    gone = [i for i in range(len(scores)) if i not in set(stay)]
    if stay and gone:
        least, most = min(scores[i] for i in stay), max(scores[i] for i in gone)
        assert least >= most - tolerance * max(abs(least), abs(most))


def agrees(found: Tensor, wanted: list[float] | Tensor, rel: float = 1e-5, spread: float = 0.0) -> None:
    """Equal to ``rel``; where a score is a difference, rounding is relative to the scores' ``spread``."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=rel, atol=rel * spread)


def pruned(
    method: WeightMethod, weight: Tensor, stats: Mapping[type[Statistic], Tensor], select: Selector
) -> tuple[Tensor, Tensor]:
    """One linear pruned: the weight, and what is kept of it."""
    return method.prune(weight, method.prepare(stats), select)


def naive_obs(
    weight: Tensor,
    x: Tensor,
    mask_of: Callable[[slice, Tensor], Tensor],
    span: int,
    damping: float = 0.01,
) -> Tensor:
    """SparseGPT as optimal brain surgery in float64, each inverse taken anew: weight after pruning.

    Args:
        weight: [out, in].
        x: [tokens, in].
        mask_of: told some columns and their scores, says what is kept of them.
        span: columns whose mask is chosen at once.
        damping: share of the mean diagonal.
    """
    weight, hessian = weight.double().clone(), 2 * x.double().T @ x.double()
    size = len(hessian)
    for j in range(size):
        if hessian[j, j] == 0:
            weight[:, j] = 0
    mean = sum(float(hessian[j, j]) for j in range(size)) / size
    for j in range(size):
        hessian[j, j] += damping * mean if hessian[j, j] else 1.0
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(size)]  # of what is left once the first j are settled
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(size):
        if j % span == 0:
            chosen = slice(j, min(j + span, size))
            errors = [weight[:, k] ** 2 / inverse[k][0, 0] for k in range(chosen.start, chosen.stop)]
            keep[:, chosen] = mask_of(chosen, torch.stack(errors, dim=1))
        gone = ~keep[:, j]  # in each of these rows, the columns behind make up for it as well as they can
        weight[gone, j:] -= weight[gone, j, None] / inverse[j][0, 0] * inverse[j][0]
        weight[gone, j] = 0
    return weight


def follow(
    keep: Tensor, sparsity: float, group: int | None, tolerance: float = 1e-4
) -> Callable[[slice, Tensor], Tensor]:
    """A mask for :func:`naive_obs`: the one that was found, if it is right up to near-ties of float32's inverse.

    Args:
        keep: the mask that was found [out, in].
        sparsity: share of each group.
        group: M of N:M; none: what is chosen at once is one group.
    """

    def mask_of(chosen: slice, scores: Tensor) -> Tensor:
        found = keep[:, chosen]
        shape = (-1, group) if group else (1, -1)
        values, kept = scores.reshape(shape), found.reshape(shape)
        assert ((~kept).sum(dim=1) == int(sparsity * kept.shape[1] + 1e-6)).all()
        least = values.masked_fill(~kept, torch.inf).amin(dim=1)
        assert (least >= values.masked_fill(kept, 0).amax(dim=1) * (1 - tolerance)).all()
        return found

    return mask_of
