"""Families whose blocks are attention, then a gated FFN, in one stream: Llama and its likes, Gemma, OLMo, Phi-3."""

from __future__ import annotations

from dataclasses import replace

from secateur.model.families.family import Family, Site, Tensors

__all__ = ["GEMMA3", "LLAMA", "MISTRAL", "OLMO2", "PHI3", "QWEN2", "QWEN2_VL", "QWEN3"]

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

QWEN2_VL = replace(QWEN2, name="qwen2_vl", model_types=("qwen2_vl_text", "qwen2_5_vl_text"), heads_span_hidden=True)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3", "qwen3_vl_text"),
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
    pattern=6,
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
