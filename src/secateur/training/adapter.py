"""Adapters (LoRA, arXiv:2106.09685): what they are, which linears they reach, and what their training costs.

A linear ``W`` [out, in] becomes ``W + s B A`` with ``s = alpha / rank``, ``A`` [rank, in] and ``B`` [out, rank]; ``A``
and ``B`` are trained, all else is frozen. Of a sparse model it becomes ``W + s M * (B A)`` with the mask ``M``
(MaskLoRA, arXiv:2312.15230): pruned weights stay zero.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.config import RUNTIME, IdentityKey, Positive, listed, parse, parse_value, spec
from secateur.errors import UserError, did_you_mean
from secateur.formatting import plural
from secateur.model.shapes import Shape, train_flops
from secateur.progress import notify
from secateur.training.recipe import Recipe

__all__ = [
    "FOUR_BIT_BLOCK",
    "Adapter",
    "adapted_linears",
    "adapter_flops",
    "adapter_parameters",
    "announce_adapter",
    "check_adapter",
    "four_bit_linears",
    "is_adapter_part",
    "plain_name",
    "read_adapter",
    "training_flops",
]

_GROUPS = ("all", "attention", "ffn")
FOUR_BIT_BLOCK = 64  #: weights in a row that share a scale, of a base in four bits


@spec
class Adapter:
    """A low-rank adapter and the linears that it is added to."""

    rank: Positive = 16
    alpha: Annotated[float | None, Field(gt=0)] = None  #: the update counts ``alpha / rank``; None for twice the rank
    #: ``all`` linears of the blocks, those of ``attention`` or ``ffn``, or names: ``q_proj``, ``layers.3.mlp.up_proj``
    targets: Annotated[tuple[str, ...], listed(), Field(min_length=1)] = ("all",)
    #: frozen weights of the adapted linears: as ``stored``, or in four bits (NF4 of QLoRA, arXiv:2305.14314)
    base: Annotated[Literal["stored", "4bit"], IdentityKey(omit="stored")] = "stored"
    #: of A and B; None for the run's. The identity has it as the recipe's
    peak_rate: Annotated[float | None, Field(gt=0), RUNTIME] = None

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))

    @property
    def scale(self) -> float:
        """The factor of ``B A``."""
        assert self.alpha is not None
        return self.alpha / self.rank

    @property
    def label(self) -> str:
        """Name in records and reports: ``lora-16``, with a group of linears ``lora-16-attention``."""
        groups = [target for target in self.targets if target in _GROUPS[1:]]
        return "-".join([f"{'lora' if self.base == 'stored' else 'qlora'}-{self.rank}", *groups])

    def __str__(self) -> str:
        base = ", over weights in 4 bits" if self.base == "4bit" else ""
        return f"LoRA of rank {self.rank}, alpha {self.alpha:g}, on {', '.join(self.targets)}{base}"


def read_adapter(value: Any) -> Adapter:
    """Make an adapter from ``rank=16,alpha=32,targets=q_proj+v_proj`` or a mapping of these keys.

    Raises:
        UserError: if a key is unknown, or a value is out of range.
    """
    if isinstance(value, Adapter):
        return value
    if isinstance(value, str):
        value = dict(_pair(part) for part in value.split(","))
    if not isinstance(value, Mapping):
        raise UserError(f"`adapter`: {value!r} should be as in rank=16,alpha=32,targets=all")
    return parse(Adapter, dict(value), origin="`adapter`")


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (equals and key.strip() and value.strip()):
        raise UserError(f"`adapter`: {text!r} should be KEY=VALUE, as in rank=16,alpha=32,targets=q_proj+v_proj")
    if key.strip() == "targets":
        return "targets", value.strip().split("+")
    return key.strip(), parse_value(value)


def adapted_linears(adapter: Adapter, shape: Shape) -> dict[str, tuple[int, int]]:
    """The linears that an adapter is added to: name of the module -> its sizes [out, in].

    Routed experts, whose weights are one tensor over all of them, are left out.

    Raises:
        UserError: if a target matches no linear, or the rank is larger than a side of one.
    """
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(shape.layers):
        tensors = shape.block_tensors(layer)
        for name in shape.matrices(layer):
            rows, columns = shape.tensor_size(tensors[name])
            linears[shape.family.block_tensor(layer, name).removesuffix(".weight")] = rows, columns
    matches: dict[str, tuple[int, int]] = {}
    for target in adapter.targets:
        names = [name for name in linears if _is_target(name, target, shape)]
        if not names:
            raise UserError(f"`adapter`: {_no_match(target, linears, shape)}")
        matches |= {name: linears[name] for name in names}
    for name, sizes in matches.items():
        if adapter.rank > min(sizes):
            raise UserError(
                f"`adapter`: rank {adapter.rank} is more than the smaller side of {name} [{sizes[0]}, {sizes[1]}]; "
                f"choose at most {min(sizes)}, or other targets"
            )
    return {name: linears[name] for name in linears if name in matches}


def four_bit_linears(adapter: Adapter, shape: Shape) -> list[str]:
    """Names of the linears whose frozen weights are in four bits: adapted ones with whole blocks in each row."""
    if adapter.base == "stored":
        return []
    sizes = adapted_linears(adapter, shape)
    return [name for name, (_, columns) in sizes.items() if columns % FOUR_BIT_BLOCK == 0]


def check_adapter(adapter: Adapter, shape: Shape) -> None:
    """Check that an adapter fits a model, and that its base can be in four bits, where it should.

    Raises:
        UserError: naming the target or the linear at fault, or what is not installed.
    """
    adapted_linears(adapter, shape)
    if adapter.base == "stored":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("`adapter`: base=4bit needs bitsandbytes; pip install 'secateur[qlora]', or leave it out")
    if not four_bit_linears(adapter, shape):
        raise UserError(
            f"`adapter`: base=4bit: no adapted linear has a multiple of {FOUR_BIT_BLOCK} inputs; leave it out"
        )


def adapter_parameters(adapter: Adapter, shape: Shape) -> int:
    """The number of parameters that are trained."""
    return sum(adapter.rank * (rows + columns) for rows, columns in adapted_linears(adapter, shape).values())


def adapter_flops(adapter: Adapter, shape: Shape, tokens: int, context: int, *, sparse: bool, batch: int) -> float:
    """FLOPs of training an adapter on ``tokens``.

    With ``F`` the forward FLOPs of a token, ``L`` those of the blocks below the lowest adapted one, and sums over the
    adapted linears [out, in]::

        dense:   tokens * (2 F - L + 3 * sum 2 rank (out + in))
        sparse:  tokens * (2 F - L + sum 2 out in) + tokens / batch * 4 * sum 2 rank out in

    Forwards as in full training; backwards the gradients of activations alone, down to the lowest adapted block. A
    dense adapter adds its two products forwards and four backwards. A masked one is a part of the weight
    (``W + s M * (B A)``) and adds nothing forwards, but the gradient of the whole weight backwards, and for each
    micro-batch ``B A`` twice and the two products from that gradient to those of A and B. Masked adapters therefore
    save memory and hardly any FLOPs. The gradient of the lowest block's input, which nothing needs, is counted in.

    Args:
        context: tokens in a window.
        sparse: whether the update is masked.
        batch: tokens in a micro-batch.
    """
    linears = adapted_linears(adapter, shape)
    first = min(_layer_of(name, shape) for name in linears)
    per_token = 2 * shape.forward_flops(context) - _blocks_flops(shape, first, context)
    if not sparse:
        per_token += 6 * adapter.rank * sum(rows + columns for rows, columns in linears.values())
        return tokens * per_token
    weights = sum(rows * columns for rows, columns in linears.values())
    return tokens * (per_token + 2.0 * weights) + tokens / batch * 8.0 * adapter.rank * weights


def training_flops(adapter: Adapter | None, shape: Shape, tokens: int, recipe: Recipe, *, sparse: bool) -> float:
    """FLOPs of training all weights on ``tokens`` or, where there is one, an adapter; without a teacher's."""
    if adapter is None:
        return train_flops(shape, tokens, recipe.sequence)
    batch = recipe.micro_batch * recipe.sequence
    return adapter_flops(adapter, shape, tokens, recipe.sequence, sparse=sparse, batch=batch)


