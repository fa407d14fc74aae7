"""Shapes and their arithmetic: parameters, FLOPs and KV-cache bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import UserError
from secateur.formatting import plural
from secateur.model.attention_windows import attention_windows
from secateur.model.config_sizes import check_sizes, groups_of, product_of
from secateur.model.expert_matrices import is_expert_weight, reads_hidden
from secateur.model.families import FAMILIES, LLAMA, SPACE_OF, Axis, Family, Tensors, family_of, switched_on

__all__ = [
    "SIZES",
    "SPACES",
    "Shape",
    "Share",
    "removed",
    "teacher_flops",
    "train_flops",
]

#: what a shape can be narrowed in: its layers, a space of channels, or its routed experts
SPACES = ("layers", "hidden", "ffn", "kv", "experts", "expert_ffn")
SIZES = (
    "hidden",
    "ffn",
    "layers",
    "heads",
    "kv_heads",
    "experts",
    "expert_ffn",
)  #: the sizes that a shape can be asked for by
Share = Literal["non_embedding", "total"]  #: which parameters a ratio counts
BLOCK = 256  #: weights of a row that K-quants of llama.cpp quantise together

_ROUTER = ("experts", "hidden")  #: the axes of a router's weight


@dataclass(frozen=True)
class Shape:
    """The sizes that fix a decoder's parameter count."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    switches: tuple[str, ...] = ()  #: config keys that switch optional tensors on, e.g. ``attention_bias``
    kinds: tuple[str, ...] = ()  #: the kind of each layer; empty where all blocks are alike
    experts: int = 0  #: routed experts of a layer that has any
    expert_ffn: int = 0  #: FFN size of a routed expert
    active: int = 0  #: experts that a token is routed to
    groups: tuple[int, int] = (1, 1)  #: groups of neighbouring experts, and those that one token's experts come from
    fixed: tuple[tuple[str, int], ...] = ()  #: spaces of the family's own that are never cut, with their sizes
    #: positions that each layer attends to at most, None for all; empty where all layers attend to all
    windows: tuple[int | None, ...] = dataclasses.field(default=(), repr=False, compare=False)
    positions: int | None = dataclasses.field(default=None, repr=False, compare=False)  #: longest context
    family: Family = dataclasses.field(default=LLAMA, repr=False)

    @classmethod
    def of_config(cls, config: Any, *, where: str) -> Shape:
        """Read a Hugging Face config object.

        Raises:
            UserError: if its family is not known, or a size is no whole number above zero.
        """
        family = family_of(config.model_type, where=where)
        sizes: dict[str, Any] = {
            name: family.derived[name](config) if name in family.derived else getattr(config, key, None)
            for name, key in family.config_keys.items()
        }
        sizes |= {name: size(config) for name, size in family.derived.items() if name not in sizes}
        if sizes.get("kv_heads") is None:  # as older files have it
            sizes["kv_heads"] = sizes["heads"]
        if sizes.get("head_dim") is None:
            sizes["head_dim"] = sizes["hidden"] // max(sizes["heads"], 1)
        check_sizes({key: sizes[name] for name, key in family.config_keys.items()}, where)
        check_sizes({"vocab_size": config.vocab_size}, where)
        if sizes["heads"] % sizes["kv_heads"]:
            raise UserError(f"{where}: {sizes['heads']} query heads cannot share {sizes['kv_heads']} KV heads evenly")
        sizes = {"ffn": 0} | sizes  # families whose every layer has experts have no other
        switches = tuple(sorted({key for key in family.optional.values() if switched_on(key, config)}))
        kinds = tuple(family.kinds_of(config)) if family.kinds else ()
        if kinds and len(kinds) != sizes["layers"]:
            raise UserError(f"{where}: has {plural(sizes['layers'], 'layer')}, but kinds of {len(kinds)}")
        fixed = tuple((name, product_of(name, factors, config, where)) for name, factors in family.fixed.items())
        return cls(
            **sizes,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            switches=switches,
            kinds=kinds,
            groups=groups_of(family, config),
            fixed=fixed,
            windows=attention_windows(config, sizes["layers"]),
            positions=getattr(config, "max_position_embeddings", None),
            family=family,
        )

    def axis_size(self, axis: Axis) -> int:
        """How many channels an axis has; ``None`` is the vocabulary."""
        if isinstance(axis, tuple):
            return sum(self.axis_size(part) for part in axis)
        sizes: dict[str | None, int] = {
            None: self.vocabulary,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "kv": self.kv_heads * self.head_dim,
            "query": self.heads * self.head_dim,
            "gated_query": 2 * self.heads * self.head_dim,
            "heads": self.heads,
            "head": self.head_dim,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
            "expert_pair": 2 * self.expert_ffn,
        }
        return sizes[axis] if axis in sizes else dict(self.fixed)[str(axis)]

    def units(self, space: str) -> int:
        """How many units of a space can be kept or dropped: layers, channels, KV heads with query heads, or experts."""
        return getattr(self, {"kv": "kv_heads"}.get(space, space))

    def unit_parameters(self, space: str, layer: int = 0) -> int:
        """Parameters that go with one unit of ``ffn`` or ``kv`` in one layer."""
        smaller = self.narrowed(space, self.units(space) - 1)
        return self.block_parameters(layer) - smaller.block_parameters(layer)

    def has_space(self, space: str, layer: int) -> bool:
        """Whether a block has channels of a space: linear-attention layers have no KV heads."""
        axes = [axis for axes in self.block_tensors(layer).values() for axis in axes]
        parts = {part for axis in axes for part in (axis if isinstance(axis, tuple) else (axis,))}
        return any(space == SPACE_OF.get(str(part), part) for part in parts)

    def layers_with(self, space: str) -> list[int]:
        """The layers whose blocks have channels of a space."""
        return [layer for layer in range(self.layers) if self.has_space(space, layer)]

    def narrowed(self, space: str, units: int) -> Shape:
        """The shape with so many units in a space; query heads follow their KV heads."""
        if space == "kv":
            return dataclasses.replace(self, kv_heads=units, heads=units * (self.heads // self.kv_heads))
        return dataclasses.replace(self, **{space: units})

    def is_routed(self, tensor: str) -> bool:
        """Whether a tensor of a block, by its name within it, holds the routed experts."""
        return bool(self.family.experts) and tensor.startswith(f"{self.family.experts}.")

    def tensor_size(self, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """The size of a tensor whose axes lie in these spaces."""
        return tuple(self.axis_size(axis) for axis in axes)

    def kind(self, layer: int) -> str:
        """The kind of a layer; empty where all blocks are alike."""
        return self.kinds[layer] if self.kinds else ""

    def block_tensors(self, layer: int = 0) -> dict[str, tuple[Axis, ...]]:
        """The tensors that a block of this shape has: name -> spaces."""
        return self._present(self.family.tensors(self.kind(layer)))

    def _present(self, tensors: Tensors) -> dict[str, tuple[Axis, ...]]:
        optional = self.family.optional
        return {n: axes for n, axes in tensors.items() if n not in optional or optional[n] in self.switches}

    def linears(self, layer: int = 0) -> tuple[str, ...]:
        """The weights that sparse methods prune, by their names within the block: matrices, and those of experts."""
        return (*self.matrices(layer), *self.expert_weights(layer))

    def matrices(self, layer: int = 0) -> tuple[str, ...]:
        """The weight matrices of a block that read a site, by their names within it."""
        readers = {f"{reader}.weight" for site in self.family.sites.values() for reader in site.readers}
        return tuple(name for name in self.block_tensors(layer) if name in readers)

    def expert_weights(self, layer: int = 0) -> dict[str, tuple[Axis, ...]]:
        """The tensors that hold the weight matrices of a block's routed experts: name -> spaces."""
        return {name: axes for name, axes in self.block_tensors(layer).items() if is_expert_weight(axes)}

    def linear_sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes [out, in] of the weight matrices of all kinds of blocks, by the names of their tensors."""
        layers = {self.kind(layer): layer for layer in range(self.layers)}.values()
        return {n: self.matrix_size(self.block_tensors(layer)[n]) for layer in layers for n in self.linears(layer)}

    def matrix_size(self, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """The size [out, in] of a matrix, or of each matrix in a tensor over all experts."""
        if not is_expert_weight(axes):
            return self.tensor_size(axes)
        return (self.expert_ffn, self.hidden) if reads_hidden(axes) else (self.hidden, self.expert_ffn)

    def of_layers(self, layers: Sequence[int]) -> Shape:
        """The shape with these layers alone; other sizes stay."""
        kinds = tuple(self.kinds[layer] for layer in layers) if self.kinds else ()
        windows = tuple(self.windows[layer] for layer in layers) if self.windows else ()
        return dataclasses.replace(self, layers=len(layers), kinds=kinds, windows=windows)

    def sum_over_layers(self, figure: Callable[[int], Any]) -> Any:
        """Sum a figure of a block over all layers.

        Where a shape has fewer layers than kinds, since nothing has chosen the layers yet, it is the expected sum.
        """
        if not self.kinds:
            return self.layers * figure(0)
        first = {kind: layer for layer, kind in reversed(list(enumerate(self.kinds)))}
        total = sum(self.kinds.count(kind) * figure(layer) for kind, layer in first.items())
        if isinstance(self.layers, int) and self.layers == len(self.kinds):
            return total
        share = total * self.layers / len(self.kinds)
        return round(share) if isinstance(share, float) else share

    @property
    def block_weights(self) -> int:
        """The weights of the blocks' linears, which sparse methods prune."""
        return self.sum_over_layers(self.linear_parameters)

    def switched_on(self, keys: Sequence[str]) -> Shape:
        """The shape with optional tensors besides its own."""
        switches = {*self.switches, *keys}
        switches |= {switch for switch in self.family.optional.values() if switches.issuperset(switch.split("&"))}
        return dataclasses.replace(self, switches=tuple(sorted(switches)))

    @property
    def refused_by_config(self) -> bool:
        """Whether the family's own config or class refuses this shape: heads that do not divide the hidden size."""
        if self.family.heads_span_hidden and self.family.relaxed is None:
            return self.hidden != self.heads * self.head_dim
        return self.family.heads_divide_hidden and self.hidden % self.heads != 0

    def openable(self, *, where: str) -> Shape:
        """This shape, under a family whose config accepts it: the same function may have a less strict one.

        Raises:
            UserError: if there is none.
        """
        outgrown = self.family.heads_span_hidden and self.hidden != self.heads * self.head_dim
        if not (self.refused_by_config or outgrown):
            return self
        if (sibling := self._relaxed()) is not None:
            return sibling
        if outgrown:
            raise UserError(
                f"{where}: a {self.family.name} has heads of hidden size / heads, so {self.heads} heads of "
                f"{self.head_dim} channels go with a hidden size of {self.heads * self.head_dim}, not {self.hidden}; "
                "cut hidden channels and KV heads alike"
            )
        raise UserError(
            f"{where}: transformers refuses a {self.family.name} of hidden size {self.hidden} with {self.heads} "
            "heads, which do not divide it; choose another number of heads or hidden size"
        )

    def _relaxed(self) -> Shape | None:
        """The shape under the family's less strict sibling; None without one that can have its tensors."""
        if self.family.relaxed is None:
            return None
        family = next(f for f in FAMILIES if self.family.relaxed[0] in f.model_types)
        switches = tuple(sorted(set(family.optional.values()))) if self.switches else ()
        sibling = dataclasses.replace(self, family=family, switches=switches)
        return sibling if self.block_tensors().keys() <= sibling.block_tensors().keys() else None

    def block_parameters(self, layer: int = 0) -> int:
        """Parameters of one decoder block."""
        tensors, buffers = self.block_tensors(layer), self.family.buffers
        return sum(math.prod(self.tensor_size(axes)) for name, axes in tensors.items() if name not in buffers)

    def linear_parameters(self, layer: int = 0) -> int:
        """Weights of one block's linears: what sparse methods prune."""
        tensors = self.block_tensors(layer)
        return sum(math.prod(self.tensor_size(tensors[name])) for name in self.linears(layer))

    def outer_tensors(self) -> dict[str, tuple[Axis, ...]]:
        """The tensors outside the blocks: name -> spaces; a tied head is left out."""
        return {n: a for n, a in self._present(self.family.outer).items() if not (self.tied and n == self.family.head)}

    @property
    def head_bias(self) -> str | None:
        """The name of the head's bias; None for a head without one."""
        name = f"{self.family.head.removesuffix('.weight')}.bias"
        return name if name in self.outer_tensors() else None

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, of the head where it is not tied to it, and of the head's bias."""
        return sum(math.prod(self.tensor_size(axes)) for axes in self.outer_tensors().values() if None in axes)

    @property
    def non_embedding(self) -> int:
        """Parameters outside the embedding and the head."""
        outer = sum(math.prod(self.tensor_size(axes)) for axes in self.outer_tensors().values() if None not in axes)
        return self.sum_over_layers(self.block_parameters) + outer

    @property
    def total(self) -> int:
        """All parameters; tied ones count once."""
        return self.embedding + self.non_embedding

    def forward_flops(self, context: int) -> float:
        """FLOPs to process one token forwards, averaged over the positions of a causal window.

        Two for each weight of the blocks' linears and of the head, and ``4 * heads * head_dim`` for each layer and
        attended position (scores and values), of which there are ``(context + 1) / 2`` on average. Norms, activations,
        convolutions, the states of linear attention and the embedding look-up are left out. Sparse weights count in
        full: dense kernels multiply their zeros. Of the routed experts those count that a token is routed to, and the
        router.
        """
        weights = self.sum_over_layers(self._active_weights) + self.vocabulary * self.hidden
        attention = 4 * self.sum_over_layers(self._attention_width) * (context + 1) / 2
        return 2.0 * weights + attention

    def block_flops(self, context: int) -> float:
        """Those of :meth:`forward_flops` in the blocks: all but the head's."""
        return self.forward_flops(context) - 2.0 * self.vocabulary * self.hidden

    @property
    def ffn_flops(self) -> float:
        """Those of :meth:`block_flops` in dense FFNs."""
        return 2.0 * self.sum_over_layers(self.ffn_weights)

    def ffn_weights(self, layer: int = 0) -> int:
        """Weights of the matrices of a block's dense FFN."""
        tensors = self.block_tensors(layer)
        sizes = {name: self.tensor_size(tensors[name]) for name in self.matrices(layer)}
        return sum(math.prod(size) for name, size in sizes.items() if {"ffn", ("ffn", "ffn")} & {*tensors[name]})

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: of the routed experts, those that it is routed to."""
        return self.total - self.sum_over_layers(self._idle_parameters)

    @property
    def least_experts(self) -> int:
        """The fewest routed experts with which the router still works: those of a token, of each of its groups."""
        groups, groups_per_token = self.groups
        return self.active if groups == 1 else groups * max(2, math.ceil(self.active / groups_per_token))

    def _idle_parameters(self, layer: int) -> int:
        """Parameters of a block's routed experts that a token is not routed to."""
        tensors = self.block_tensors(layer).items()
        each = sum(math.prod(self.tensor_size(a[1:])) for n, a in tensors if self.is_routed(n))
        return (self.experts - self.active) * each

    def _active_weights(self, layer: int) -> int:
        """Weights of a block's linears and router that one token uses: of the routed experts, those it is routed to."""
        tensors, experts = self.block_tensors(layer), self.expert_weights(layer).values()
        dense = [tensors[name] for name in self.matrices(layer)] + [a for a in tensors.values() if a == _ROUTER]
        each = sum(math.prod(self.tensor_size(axes[1:])) for axes in experts)
        return sum(math.prod(self.tensor_size(axes)) for axes in dense) + self.active * each

    def _attention_width(self, layer: int) -> int:
        """Channels of the values that a block's heads put out; 0 for a block without attention over positions."""
        axes = self.block_tensors(layer).get(f"{self.family.reader('kv')}.weight")
        return self.axis_size(axes[1]) if axes else 0

    @property
    def carries_state(self) -> bool:
        """Whether some layers carry a state along the text (linear attention, convolutions) instead of attending."""
        return any(not self._attention_width(layer) for layer in range(len(self.kinds)))

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of KV cache for each token at 16 bits."""
        return self.sum_over_layers(lambda layer: 2 * self._cached_channels(layer))

    def cached_values(self, context: int) -> Any:
        """Keys and values that the cache holds after ``context`` tokens of one sequence.

        A layer with a window keeps one position less than it, as the cache of transformers does. Where a shape has
        fewer layers than windows, since nothing has chosen the layers yet, it is the expected number.
        """
        windows = self.windows or (None,)
        positions = [context if window is None else min(context, window - 1) for window in windows]
        if len(set(positions)) == 1:
            return positions[0] * self.sum_over_layers(self._cached_channels)
        total = sum(tokens * self._cached_channels(layer) for layer, tokens in enumerate(positions))
        if isinstance(self.layers, int) and self.layers == len(positions):
            return total
        return total * self.layers / len(positions)

    def _cached_channels(self, layer: int) -> int:
        """Channels of keys and values that a block adds to the cache for each token."""
        rows = [axes[0] for axes in self.block_tensors(layer).values() if len(axes) == 2]
        parts = [part for axis in rows for part in (axis if isinstance(axis, tuple) else (axis,))]
        return sum(self.axis_size(part) * self.family.cached.count(str(part)) for part in parts)

    def config_changes(self) -> dict[str, Any]:
        """The keys of config.json that say this shape."""
        family = self.family
        sizes = {key: getattr(self, name) for name, key in family.config_keys.items()}
        return {**sizes, **family.stated, **(family.kind_keys(self.kinds) if family.kind_keys else {})}

    def as_dict(self) -> dict[str, Any]:
        """The sizes as plain values."""
        names = ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "tied")
        expert_names = ("experts", "expert_ffn", "active", "active_parameters") if self.experts else ()
        return {name: getattr(self, name) for name in (*names, *expert_names)}

    def __str__(self) -> str:
        ffn = f", FFN {self.ffn}" if self.ffn else ""
        experts = f", experts {self.active} of {self.experts} with FFN {self.expert_ffn}" if self.experts else ""
        return f"hidden {self.hidden}{ffn}{experts}, layers {self.layers}, heads {self.heads}/{self.kv_heads} KV"


def train_flops(shape: Shape, tokens: int, context: int) -> float:
    """FLOPs of training on ``tokens``: the backward pass costs twice the forward pass."""
    return 3.0 * tokens * shape.forward_flops(context)


def teacher_flops(teacher: Shape, tokens: int, context: int) -> float:
    """FLOPs of a teacher that reads ``tokens``, forwards only; they come on top of the student's training."""
    return tokens * teacher.forward_flops(context)


def removed(before: Shape, after: Shape) -> dict[str, float]:
    """The share of parameters that ``after`` lacks: ``total`` and ``non_embedding``."""
    return {"total": 1 - after.total / before.total, "non_embedding": 1 - after.non_embedding / before.non_embedding}
