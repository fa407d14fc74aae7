"""What the reference algorithms share: a model's blocks, what goes through them, and how a model is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Kept = dict[str, Tensor]


class _Caught(Exception):
    """Ends a forward pass once the first block has been reached."""


@torch.no_grad()
def entering(model: Any, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The states [1, positions, hidden] of each window that enter the first block, and a block's other arguments."""
    states: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        arguments.update(kwargs)
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(_Caught):
            model(input_ids=window[None], use_cache=False)
    handle.remove()
    return states, arguments


@torch.no_grad()
def through(block: nn.Module, states: list[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """What leaves a block, window by window."""
    left = []
    for state in states:
        out = block(state, **arguments)
        left.append(out[0] if isinstance(out, tuple) else out)
    return left


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@contextlib.contextmanager
def watching(modules: dict[str, Any], see: Callable[[str, Tensor], None], *, output: bool = False) -> Iterator[None]:
    """Show ``see`` the name of a module and what it is given, or puts out, each time that it is called."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            see(name, (out if output else args[0]).detach())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    yield
    for handle in handles:
        handle.remove()


def squared_norms(
    modules: dict[str, Any], block: nn.Module, states: list[Tensor], arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Each module's squared norm of every input channel over all tokens, as the states go through the block."""
    squares = {name: torch.zeros_like(module.weight[0]) for name, module in modules.items()}

    def see(name: str, x: Tensor) -> None:
        squares[name] += x.flatten(0, 1).norm(dim=0).square()

    with watching(modules, see):
        through(block, states, arguments)
    return squares


def mean_loss(model: Any, windows: Iterable[Tensor]) -> float:
    """Mean over windows of the mean next-token loss."""
    losses = [float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in windows]
    return sum(losses) / len(losses)


def highest(scores: Tensor, ratio: float) -> Tensor:
    """Sorted indices of the units that stay when the share ``ratio`` of the lowest scores goes."""
    count = len(scores) - int(ratio * len(scores))
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def drop_layers(model: Any, kept: Tensor) -> None:
    """Leave only those layers."""
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept.tolist())
    model.config.num_hidden_layers = len(kept)


@torch.no_grad()
def narrow(model: Any, kept: Kept) -> None:
    """Slice the hidden channels, FFN channels and KV groups of a Llama to those that are kept."""
    config, hidden = model.config, kept.get("keep.hidden")
    width = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    for i, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        kv, ffn = kept.get(f"keep.kv.{i}"), kept.get(f"keep.ffn.{i}")
        keys, queries = (None, None) if kv is None else (_channels(kv, width), _channels(kv, width * group))
        _slice(attention.q_proj, queries, hidden)
        _slice(attention.k_proj, keys, hidden)
        _slice(attention.v_proj, keys, hidden)
        _slice(attention.o_proj, hidden, queries)
        _slice(mlp.gate_proj, ffn, hidden)
        _slice(mlp.up_proj, ffn, hidden)
        _slice(mlp.down_proj, hidden, ffn)
        if hidden is not None:
            _slice(block.input_layernorm, hidden)
            _slice(block.post_attention_layernorm, hidden)
        if kv is not None:
            config.num_key_value_heads, config.num_attention_heads = len(kv), len(kv) * group
        if ffn is not None:
            config.intermediate_size = len(ffn)
    if hidden is not None:
        _slice(model.model.embed_tokens, None, hidden)
        _slice(model.model.norm, hidden)
        _slice(model.lm_head, None, hidden)
        config.hidden_size = len(hidden)


def _channels(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _slice(module: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight = module.weight.data
    weight = weight if rows is None else weight[rows]
    module.weight = nn.Parameter(weight if columns is None else weight[:, columns])
    if rows is not None and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.data[rows])
