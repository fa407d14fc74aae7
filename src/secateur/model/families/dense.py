"""Families whose blocks are attention, then a gated FFN, in one stream: Llama and its likes, Gemma, OLMo, Phi-3."""

from __future__ import annotations

import math
from dataclasses import replace

from secateur.model.families.family import Family, Site, Tensors
from secateur.model.families.pieces import (
    ATTENTION,
    ATTENTION_BIASES,
    ATTENTION_SWITCH,
    FFN,
    FFN_BIASES,
    HEAD_NORMS,
    OUTPUTS,
    POST_NORMS,
    QKV,
    QKV_BIASES,
    TWO_NORMS,
    pre_norm,
)

__all__ = [
    "APERTUS",
    "ARCEE",
    "ERNIE4_5",
    "EXAONE4",
    "GEMMA",
    "GEMMA2",
    "GEMMA3",
    "GLM",
    "GLM4",
    "GRANITE",
    "HELIUM",
    "HUNYUAN",
    "INTERNLM3",
    "LLAMA",
    "MINISTRAL",
    "MINISTRAL3",
    "MISTRAL",
    "OLMO",
    "OLMO2",
    "OLMO3",
    "PHI3",
    "QWEN2",
    "QWEN2_VL",
    "QWEN3",
    "SEED_OSS",
    "SMOLLM3",
]

_BIAS_SWITCHES = {**ATTENTION_SWITCH, **dict.fromkeys(FFN_BIASES, "mlp_bias")}

_LLAMA_SITES = pre_norm(QKV, ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    block={**TWO_NORMS, **ATTENTION, **ATTENTION_BIASES, **FFN, **FFN_BIASES},
    optional=_BIAS_SWITCHES,
    sites=_LLAMA_SITES,
    heads_divide_hidden=True,
    relaxed=("mistral", "MistralForCausalLM", {"sliding_window": None}),
)

#: Llama without the rule on hidden size and heads
_LLAMA_LIKE = replace(LLAMA, heads_divide_hidden=False, relaxed=None)

SMOLLM3 = replace(_LLAMA_LIKE, name="smollm3", model_types=("smollm3",), pattern=4)

# Its factors of embeddings, residuals and attention scores are constants: nothing in them is cut.
GRANITE = replace(_LLAMA_LIKE, name="granite", model_types=("granite",), logit_divisor="logits_scaling")

SEED_OSS = replace(
    _LLAMA_LIKE,
    name="seed_oss",
    model_types=("seed_oss",),
    optional={**_BIAS_SWITCHES, "self_attn.o_proj.bias": "attention_out_bias"},
    derives_head_dim=False,
)

# Opens as LlamaForCausalLM. Both switches must be equal; older files spell them `qkv_bias` and `bias`.
INTERNLM3 = replace(
    LLAMA,
    name="internlm3",
    model_types=("internlm3",),
    optional=dict.fromkeys(_BIAS_SWITCHES, "attention_bias"),
    twin_keys={"attention_bias": ("mlp_bias",)},
    derives_head_dim=False,
)

ERNIE4_5 = replace(
    _LLAMA_LIKE,
    name="ernie4_5",
    model_types=("ernie4_5",),
    optional=dict.fromkeys(_BIAS_SWITCHES, "use_bias"),
    derives_head_dim=False,
)

# The output projection is square. Ernie 4.5 is the same function without that rule, interleaved RoPE included.
HELIUM = replace(
    _LLAMA_LIKE,
    name="helium",
    model_types=("helium",),
    block={name: axes for name, axes in LLAMA.block.items() if name != "self_attn.o_proj.bias"},
    optional={name: switch for name, switch in _BIAS_SWITCHES.items() if name != "self_attn.o_proj.bias"},
    heads_span_hidden=True,
    relaxed=("ernie4_5", "Ernie4_5ForCausalLM", {}),
    derives_head_dim=False,
)

_NO_GATE = ("mlp.gate_proj.weight", "mlp.gate_proj.bias")

ARCEE = replace(
    LLAMA,
    name="arcee",
    model_types=("arcee",),
    block={name: axes for name, axes in LLAMA.block.items() if name not in _NO_GATE},
    optional={name: switch for name, switch in _BIAS_SWITCHES.items() if name not in _NO_GATE},
    sites=pre_norm(QKV, ("mlp.up_proj",), "post_attention_layernorm"),
    relaxed=None,
)

# Its norms have no weights.
OLMO = replace(
    _LLAMA_LIKE,
    name="olmo",
    model_types=("olmo",),
    block={**ATTENTION, **ATTENTION_BIASES, **FFN},
    optional=ATTENTION_SWITCH,
    outer={"model.embed_tokens.weight": (None, "hidden"), "lm_head.weight": (None, "hidden")},
    norms_center=True,
)

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    block={**TWO_NORMS, **ATTENTION, **FFN},
    sites=_LLAMA_SITES,
)

MINISTRAL = replace(MISTRAL, name="ministral", model_types=("ministral",))

# Queries grow with their position (`llama_4_scaling_beta` in `rope_parameters`): within a head, so nothing to cut.
MINISTRAL3 = replace(MISTRAL, name="ministral3", model_types=("ministral3",), derives_head_dim=False)

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    block={**TWO_NORMS, **ATTENTION, **QKV_BIASES, **FFN},
    sites=_LLAMA_SITES,
)

QWEN2_VL = replace(QWEN2, name="qwen2_vl", model_types=("qwen2_vl_text", "qwen2_5_vl_text"), heads_span_hidden=True)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3", "qwen3_vl_text"),
    block={**TWO_NORMS, **ATTENTION, **HEAD_NORMS, **ATTENTION_BIASES, **FFN},
    optional=ATTENTION_SWITCH,
    sites=_LLAMA_SITES,
    derives_head_dim=False,
)

