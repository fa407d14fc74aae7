"""Families whose layers are of several kinds with tensors of their own: Qwen 3.5, Gemma 4, LFM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secateur.model.families.family import Family, Site, Tensors
from secateur.model.families.pieces import (
    ATTENTION,
    ATTENTION_BIASES,
    ATTENTION_SWITCH,
    FFN,
    HEAD_NORMS,
    POST_NORMS,
    QKV,
    TWO_NORMS,
    pre_norm,
)

__all__ = ["GEMMA4", "LFM2", "QWEN3_5"]


def _first_full(config: Any) -> list[int]:
    """The first layer with attention: transformers generates with none of those models that have no such layer."""
    return [list(config.layer_types).index("full_attention")]


_LINEAR_QKV = ("linear_key", "linear_key", "linear_value")
_LINEAR_INPUTS = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))

QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5_text",),
    block={**TWO_NORMS, **FFN},
    kinds={
        "full_attention": {
            **ATTENTION,
            "self_attn.q_proj.weight": ("gated_query", "hidden"),
            **ATTENTION_BIASES,
            "self_attn.q_proj.bias": ("gated_query",),
            **HEAD_NORMS,
        },
        "linear_attention": {
            "linear_attn.in_proj_qkv.weight": (_LINEAR_QKV, "hidden"),
            "linear_attn.in_proj_z.weight": ("linear_value", "hidden"),
            "linear_attn.in_proj_b.weight": ("linear_heads", "hidden"),
            "linear_attn.in_proj_a.weight": ("linear_heads", "hidden"),
            "linear_attn.out_proj.weight": ("hidden", "linear_value"),
            "linear_attn.conv1d.weight": (_LINEAR_QKV, "one", "kernel"),
            "linear_attn.dt_bias": ("linear_heads",),
            "linear_attn.A_log": ("linear_heads",),
            "linear_attn.norm.weight": ("linear_head",),
        },
    },
    fixed={
        "linear_key": ("linear_num_key_heads", "linear_key_head_dim"),
        "linear_value": ("linear_num_value_heads", "linear_value_head_dim"),
        "linear_heads": ("linear_num_value_heads",),
        "linear_head": ("linear_value_head_dim",),
        "kernel": ("linear_conv_kernel_dim",),
        "one": (1,),
    },
    optional=ATTENTION_SWITCH,
    sites={
        **pre_norm((*QKV, *_LINEAR_INPUTS), ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        "linear_output": Site("linear_attn.out_proj", "linear_value", readers=("linear_attn.out_proj",)),
    },
    writers=("self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"),
    derives_head_dim=False,
    norm_offset=1.0,
    first_values={
        "linear_attn.dt_bias": lambda value, _: value.fill_(1.0),
        "linear_attn.A_log": lambda value, generator: value.uniform_(0.01, 16.0, generator=generator).log_(),
        "linear_attn.norm.weight": lambda value, _: value.fill_(1.0),  # the one norm without an offset
    },
    pattern=4,
    pinned=_first_full,
)

#: In full-attention layers of Gemma 4 heads have another size, and there may be other KV heads.
_FULL = {"query": "full_query", "kv": "full_kv", "head": "full_head"}


def _gemma4_attention(*, full: bool, lacks: tuple[str, ...] = ()) -> Tensors:
    tensors = {**ATTENTION, **ATTENTION_BIASES, **HEAD_NORMS}
    return {
        name: tuple(_FULL.get(str(axis), axis) if full else axis for axis in axes)
        for name, axes in tensors.items()
        if name.split(".")[1] not in lacks
    }


def _gemma4_kinds(config: Any) -> list[str]:
    """The kinds of the layers: by attention, and by which of keys and values they compute themselves."""
    first_shared = config.num_hidden_layers - (config.num_kv_shared_layers or 0)
    kinds = [*config.layer_types]
    for layer, kind in enumerate(kinds):
        if layer >= first_shared:
            kinds[layer] += "_of_earlier_keys"
        elif kind == "full_attention" and config.attention_k_eq_v:
            kinds[layer] += "_of_keys_alone"
    return kinds


def _gemma4_pinned(config: Any) -> list[int]:
    """The last layer, which must be a full one, and the layers whose keys and values later layers read."""
    types, shared = list(config.layer_types), config.num_kv_shared_layers or 0
    sources = {kind: layer for layer, kind in enumerate(types[: len(types) - shared])} if shared else {}
    return [*sources.values(), len(types) - 1]


def _of_kind(kind: str, key: str) -> Callable[[Any], int]:
    """The value of a config key that differs between kinds of layers; that of the first layer where the kind is none.

    transformers writes these values by layer, in ``per_layer_config``.
    """

    def value(config: Any) -> int:
        types = list(config.layer_types)
        return getattr(config.per_layer_config[types.index(kind) if kind in types else 0], key)

    return value


GEMMA4 = Family(
    name="gemma4",
    model_types=("gemma4_unified_text",),
    block={
        **TWO_NORMS,
        "pre_feedforward_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
        "layer_scalar": ("one",),
        **FFN,
    },
    kinds={
        "sliding_attention": _gemma4_attention(full=False),
        "full_attention": _gemma4_attention(full=True),
        "full_attention_of_keys_alone": {
            **_gemma4_attention(full=True, lacks=("v_proj",)),
            "self_attn.k_proj.weight": ("full_keys", "hidden"),
            "self_attn.k_proj.bias": ("full_keys",),
        },
        "sliding_attention_of_earlier_keys": _gemma4_attention(full=False, lacks=("k_proj", "v_proj", "k_norm")),
        "full_attention_of_earlier_keys": _gemma4_attention(full=True, lacks=("k_proj", "v_proj", "k_norm")),
    },
    kinds_of=_gemma4_kinds,
    fixed={
        "full_query": ("num_attention_heads", _of_kind("full_attention", "head_dim")),
        "full_kv": (_of_kind("full_attention", "num_key_value_heads"), _of_kind("full_attention", "head_dim")),
        "full_keys": (_of_kind("full_attention", "num_key_value_heads"), _of_kind("full_attention", "head_dim")),
        "full_head": (_of_kind("full_attention", "head_dim"),),
        "one": (1,),
    },
    buffers=("layer_scalar",),
    derived={
        "head_dim": _of_kind("sliding_attention", "head_dim"),
        "kv_heads": _of_kind("sliding_attention", "num_key_value_heads"),
    },
    uncut={"kv": "its full layers have heads of another size, and other KV heads, than its sliding layers"},
    embedding_grows=True,
    cached=("kv", "full_kv", "full_keys", "full_keys"),
    optional=ATTENTION_SWITCH,
    sites=pre_norm(QKV, ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    writers=POST_NORMS,
    stream_scale="layer_scalar",
    derives_head_dim=False,
    logit_cap="final_logit_softcapping",
    pinned=_gemma4_pinned,
)


def _lfm2_ffn(config: Any) -> int:
    """The FFN size of the weights, which ``intermediate_size`` is not while ``block_auto_adjust_ff_dim`` is true."""
    size, multiple = config.intermediate_size, config.block_multiple_of
    if not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is None:
        return size
    return multiple * -(-int(config.block_ffn_dim_multiplier * size) // multiple)


_CONV_BIASES: Tensors = {
    "conv.in_proj.bias": (("conv", "conv", "conv"),),
    "conv.conv.bias": ("conv",),
    "conv.out_proj.bias": ("hidden",),
}

LFM2 = Family(
    name="lfm2",
    model_types=("lfm2",),
    block={
        "operator_norm.weight": ("hidden",),
        "ffn_norm.weight": ("hidden",),
        "feed_forward.w1.weight": ("ffn", "hidden"),
        "feed_forward.w3.weight": ("ffn", "hidden"),
        "feed_forward.w2.weight": ("hidden", "ffn"),
    },
    kinds={
        "full_attention": {
            **{name: axes for name, axes in ATTENTION.items() if "o_proj" not in name},
            "self_attn.out_proj.weight": ("hidden", "query"),
            "self_attn.q_layernorm.weight": ("head",),
            "self_attn.k_layernorm.weight": ("head",),
        },
        "conv": {
            "conv.in_proj.weight": (("conv", "conv", "conv"), "hidden"),
            "conv.out_proj.weight": ("hidden", "conv"),
            "conv.conv.weight": ("conv", "one", "kernel"),
            **_CONV_BIASES,
        },
    },
    fixed={"conv": ("hidden_size",), "kernel": ("conv_L_cache",), "one": (1,)},
    optional=dict.fromkeys(_CONV_BIASES, "conv_bias"),
    outer={
        "model.embed_tokens.weight": (None, "hidden"),
        "model.embedding_norm.weight": ("hidden",),
        "lm_head.weight": (None, "hidden"),
    },
    final_norm="model.embedding_norm",
    uncut={"hidden": "its config gives its convolutions as many channels as the residual stream has"},
    derived={"ffn": _lfm2_ffn},
    stated={"block_auto_adjust_ff_dim": False},
    old_keys={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
    sites={
        "operator_input": Site("operator_norm", "hidden", output=True, readers=(*QKV, "conv.in_proj")),
        "ffn_input": Site("ffn_norm", "hidden", output=True, readers=("feed_forward.w1", "feed_forward.w3")),
        "attention_output": Site("self_attn.out_proj", "query", readers=("self_attn.out_proj",)),
        "conv_output": Site("conv.out_proj", "conv", readers=("conv.out_proj",)),
        "ffn_hidden": Site("feed_forward.w2", "ffn", readers=("feed_forward.w2",)),
    },
    hidden_sites=("operator_input", "ffn_input"),
    writers=("self_attn.out_proj", "conv.out_proj", "feed_forward.w2"),
    pinned=_first_full,
)
