"""Shapes and their arithmetic: parameters, FLOPs, KV-cache bytes, and the way from a ratio to a legal shape."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from secateur.errors import UserError
from secateur.families import LLAMA, Axis, Family, family_of

__all__ = ["Shape", "multiple_of", "removed", "solve_depth", "solve_width", "train_flops"]


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
    family: Family = dataclasses.field(default=LLAMA, repr=False)

    @classmethod
    def of_config(cls, config: Any, *, where: str) -> Shape:
        """Read a Hugging Face config object.

        Raises:
            UserError: if its family is not known.
        """
        family = family_of(config.model_type, where=where)
        sizes: dict[str, Any] = {name: getattr(config, key, None) for name, key in family.config_keys.items()}
        sizes["kv_heads"] = sizes.get("kv_heads") or sizes["heads"]
        sizes["head_dim"] = sizes.get("head_dim") or config.hidden_size // config.num_attention_heads
        switches = tuple(sorted({key for key in family.optional.values() if getattr(config, key, False)}))
        return cls(
            **sizes,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            switches=switches,
            family=family,
        )

    def axis_size(self, axis: Axis) -> int:
        """How many channels an axis has; ``None`` is the vocabulary."""
        return {
            None: self.vocabulary,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "kv": self.kv_heads * self.head_dim,
            "query": self.heads * self.head_dim,
        }[axis]

    def tensor_size(self, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """The size of a tensor whose axes lie in these spaces."""
        return tuple(self.axis_size(axis) for axis in axes)

    def block_tensors(self) -> dict[str, tuple[Axis, ...]]:
        """The tensors that a block of this shape has: name -> spaces."""
        optional = self.family.optional
        return {n: axes for n, axes in self.family.block.items() if n not in optional or optional[n] in self.switches}

    @property
    def block_parameters(self) -> int:
        """Parameters of one decoder block."""
        return sum(math.prod(self.tensor_size(axes)) for axes in self.block_tensors().values())

    @property
    def linear_parameters(self) -> int:
        """Weights of one block's linears: what sparse methods prune."""
        return sum(math.prod(self.tensor_size(self.family.block[name])) for name in self.family.linears)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head where it is not tied to it."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def non_embedding(self) -> int:
        """Parameters outside the embedding and the head."""
        return self.layers * self.block_parameters + self.hidden  # + the final norm

    @property
    def total(self) -> int:
        """All parameters; tied ones count once."""
        return self.embedding + self.non_embedding

    def forward_flops(self, context: int) -> float:
        """FLOPs to process one token forwards, averaged over the positions of a causal window.

        Two for each weight of the blocks' linears and of the head, and ``4 * heads * head_dim`` for each layer and
        attended position (scores and values), of which there are ``(context + 1) / 2`` on average. Norms, activations
        and the embedding look-up are left out. Sparse weights count in full: dense kernels multiply their zeros.
        """
        weights = self.layers * self.linear_parameters + self.vocabulary * self.hidden
        attention = 4 * self.layers * self.heads * self.head_dim * (context + 1) / 2
        return 2.0 * weights + attention

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of KV cache for each token at 16 bits."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def config_changes(self) -> dict[str, Any]:
        """The keys of config.json that say this shape."""
        return {key: getattr(self, name) for name, key in self.family.config_keys.items()}

    def as_dict(self) -> dict[str, Any]:
        """The sizes as plain values."""
        names = ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "tied")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"hidden {self.hidden}, FFN {self.ffn}, layers {self.layers}, heads {self.heads}/{self.kv_heads} KV"


def train_flops(shape: Shape, tokens: int, context: int) -> float:
    """FLOPs of training on ``tokens``: the backward pass costs twice the forward pass."""
    return 3.0 * tokens * shape.forward_flops(context)


def removed(before: Shape, after: Shape) -> dict[str, float]:
    """The share of parameters that ``after`` lacks: ``total`` and ``non_embedding``."""
    return {
        "total": 1 - after.total / before.total,
        "non_embedding": 1 - after.non_embedding / before.non_embedding,
    }


def multiple_of(size: int, divisor: int = 1) -> int:
    """The step in which an axis is narrowed: hardware-friendly, and fine enough to come near a ratio.

    It is ``divisor`` times the largest power of two that keeps it at most 128 and leaves 16 steps or more.
    """
    step = divisor
    while step * 2 <= 128 and size // (step * 2) >= 16:
        step *= 2
    return step


def solve_depth(shape: Shape, ratio: float) -> Shape:
    """The shape with that share of the layers removed, to the nearest layer.

    Raises:
        UserError: if no layer would be left, or none removed.
    """
    layers = round(shape.layers * (1 - ratio))
    if not 1 <= layers < shape.layers:
        legal = ", ".join(f"{1 - k / shape.layers:.3g}" for k in range(shape.layers - 1, 0, -1))
        raise UserError(
            f"ratio {ratio:g}: of {shape.layers} layers it would keep {layers}; possible: {legal or 'none'}"
        )
    return dataclasses.replace(shape, layers=layers)


def solve_width(shape: Shape, ratio: float) -> Shape:
    """The narrower shape (hidden and FFN channels; heads and layers stay) nearest to the ratio.

    The ratio counts non-embedding parameters. Both axes go in steps of :func:`multiple_of` and shrink alike as far as
    the steps allow: among shapes within 1% of the target (or, failing that, the nearest ones), the one whose two axes
    keep the most similar shares is taken.

    Raises:
        UserError: if even the narrowest shape keeps too much.
    """
    divisor = shape.heads if shape.family.heads_divide_hidden else 1
    step_hidden, step_ffn = multiple_of(shape.hidden, divisor), multiple_of(shape.ffn)
    target = (1 - ratio) * shape.non_embedding
    found: list[tuple[float, float, Shape]] = []  # (drift, difference of shares, shape)
    for hidden in range(step_hidden, shape.hidden + 1, step_hidden):
        for ffn in range(step_ffn, shape.ffn + 1, step_ffn):
            candidate = dataclasses.replace(shape, hidden=hidden, ffn=ffn)
            drift = abs(candidate.non_embedding - target) / shape.non_embedding
            found.append(
                (max(drift, 0.01), abs(math.log(hidden / shape.hidden) - math.log(ffn / shape.ffn)), candidate)
            )
    if not found or (min(found, key=lambda f: f[0])[0] > 0.05):
        raise UserError(f"ratio {ratio:g}: no width of this model comes near it ({shape}); ask for a smaller one")
    best = min(found, key=lambda f: (f[0], f[1]) if f[0] > 0.01 else (0.01, f[1]))[2]
    if best.hidden == shape.hidden and best.ffn == shape.ffn:
        raise UserError(f"ratio {ratio:g}: too small to narrow this model by one step ({step_hidden} hidden channels)")
    return best
