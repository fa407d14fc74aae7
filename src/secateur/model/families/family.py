"""The columns of the family table: what a row says of one architecture.

A *space* is a set of channels that every tensor touching it must keep or drop together:

=============== ===========================================================================================
``hidden``      the residual stream, one for the whole model
``ffn``         the intermediate channels of one layer's FFN
``kv``          the KV heads of one layer, ``head_dim`` channels each
``query``       the query heads of one layer, cut along with the KV head that they share
``gated_query`` the same with twice as many channels: a head's query, then its gate (Qwen 3.5)
``heads``       one value for each query head, cut along with its KV head
``head``        the channels within one head, never cut
``experts``     the routed experts of one layer
``expert_ffn``  the intermediate channels of one routed expert, which every expert chooses for itself
``expert_pair`` the same twice as many, gate and up side by side for each channel (gpt-oss)
any other       a space of the row's own, with its size in the column ``fixed``, never cut
=============== ===========================================================================================

An axis that is a tuple is several spaces laid end to end, as in a fused projection; None is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["CONFIG_KEYS", "OUTER", "SPACE_OF", "Axis", "Family", "Granularity", "Site", "Tensors", "switched_on"]

Granularity = Literal["depth", "width", "depth+width", "sparse", "experts"]  #: what pruning removes

Axis = str | tuple[str, ...] | None  #: a space, several laid end to end, or None for the vocabulary

Tensors = Mapping[str, tuple[Axis, ...]]  #: name of a tensor -> the space of each of its axes

#: space of channels -> the space whose units it is cut by, where that is another one
SPACE_OF: Mapping[str, str] = MappingProxyType(
    {"query": "kv", "gated_query": "kv", "heads": "kv", "expert_pair": "expert_ffn"}
)

OUTER: Tensors = {
    "model.embed_tokens.weight": (None, "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": (None, "hidden"),
}

CONFIG_KEYS = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class Site:
    """A place in a decoder block where activations are observed: a module's input or its output.

    The linears in ``readers`` see exactly the observed values, so that one statistic serves them all. Blocks that lack
    the module, or a reader, pass it over.
    """

    module: str
    space: str  #: of the observed channels
    output: bool = False
    readers: tuple[str, ...] = ()


def _layer_types(config: Any) -> Sequence[str]:
    return config.layer_types


@dataclass(frozen=True)
class Family:
    """One row: the tensors of an architecture with the space of each axis, and what its config.json says of them."""

    name: str

    #: values of ``model_type`` in config.json: ``("llama", "helium")``
    model_types: tuple[str, ...]

    #: tensors of every block, relative to it: ``{"mlp.down_proj.weight": ("hidden", "ffn"), ...}``
    block: Tensors

    #: where activations are read: ``{"ffn_hidden": Site("mlp.down_proj", "ffn", readers=("mlp.down_proj",)), ...}``
    sites: Mapping[str, Site]

    #: kind of a layer -> the tensors that blocks of this kind have besides ``block``; empty where all blocks are alike:
    #: ``{"linear_attention": {"linear_attn.out_proj.weight": ("hidden", "linear_value"), ...}, ...}``
    kinds: Mapping[str, Tensors] = field(default_factory=dict)

    #: the kind of each layer, from the config; asked only where ``kinds`` has entries
    kinds_of: Callable[[Any], Sequence[str]] = _layer_types

    #: space that is never cut -> factors of its size: config keys (``a|b`` is the first that is set, and not to zero),
    #: numbers, or functions of the config: ``{"linear_value": ("linear_num_value_heads", "linear_value_head_dim")}``
    fixed: Mapping[str, tuple[str | int | Callable[[Any], int], ...]] = field(default_factory=dict)

    #: block tensors that are stored but not trained, and so are no parameters: ``("layer_scalar",)`` in Gemma 4
    buffers: tuple[str, ...] = ()

    #: tensors outside the blocks: ``{**OUTER, "lm_head.bias": (None,)}`` in Phi
    outer: Tensors = field(default_factory=lambda: OUTER)

    layers: str = "model.layers"  #: prefix of the decoder blocks' tensors, before ``.<index>.``
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm"  #: module of the last norm: ``model.final_layernorm`` in Phi

    #: what is not cut, of layers, hidden, ffn, kv, experts and expert_ffn -> the reason:
    #: ``{"kv": "heads differ from layer to layer"}``
    uncut: Mapping[str, str] = field(default_factory=dict)

    #: norm outputs whose magnitudes are a hidden channel's importance; one alone in a parallel block
    hidden_sites: tuple[str, ...] = ("attention_input", "ffn_input")

    ffn_site: str = "ffn_hidden"  #: the input of the down-projection
    kv_site: str = "attention_output"  #: the input of the output projection, query heads in order

    #: spaces of projections whose outputs are kept for later tokens; twice where they serve as keys and as values
    cached: tuple[str, ...] = ("kv",)

    #: modules whose output is added to the residual stream: the output norms in Gemma 3
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")

    #: block tensor that multiplies the whole residual stream at the end of a block: ``layer_scalar`` in Gemma 4
    stream_scale: str = ""

    #: tensor -> config key that switches it on, or ``!key`` for one that switches it off; ``a&b`` for two that must
    #: both be on: ``{"self_attn.o_proj.bias": "attention_bias"}``
    optional: Mapping[str, str] = field(default_factory=dict)

    #: switch -> config keys that always have its value: ``{"attention_bias": ("mlp_bias",)}`` in InternLM3
    twin_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    config_keys: Mapping[str, str] = field(default_factory=lambda: CONFIG_KEYS)  #: field of Shape -> config key

    #: field of Shape -> its value from the config, where no key states it: LFM2's adjusted FFN size
    derived: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)

    #: keys that a cut config.json always states: ``{"block_auto_adjust_ff_dim": False}`` in LFM2
    stated: Mapping[str, object] = field(default_factory=dict)

    #: keys that say the kinds of the layers, from these kinds: ``first_k_dense_replace`` in GLM-4 MoE
    kind_keys: Callable[[Sequence[str]], Mapping[str, object]] | None = None

    #: keys that a cut config.json lacks, since they repeat another one: ``("num_local_experts",)`` in Qwen 3 MoE
    unstated: tuple[str, ...] = ()

    #: the module within a block that runs the routed experts, ``mlp.experts``; empty for families without experts
    experts: str = ""

    #: tensor of a block -> its names in files, where they differ from the model's in memory. ``{expert}`` stands for
    #: the number of an expert whose part is stored alone; several names are laid end to end:
    #: ``{"mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", ...up_proj.weight"), ...}``
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    #: config keys of the number of groups of neighbouring experts, and of how many groups a token's experts come from:
    #: ``("n_group", "topk_group")`` in DeepSeek-V3
    expert_groups: tuple[str, str] | None = None

    #: config key of the number of layers behind the last one, which predict further tokens and which transformers
    #: leaves out: ``num_nextn_predict_layers`` in GLM-4 MoE
    further_layers: str = ""

    #: old name of a config key, which transformers prefers where a file has both -> its name; a cut config.json has the
    #: latter alone: ``{"block_ff_dim": "intermediate_size"}`` in LFM2
    old_keys: Mapping[str, str] = field(default_factory=dict)

    derives_head_dim: bool = True  #: a missing head size is hidden size / query heads, not a fixed default
    heads_divide_hidden: bool = False  #: the config refuses a hidden size that is no multiple of the query heads

    heads_span_hidden: bool = False  #: heads * head size is always the hidden size, whatever the config says

    #: the same function without these rules: its model_type, architecture and extra keys:
    #: ``("mistral", "MistralForCausalLM", {"sliding_window": None})``
    relaxed: tuple[str, str, Mapping[str, object]] | None = None

    embedding_grows: bool = False  #: the model multiplies embeddings by sqrt(hidden size)
    norm_offset: float = 0.0  #: a norm multiplies by its weight plus this: 1 in Gemma

    #: block tensor -> function of an empty tensor and a random generator that gives its first value in training from
    #: scratch, where it is no matrix, norm or bias: ``{"mlp.act_fn.alpha_p": lambda value, _: value.fill_(0.2)}``
    first_values: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)

    norms_center: bool = False  #: norms subtract the mean of the channels: LayerNorm in Phi
    logit_cap: str = ""  #: config key of a cap c on logits, which become ``c tanh(logits / c)``
    logit_multiplier: str = ""  #: config key of a factor of the logits: ``logit_scale`` in Cohere
    logit_divisor: str = ""  #: config key of a divisor of the logits: ``logits_scaling`` in Granite

    #: lists in config.json with one entry for each layer
    per_layer_keys: tuple[str, ...] = ("layer_types", "no_rope_layers", "mlp_layer_types")

    #: lists of layers' indices in config.json
    layer_index_keys: tuple[str, ...] = ("mlp_only_layers", "full_attn_idxs")

    #: period of the layers' kinds that llama.cpp and mlx-lm take from a constant, not from the file; 0 for none
    pattern: int = 0

    #: layers that no depth method may remove, from the config: those whose keys and values later layers read
    pinned: Callable[[Any], Sequence[int]] | None = None

    @property
    def prefix(self) -> str:
        """What the names of the decoder's tensors begin with in a causal LM, and lack in a base model."""
        return self.layers.partition(".")[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """What may be cut."""
        expert_axes = ("experts", "expert_ffn") if self.experts else ()
        return tuple(axis for axis in ("layers", "hidden", "ffn", "kv", *expert_axes) if axis not in self.uncut)

    def uncut_reason(self, axis: str) -> str:
        """Why an axis is not cut; empty if it may be."""
        no_experts = {} if self.experts else dict.fromkeys(("experts", "expert_ffn"), "it has no routed experts")
        return {**no_experts, **self.uncut}.get(axis, "")

    @property
    def final_norm_tensors(self) -> list[str]:
        """The tensors of the last norm; none where it has no weight."""
        return [name for name in self.outer if name.rpartition(".")[0] == self.final_norm]

    def tensors(self, kind: str) -> dict[str, tuple[Axis, ...]]:
        """The tensors that a block of this kind can have, optional ones included."""
        return {**self.block, **self.kinds.get(kind, {})}

    def block_tensor(self, layer: int, name: str) -> str:
        """The full name of a block's tensor."""
        return f"{self.layers}.{layer}.{name}"

    def within_experts(self, name: str) -> str:
        """The name of a block's tensor within the module of experts."""
        return name.removeprefix(f"{self.experts}.")

    def site_of(self, linear: str) -> str:
        """The site whose values the linear ``linear`` (a tensor name) reads."""
        module = linear.removesuffix(".weight")
        return next(name for name, site in self.sites.items() if module in site.readers)

    def reader(self, space: str) -> str:
        """The linear that reads what the units of ``ffn`` or ``kv`` put out."""
        (reader,) = self.sites[{"ffn": self.ffn_site, "kv": self.kv_site}[space]].readers
        return reader

    def can_have_bias(self, module: str) -> bool:
        """Whether ``module`` (a linear) has a bias, or a config key gives it one."""
        name = f"{module}.bias"
        return name in self.block or any(name in tensors for tensors in self.kinds.values())

    def bias_switch(self, module: str) -> str | None:
        """The config key that gives ``module`` (a linear) a bias; None if it always or never has one."""
        return self.optional.get(f"{module}.bias")

    def logit_scale(self, config: Any) -> float:
        """The factor between the product of states and head, and the logits before a cap."""
        multiplier = getattr(config, self.logit_multiplier) if self.logit_multiplier else 1.0
        return multiplier / (getattr(config, self.logit_divisor) if self.logit_divisor else 1.0)

    def cap(self, config: Any) -> float | None:
        """The bound on logits; None for none."""
        return getattr(config, self.logit_cap, None) if self.logit_cap else None


def switched_on(switch: str, config: Any) -> bool:
    """Whether a config switches a tensor on; see :attr:`Family.optional`."""
    return all(bool(getattr(config, key.removeprefix("!"), False)) != key.startswith("!") for key in switch.split("&"))
