"""Pieces that rows of the table share: attention, a gated FFN, norms, and where they are read."""

from __future__ import annotations

from secateur.model.families.family import Site, Tensors

__all__ = [
    "ATTENTION",
    "ATTENTION_BIASES",
    "ATTENTION_SWITCH",
    "FFN",
    "FFN_BIASES",
    "HEAD_NORMS",
    "OUTPUTS",
    "POST_NORMS",
    "QKV",
    "QKV_BIASES",
    "TWO_NORMS",
    "pre_norm",
]

ATTENTION: Tensors = {
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
}
QKV_BIASES: Tensors = {
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
}
ATTENTION_BIASES: Tensors = {**QKV_BIASES, "self_attn.o_proj.bias": ("hidden",)}
FFN: Tensors = {
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}
FFN_BIASES: Tensors = {
    "mlp.gate_proj.bias": ("ffn",),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.bias": ("hidden",),
}
TWO_NORMS: Tensors = {"input_layernorm.weight": ("hidden",), "post_attention_layernorm.weight": ("hidden",)}
HEAD_NORMS: Tensors = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}

ATTENTION_SWITCH = dict.fromkeys(ATTENTION_BIASES, "attention_bias")

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUTS = {
    "attention_output": Site("self_attn.o_proj", "query", readers=("self_attn.o_proj",)),
    "ffn_hidden": Site("mlp.down_proj", "ffn", readers=("mlp.down_proj",)),
}
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def pre_norm(attention: tuple[str, ...], ffn: tuple[str, ...], ffn_norm: str) -> dict[str, Site]:
    """The sites of a block whose norms stand before attention and FFN."""
    return {
        "attention_input": Site("input_layernorm", "hidden", output=True, readers=attention),
        "ffn_input": Site(ffn_norm, "hidden", output=True, readers=ffn),
        **OUTPUTS,
    }
