"""Families whose norms subtract the mean (LayerNorm): Phi and Cohere 2 with parallel blocks, StarCoder 2, Nemotron."""

from __future__ import annotations

from secateur.model.families.family import OUTER, Family, Site, Tensors
from secateur.model.families.pieces import (
    ATTENTION,
    ATTENTION_BIASES,
    ATTENTION_SWITCH,
    FFN,
    OUTPUTS,
    QKV,
    QKV_BIASES,
    TWO_NORMS,
    pre_norm,
)

__all__ = ["COHERE2", "NEMOTRON", "PHI", "STARCODER2"]

_TWO_BIASED_NORMS: Tensors = {**TWO_NORMS, **{name.replace("weight", "bias"): ("hidden",) for name in TWO_NORMS}}
_NORM_BIAS: Tensors = {"model.norm.bias": ("hidden",)}

#: Attention and FFN read the output of one norm.
_PARALLEL_NORM: Tensors = {"input_layernorm.weight": ("hidden",)}

PHI = Family(
    name="phi",
    model_types=("phi",),
    block={
        **_PARALLEL_NORM,
        "input_layernorm.bias": ("hidden",),
        **{name: axes for name, axes in ATTENTION.items() if "o_proj" not in name},
        **QKV_BIASES,
        "self_attn.dense.weight": ("hidden", "query"),
        "self_attn.dense.bias": ("hidden",),
        "mlp.fc1.weight": ("ffn", "hidden"),
        "mlp.fc1.bias": ("ffn",),
        "mlp.fc2.weight": ("hidden", "ffn"),
        "mlp.fc2.bias": ("hidden",),
    },
    outer={
        "model.embed_tokens.weight": (None, "hidden"),
        "model.final_layernorm.weight": ("hidden",),
        "model.final_layernorm.bias": ("hidden",),
        "lm_head.weight": (None, "hidden"),
        "lm_head.bias": (None,),
    },
    final_norm="model.final_layernorm",
    sites={
        "block_input": Site("input_layernorm", "hidden", output=True, readers=(*QKV, "mlp.fc1")),
        "attention_output": Site("self_attn.dense", "query", readers=("self_attn.dense",)),
        "ffn_hidden": Site("mlp.fc2", "ffn", readers=("mlp.fc2",)),
    },
    hidden_sites=("block_input",),
    writers=("self_attn.dense", "mlp.fc2"),
    norms_center=True,
)

COHERE2 = Family(
    name="cohere2",
    model_types=("cohere2",),
    block={**_PARALLEL_NORM, **ATTENTION, **ATTENTION_BIASES, **FFN},
    optional=ATTENTION_SWITCH,
    sites={
        "block_input": Site("input_layernorm", "hidden", output=True, readers=(*QKV, "mlp.gate_proj", "mlp.up_proj")),
        **OUTPUTS,
    },
    hidden_sites=("block_input",),
    norms_center=True,
    logit_multiplier="logit_scale",
    pattern=4,
)

_STARCODER2_LINEARS: Tensors = {
    **ATTENTION,
    **ATTENTION_BIASES,
    "mlp.c_fc.weight": ("ffn", "hidden"),
    "mlp.c_fc.bias": ("ffn",),
    "mlp.c_proj.weight": ("hidden", "ffn"),
    "mlp.c_proj.bias": ("hidden",),
}

STARCODER2 = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    block={**_TWO_BIASED_NORMS, **_STARCODER2_LINEARS},
    optional=dict.fromkeys((name for name in _STARCODER2_LINEARS if name.endswith("bias")), "use_bias"),
    outer={**OUTER, **_NORM_BIAS},
    sites={
        **pre_norm(QKV, ("mlp.c_fc",), "post_attention_layernorm"),
        "ffn_hidden": Site("mlp.c_proj", "ffn", readers=("mlp.c_proj",)),
    },
    writers=("self_attn.o_proj", "mlp.c_proj"),
    norms_center=True,
)

_NEMOTRON_FFN: Tensors = {name: axes for name, axes in FFN.items() if "gate" not in name}
_NEMOTRON_FFN_BIASES: Tensors = {"mlp.up_proj.bias": ("ffn",), "mlp.down_proj.bias": ("hidden",)}

NEMOTRON = Family(
    name="nemotron",
    model_types=("nemotron",),
    block={**_TWO_BIASED_NORMS, **ATTENTION, **ATTENTION_BIASES, **_NEMOTRON_FFN, **_NEMOTRON_FFN_BIASES},
    optional={**ATTENTION_SWITCH, **dict.fromkeys(_NEMOTRON_FFN_BIASES, "mlp_bias")},
    outer={**OUTER, **_NORM_BIAS},
    sites=pre_norm(QKV, ("mlp.up_proj",), "post_attention_layernorm"),
    norm_offset=1.0,
    norms_center=True,
)
