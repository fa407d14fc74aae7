"""All knowledge of model families: which tensors there are, and which space each of their axes lies in.

A *space* is a set of channels that every tensor touching it must keep or drop together:

========= =================================================================================================
``hidden``  the residual stream, one for the whole model
``ffn``     the intermediate channels of one layer's FFN
``kv``      the KV heads of one layer, ``head_dim`` channels each
``query``   the query heads of one layer, cut along with the KV head that they share (grouped-query attention)
========= =================================================================================================

To add a family, describe it here; scoring, cutting, counting and training read this table and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.errors import UserError

__all__ = ["FAMILIES", "Axis", "Family", "Site", "family_of"]

Axis = str | None  #: the name of a space, or None for an axis that is never cut (the vocabulary)


@dataclass(frozen=True)
class Site:
    """A place in a decoder block where activations are observed: a module's input or its output.

    The linears in ``readers`` see exactly the observed values, so that one statistic serves them all.
    """

    module: str
    output: bool = False
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The tensors of one architecture, by name, with the space of each axis."""

    name: str
    model_types: tuple[str, ...]  #: values of ``model_type`` in config.json
    layers: str  #: prefix of the decoder blocks' tensors, before ``.<index>.``
    embedding: str
    head: str
    final_norm: str
    outer: dict[str, tuple[Axis, ...]]  #: tensors outside the blocks -> space of each axis
    block: dict[str, tuple[Axis, ...]]  #: tensors of a block, relative to it
    sites: dict[str, Site]
    hidden_sites: tuple[str, ...]  #: where the importance of hidden channels is read: what the norms put out
    ffn_site: str  #: the input of the down-projection
    kv_site: str  #: the input of the output projection, query heads in order
    optional: dict[str, str] = field(default_factory=dict)  #: block tensor -> config key that switches it on
    config_keys: dict[str, str] = field(default_factory=dict)  #: field of Shape -> key of config.json
    heads_divide_hidden: bool = False  #: the config refuses a hidden size that is no multiple of the query heads
    per_layer_keys: tuple[str, ...] = ("layer_types",)  #: lists in config.json with one entry for each layer

    @property
    def linears(self) -> tuple[str, ...]:
        """The weight matrices of a block: what sparse methods prune."""
        return tuple(name for name, axes in self.block.items() if len(axes) == 2)

    def block_tensor(self, layer: int, name: str) -> str:
        """The full name of a block's tensor."""
        return f"{self.layers}.{layer}.{name}"

    def site_of(self, linear: str) -> str:
        """The site whose values the linear ``linear`` (a tensor name) reads."""
        module = linear.removesuffix(".weight")
        return next(name for name, site in self.sites.items() if module in site.readers)


_LLAMA_BIASES = {
    **{f"self_attn.{p}_proj.bias": "attention_bias" for p in "qkvo"},
    **{f"mlp.{p}_proj.bias": "mlp_bias" for p in ("gate", "up", "down")},
}

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    layers="model.layers",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    final_norm="model.norm.weight",
    outer={
        "model.embed_tokens.weight": (None, "hidden"),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": (None, "hidden"),
    },
    block={
        "input_layernorm.weight": ("hidden",),
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.k_proj.weight": ("kv", "hidden"),
        "self_attn.v_proj.weight": ("kv", "hidden"),
        "self_attn.o_proj.weight": ("hidden", "query"),
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.bias": ("kv",),
        "self_attn.v_proj.bias": ("kv",),
        "self_attn.o_proj.bias": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
        "mlp.gate_proj.weight": ("ffn", "hidden"),
        "mlp.up_proj.weight": ("ffn", "hidden"),
        "mlp.down_proj.weight": ("hidden", "ffn"),
        "mlp.gate_proj.bias": ("ffn",),
        "mlp.up_proj.bias": ("ffn",),
        "mlp.down_proj.bias": ("hidden",),
    },
    optional=_LLAMA_BIASES,
    sites={
        "attention_input": Site(
            "input_layernorm", output=True, readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        ),
        "attention_output": Site("self_attn.o_proj", readers=("self_attn.o_proj",)),
        "ffn_input": Site("post_attention_layernorm", output=True, readers=("mlp.gate_proj", "mlp.up_proj")),
        "ffn_hidden": Site("mlp.down_proj", readers=("mlp.down_proj",)),
    },
    hidden_sites=("attention_input", "ffn_input"),
    ffn_site="ffn_hidden",
    kv_site="attention_output",
    heads_divide_hidden=True,
    config_keys={
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    },
)

FAMILIES: tuple[Family, ...] = (LLAMA,)


def family_of(model_type: str, *, where: str) -> Family:
    """Find the family of a ``model_type``.

    Raises:
        UserError: if no family has it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise UserError(
        f"{where}: model_type {model_type!r} is not a known family (known: {known}); "
        "a new one is a table in families.py, see docs/architecture.md"
    )