def announce_adapter(adapter: Adapter | None, shape: Shape, *, sparse: bool) -> None:
    """Print what of an adapter is trained, and what gets none."""
    if adapter is None:
        return
    linears, parameters = adapted_linears(adapter, shape), adapter_parameters(adapter, shape)
    masked = ", masked in each forward pass" if sparse else ""
    notify(
        f"adapter: {adapter}: {plural(len(linears), 'linear')}, {parameters:,} trained parameters "
        f"({parameters / shape.total:.2%} of the model's){masked}; all else is frozen"
    )
    if adapter.base == "4bit":
        packed = four_bit_linears(adapter, shape)
        rest = f"; the other {len(linears) - len(packed)} stay as they are: their inputs are no multiple of "
        notify(
            f"adapter: frozen weights of {plural(len(packed), 'linear')} are rounded to 4 bits, which changes the model"
            f"{f'{rest}{FOUR_BIT_BLOCK}' if len(packed) < len(linears) else ''}"
        )
    if shape.layers_with("experts"):
        notify("adapter: routed experts and routers get none, and stay as they are")


def plain_name(name: str) -> str:
    """The name that a parameter of a model has without an adapter around its linear."""
    return name.replace(".base_layer.", ".")


def is_adapter_part(name: str) -> bool:
    """Whether a parameter is one that an adapter adds to a linear: its factors, or the mask of its update."""
    return ".lora_" in name


def _blocks_flops(shape: Shape, count: int, context: int) -> float:
    """Forward FLOPs of a token in the first ``count`` blocks."""
    return shape.of_layers(range(count)).forward_flops(context) - 2.0 * shape.vocabulary * shape.hidden if count else 0


def _layer_of(name: str, shape: Shape) -> int:
    return int(name.removeprefix(f"{shape.family.layers}.").partition(".")[0])


def _is_target(name: str, target: str, shape: Shape) -> bool:
    """Whether a linear is meant by a target: a group, its name, or the end of its name from a dot on, as in PEFT."""
    if target not in _GROUPS:
        return name == target or name.endswith(f".{target}")
    _, _, within = name.removeprefix(f"{shape.family.layers}.").partition(".")
    in_ffn = within.partition(".")[0] in _ffn_modules(shape)
    return target == "all" or in_ffn == (target == "ffn")


def _ffn_modules(shape: Shape) -> set[str]:
    """The modules of a block that are FFNs: those with the down-projection or with experts."""
    family = shape.family
    modules = [family.experts] if family.experts else []
    if family.ffn_site in family.sites:
        modules.append(family.reader("ffn"))
    return {module.partition(".")[0] for module in modules}


def _no_match(target: str, linears: Mapping[str, Any], shape: Shape) -> str:
    index = re.search(r"(?:^|\.)layers\.(\d+)\.", target)
    if index and int(index[1]) >= shape.layers:
        return (
            f"target {target}: the model has layers 0 to {shape.layers - 1}; after depth pruning the layers that stay "
            "are numbered anew"
        )
    names = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    experts = "; routed experts get no adapter" if shape.family.experts else ""
    return f"target {target!r} is no linear of the model{did_you_mean(target, [*_GROUPS, *names])}{experts}"