HUNYUAN = replace(
    QWEN3,
    name="hunyuan_v1_dense",
    model_types=("hunyuan_v1_dense",),
    block={
        **{name: axes for name, axes in QWEN3.block.items() if name not in HEAD_NORMS},
        "self_attn.query_layernorm.weight": ("head",),
        "self_attn.key_layernorm.weight": ("head",),
    },
    derives_head_dim=True,
)

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    block={
        **TWO_NORMS,
        "pre_feedforward_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
        **ATTENTION,
        **HEAD_NORMS,
        **ATTENTION_BIASES,
        **FFN,
    },
    optional=ATTENTION_SWITCH,
    sites=pre_norm(QKV, ("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    writers=POST_NORMS,
    derives_head_dim=False,
    heads_divide_hidden=True,
    embedding_grows=True,
    norm_offset=1.0,
    logit_cap="final_logit_softcapping",
    pattern=6,
)

GEMMA2 = replace(
    GEMMA3,
    name="gemma2",
    model_types=("gemma2",),
    block={name: axes for name, axes in GEMMA3.block.items() if name not in HEAD_NORMS},
    pattern=2,
)

GEMMA = replace(
    GEMMA2,
    name="gemma",
    model_types=("gemma",),
    block={**TWO_NORMS, **ATTENTION, **ATTENTION_BIASES, **FFN},
    sites=_LLAMA_SITES,
    writers=LLAMA.writers,
    heads_divide_hidden=False,
    logit_cap="",
    pattern=0,
)

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    block={
        "post_attention_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
        **ATTENTION,
        "self_attn.q_norm.weight": ("query",),
        "self_attn.k_norm.weight": ("kv",),
        **ATTENTION_BIASES,
        **FFN,
    },
    optional=ATTENTION_SWITCH,
    # Its norms stand behind attention and FFN; the linears read the residual stream itself.
    sites={
        "attention_input": Site("self_attn.q_proj", "hidden", readers=QKV),
        "ffn_input": Site("mlp.gate_proj", "hidden", readers=("mlp.gate_proj", "mlp.up_proj")),
        "attention_norm": Site("post_attention_layernorm", "hidden", output=True),
        "ffn_norm": Site("post_feedforward_layernorm", "hidden", output=True),
        **OUTPUTS,
    },
    hidden_sites=("attention_norm", "ffn_norm"),
    writers=POST_NORMS,
)

OLMO3 = replace(OLMO2, name="olmo3", model_types=("olmo3",), pattern=4)

# The names of OLMo 2, but norms of queries and keys within each head.
EXAONE4 = replace(
    OLMO2,
    name="exaone4",
    model_types=("exaone4",),
    block={**{n: axes for n, axes in OLMO2.block.items() if n not in ATTENTION_BIASES}, **HEAD_NORMS},
    optional={},
    pattern=4,
)

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    block={
        **TWO_NORMS,
        "self_attn.qkv_proj.weight": (("query", "kv", "kv"), "hidden"),
        "self_attn.o_proj.weight": ("hidden", "query"),
        "mlp.gate_up_proj.weight": (("ffn", "ffn"), "hidden"),
        "mlp.down_proj.weight": ("hidden", "ffn"),
    },
    sites=pre_norm(("self_attn.qkv_proj",), ("mlp.gate_up_proj",), "post_attention_layernorm"),
)

_GLM_BLOCK: Tensors = {
    **TWO_NORMS,
    **ATTENTION,
    **QKV_BIASES,
    "mlp.gate_up_proj.weight": (("ffn", "ffn"), "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}

GLM = Family(
    name="glm",
    model_types=("glm",),
    block=_GLM_BLOCK,
    optional=dict.fromkeys(QKV_BIASES, "attention_bias"),
    sites=pre_norm(QKV, ("mlp.gate_up_proj",), "post_attention_layernorm"),
    derives_head_dim=False,
)

GLM4 = replace(
    GLM,
    name="glm4",
    model_types=("glm4",),
    block={
        **_GLM_BLOCK,
        "post_self_attn_layernorm.weight": ("hidden",),
        "post_mlp_layernorm.weight": ("hidden",),
    },
    writers=("post_self_attn_layernorm", "post_mlp_layernorm"),
)

APERTUS = Family(
    name="apertus",
    model_types=("apertus",),
    block={
        "attention_layernorm.weight": ("hidden",),
        "feedforward_layernorm.weight": ("hidden",),
        **ATTENTION,
        **HEAD_NORMS,
        **ATTENTION_BIASES,
        "mlp.up_proj.weight": ("ffn", "hidden"),
        "mlp.down_proj.weight": ("hidden", "ffn"),
        # of its activation: two trained and two constant numbers
        "mlp.act_fn.alpha_p": ("one",),
        "mlp.act_fn.alpha_n": ("one",),
        "mlp.act_fn.beta": (),
        "mlp.act_fn.eps": (),
    },
    buffers=("mlp.act_fn.beta", "mlp.act_fn.eps"),
    fixed={"one": (1,)},
    optional=ATTENTION_SWITCH,
    sites={
        "attention_input": Site("attention_layernorm", "hidden", output=True, readers=QKV),
        "ffn_input": Site("feedforward_layernorm", "hidden", output=True, readers=("mlp.up_proj",)),
        **OUTPUTS,
    },
    first_values={  # softplus of them, the latter plus beta, is 0.8
        "mlp.act_fn.alpha_p": lambda value, _: value.fill_(math.log(math.expm1(0.8))),
        "mlp.act_fn.alpha_n": lambda value, _: value.fill_(math.log(math.expm1(0.3))),
    },
)
