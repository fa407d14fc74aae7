"""All knowledge of model families: which tensors there are, and which space each of their axes lies in.

A *space* is a set of channels that every tensor touching it must keep or drop together:

========= =================================================================================================
``hidden``  the residual stream, one for the whole model
``ffn``     the intermediate channels of one layer's FFN
``kv``      the KV heads of one layer, ``head_dim`` channels each
``query``   the query heads of one layer, cut along with the KV head that they share (grouped-query attention)
``head``    the channels within one head, never cut
========= =================================================================================================

An axis that is a tuple is several axes laid end to end, as in a fused projection.

To add a family, describe it here; scoring, cutting, counting and training read this table and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from secateur.errors import UserError

__all__ = ["FAMILIES", "Axis", "Family", "Granularity", "Site", "family_of"]

Granularity = Literal["depth", "width", "depth+width", "sparse"]  #: what pruning removes

Axis = str | tuple[str, ...] | None  #: a space, several laid end to end, or None for the vocabulary

Tensors = Mapping[str, tuple[Axis, ...]]  #: name of a tensor -> the space of each of its axes


@dataclass(frozen=True)
class Site:
    """A place in a decoder block where activations are observed: a module's input or its output.

    The linears in ``readers`` see exactly the observed values, so that one statistic serves them all.
    """

    module: str
    space: str  #: of the observed channels
    output: bool = False
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The tensors of one architecture, by name, with the space of each axis."""

    name: str
    model_types: tuple[str, ...]  #: values of ``model_type`` in config.json
    block: Tensors  #: tensors of a block, relative to it
    sites: Mapping[str, Site]
    layers: str = "model.layers"  #: prefix of the decoder blocks' tensors, before ``.<index>.``
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    hidden_sites: tuple[str, ...] = ("attention_input", "ffn_input")  #: norm outputs: hidden channels' importance
    ffn_site: str = "ffn_hidden"  #: the input of the down-projection
    #: modules whose output is added to the residual stream
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    kv_site: str = "attention_output"  #: the input of the output projection, query heads in order
    optional: Mapping[str, str] = field(default_factory=dict)  #: block tensor -> config key that switches it on
    config_keys: Mapping[str, str] = field(default_factory=lambda: _CONFIG_KEYS)  #: field of Shape -> config key
    derives_head_dim: bool = True  #: a missing head size is hidden size / query heads, not a fixed default
    heads_divide_hidden: bool = False  #: the config refuses a hidden size that is no multiple of the query heads
    #: the same function without that rule: its model_type, architecture and its extra keys
    relaxed: tuple[str, str, Mapping[str, object]] | None = None
    embedding_grows: bool = False  #: the model multiplies embeddings by sqrt(hidden size)
    norm_offset: float = 0.0  #: a norm multiplies by its weight plus this
    logit_cap: str = ""  #: config key of a cap c on logits, which become ``c tanh(logits / c)``
    per_layer_keys: tuple[str, ...] = ("layer_types",)  #: lists in config.json with one entry for each layer

    @property
    def prefix(self) -> str:
        """What the names of the decoder's tensors begin with in a causal LM, and lack in a base model."""
        return self.layers.partition(".")[0]

    @property
    def outer(self) -> Tensors:
        """Tensors outside the blocks -> the space of each axis."""
        return {self.embedding: (None, "hidden"), self.final_norm: ("hidden",), self.head: (None, "hidden")}

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

    def reader(self, space: str) -> str:
        """The linear that reads what the units of ``ffn`` or ``kv`` put out."""
        (reader,) = self.sites[{"ffn": self.ffn_site, "kv": self.kv_site}[space]].readers
        return reader

    def bias_switch(self, module: str) -> str | None:
        """The config key that gives ``module`` (a linear) a bias; None if the architecture has no such bias."""
        return self.optional.get(f"{module}.bias")


_CONFIG_KEYS = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}

_ATTENTION: Tensors = {
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
}
_QKV_BIASES: Tensors = {
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
}
_ATTENTION_BIASES: Tensors = {**_QKV_BIASES, "self_attn.o_proj.bias": ("hidden",)}
_FFN: Tensors = {
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}
_FFN_BIASES: Tensors = {
    "mlp.gate_proj.bias": ("ffn",),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.bias": ("hidden",),
}
_TWO_NORMS: Tensors = {"input_layernorm.weight": ("hidden",), "post_attention_layernorm.weight": ("hidden",)}
_HEAD_NORMS: Tensors = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}

_ATTENTION_SWITCH = dict.fromkeys(_ATTENTION_BIASES, "attention_bias")

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUTS = {
    "attention_output": Site("self_attn.o_proj", "query", readers=("self_attn.o_proj",)),
    "ffn_hidden": Site("mlp.down_proj", "ffn", readers=("mlp.down_proj",)),
}


def _pre_norm(attention: tuple[str, ...], ffn: tuple[str, ...], ffn_norm: str) -> dict[str, Site]:
    """The sites of a block whose norms stand before attention and FFN."""
    return {
        "attention_input": Site("input_layernorm", "hidden", output=True, readers=attention),
        "ffn_input": Site(ffn_norm, "hidden", output=True, readers=ffn),
        **_OUTPUTS,
    }


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

_LLAMA_SITES = _pre_norm(_QKV, ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    block={**_TWO_NORMS, **_ATTENTION, **_ATTENTION_BIASES, **_FFN, **_FFN_BIASES},
    optional={**_ATTENTION_SWITCH, **dict.fromkeys(_FFN_BIASES, "mlp_bias")},
    sites=_LLAMA_SITES,
    heads_divide_hidden=True,
    relaxed=("mistral", "MistralForCausalLM", {"sliding_window": None}),
)

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    block={**_TWO_NORMS, **_ATTENTION, **_FFN},
    sites=_LLAMA_SITES,
)

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    block={**_TWO_NORMS, **_ATTENTION, **_QKV_BIASES, **_FFN},
    sites=_LLAMA_SITES,
)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    block={**_TWO_NORMS, **_ATTENTION, **_HEAD_NORMS, **_ATTENTION_BIASES, **_FFN},
    optional=_ATTENTION_SWITCH,
    sites=_LLAMA_SITES,
    derives_head_dim=False,
)

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    block={
        **_TWO_NORMS,
        "pre_feedforward_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
        **_ATTENTION,
        **_HEAD_NORMS,
        **_ATTENTION_BIASES,
        **_FFN,
    },
    optional=_ATTENTION_SWITCH,
    sites=_pre_norm(_QKV, ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    writers=_POST_NORMS,
    derives_head_dim=False,
    heads_divide_hidden=True,
    embedding_grows=True,
    norm_offset=1.0,
    logit_cap="final_logit_softcapping",
)

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    block={
        "post_attention_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
        **_ATTENTION,
        "self_attn.q_norm.weight": ("query",),
        "self_attn.k_norm.weight": ("kv",),
        **_ATTENTION_BIASES,
        **_FFN,
    },
    optional=_ATTENTION_SWITCH,
    # Its norms stand behind attention and FFN; the linears read the residual stream itself.
    sites={
        "attention_input": Site("self_attn.q_proj", "hidden", readers=_QKV),
        "ffn_input": Site("mlp.gate_proj", "hidden", readers=("mlp.gate_proj", "mlp.up_proj")),
        "attention_norm": Site("post_attention_layernorm", "hidden", output=True),
        "ffn_norm": Site("post_feedforward_layernorm", "hidden", output=True),
        **_OUTPUTS,
    },
    hidden_sites=("attention_norm", "ffn_norm"),
    writers=_POST_NORMS,
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    block={
        **_TWO_NORMS,
        "self_attn.qkv_proj.weight": (("query", "kv", "kv"), "hidden"),
        "self_attn.o_proj.weight": ("hidden", "query"),
        "mlp.gate_up_proj.weight": (("ffn", "ffn"), "hidden"),
        "mlp.down_proj.weight": ("hidden", "ffn"),
    },
    sites=_pre_norm(("self_attn.qkv_proj",), ("mlp.gate_up_proj",), "post_attention_layernorm"),
)

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, OLMO2, PHI3)


def family_of(model_type: str, *, where: str) -> Family:
    """Find the family of a ``model_type``.

    Raises:
        UserError: if no family has it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    names = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise UserError(
        f"{where}: model_type {model_type!r} is not a known family (known: {names}); "
        "a new one is a table in families.py, see docs/architecture.md"
    )
