"""Families with routed experts: a router chooses a few of a layer's many FFNs for each token.

Tensors are named as in memory, where all experts of a layer lie in one tensor; the column ``stored`` says how files
name them, often expert by expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.errors import UserError
from secateur.model.families.family import CONFIG_KEYS, OUTER, Family, Site, Tensors
from secateur.model.families.pieces import (
    ATTENTION,
    ATTENTION_BIASES,
    ATTENTION_SWITCH,
    FFN,
    FFN_BIASES,
    HEAD_NORMS,
    QKV,
    QKV_BIASES,
    TWO_NORMS,
)

__all__ = [
    "DEEPSEEK_V3",
    "ERNIE4_5_MOE",
    "GLM4_MOE",
    "GPT_OSS",
    "GRANITEMOE",
    "MIXTRAL",
    "OLMOE",
    "QWEN2_MOE",
    "QWEN3_MOE",
]

_DENSE, _EXPERTS = "dense", "experts"  #: kinds of layers: with one FFN, and with a router and experts


def _experts(module: str = "mlp") -> dict[str, tuple[Any, ...]]:
    return {
        f"{module}.experts.gate_up_proj": ("experts", ("expert_ffn", "expert_ffn"), "hidden"),
        f"{module}.experts.down_proj": ("experts", "hidden", "expert_ffn"),
    }


_ROUTED: Tensors = {"mlp.gate.weight": ("experts", "hidden"), **_experts()}

_ONE_BY_ONE = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
}


def _shared(module: str) -> Tensors:
    """An FFN that every token goes through, beside the routed experts."""
    return {
        f"mlp.{module}.gate_proj.weight": ("shared_ffn", "hidden"),
        f"mlp.{module}.up_proj.weight": ("shared_ffn", "hidden"),
        f"mlp.{module}.down_proj.weight": ("hidden", "shared_ffn"),
    }


def _sites(shared: str = "", dense: bool = True, ffn_norm: str = "post_attention_layernorm") -> dict[str, Site]:
    """The sites of a block with two norms, whose FFN is dense in some layers, with a shared FFN beside the experts."""
    inputs = ("mlp.gate_proj", "mlp.up_proj") if dense else ()
    inputs += (f"mlp.{shared}.gate_proj", f"mlp.{shared}.up_proj") if shared else ()
    inputs += ("mlp.experts",) if inputs else ()
    sites = {
        "attention_input": Site("input_layernorm", "hidden", output=True, readers=QKV),
        "ffn_input": Site(ffn_norm, "hidden", output=True, readers=inputs),
        "attention_output": Site("self_attn.o_proj", "query", readers=("self_attn.o_proj",)),
    }
    if dense:
        sites["ffn_hidden"] = Site("mlp.down_proj", "ffn", readers=("mlp.down_proj",))
    if shared:
        sites["shared_hidden"] = Site(f"mlp.{shared}.down_proj", "shared_ffn", readers=(f"mlp.{shared}.down_proj",))
    return sites


def _keys(experts: str, ffn: str = "moe_intermediate_size", active: str = "num_experts_per_tok") -> dict[str, str]:
    """The config keys of a mixture: of the number of experts, their FFN size, and how many a token is routed to."""
    keys = {**CONFIG_KEYS, "experts": experts, "expert_ffn": ffn, "active": active}
    return keys if ffn != CONFIG_KEYS["ffn"] else {name: key for name, key in keys.items() if name != "ffn"}


_NO_FFN = {"ffn": "every layer has experts, whose channels are expert_ffn"}
_ONE_SIZE = {"expert_ffn": "one key of its config sizes routed and shared experts"}


def _qwen_kinds(config: Any) -> Sequence[str]:
    dense = config.mlp_only_layers or ()
    step = config.decoder_sparse_step
    return [_DENSE if i in dense or (i + 1) % step else _EXPERTS for i in range(config.num_hidden_layers)]


def _qwen_kind_keys(kinds: Sequence[str]) -> Mapping[str, object]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == _DENSE]}


def _leading_kinds(config: Any) -> Sequence[str]:
    first = config.first_k_dense_replace
    return [_DENSE if i < first else _EXPERTS for i in range(config.num_hidden_layers)]


def _leading_kind_keys(kinds: Sequence[str]) -> Mapping[str, object]:
    return {"first_k_dense_replace": kinds.count(_DENSE)}


def _ernie_kinds(config: Any) -> Sequence[str]:
    last = config.moe_layer_end_index if config.moe_layer_end_index >= 0 else config.num_hidden_layers - 1
    routed = range(config.moe_layer_start_index, last + 1)
    every = config.moe_layer_interval
    return [_EXPERTS if i in routed and not (i + 1) % every else _DENSE for i in range(config.num_hidden_layers)]


def _ernie_kind_keys(kinds: Sequence[str]) -> Mapping[str, object]:
    """Say which layers have experts: one in so many, from a first to a last one.

    Raises:
        UserError: if the layers with experts do not follow each other so.
    """
    routed = [layer for layer, kind in enumerate(kinds) if kind == _EXPERTS]
    for every in range(1, len(kinds) + 1):
        first, last = (routed[0], routed[-1]) if routed else (len(kinds), len(kinds))
        if routed == [layer for layer in range(first, last + 1) if layer < len(kinds) and not (layer + 1) % every]:
            return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": every}
    raise UserError(
        f"layers {', '.join(map(str, routed))} of {len(kinds)} would have experts, and no moe_layer_interval of "
        "config.json says that; remove a multiple of the interval with a method of contiguous runs, e.g. minitron-depth"
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    block={**TWO_NORMS, **ATTENTION, **HEAD_NORMS, **ATTENTION_BIASES},
    kinds={_DENSE: FFN, _EXPERTS: _ROUTED},
    kinds_of=_qwen_kinds,
    kind_keys=_qwen_kind_keys,
    optional=ATTENTION_SWITCH,
    sites=_sites(),
    config_keys=_keys("num_experts"),
    unstated=("num_local_experts",),
    derives_head_dim=False,
    experts="mlp.experts",
    stored=_ONE_BY_ONE,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    block={**TWO_NORMS, **ATTENTION, **QKV_BIASES},
    kinds={
        _DENSE: FFN,
        _EXPERTS: {**_ROUTED, **_shared("shared_expert"), "mlp.shared_expert_gate.weight": ("unit", "hidden")},
    },
    kinds_of=_qwen_kinds,
    kind_keys=_qwen_kind_keys,
    optional=dict.fromkeys(QKV_BIASES, "qkv_bias"),
    fixed={"shared_ffn": ("shared_expert_intermediate_size",), "unit": (1,)},
    sites=_sites("shared_expert"),
    config_keys=_keys("num_experts"),
    unstated=("num_local_experts",),
    experts="mlp.experts",
    stored=_ONE_BY_ONE,
)

OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    block={
        **TWO_NORMS,
        **ATTENTION,
        **ATTENTION_BIASES,
        "self_attn.q_norm.weight": ("query",),
        "self_attn.k_norm.weight": ("kv",),
        **_ROUTED,
    },
    optional=ATTENTION_SWITCH,
    sites=_sites(dense=False),
    uncut=_NO_FFN,
    config_keys=_keys("num_experts", "intermediate_size"),
    unstated=("num_local_experts",),
    experts="mlp.experts",
    heads_span_hidden=True,
    stored=_ONE_BY_ONE,
)

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    block={**TWO_NORMS, **ATTENTION, **_ROUTED},
    sites=_sites(dense=False),
    uncut=_NO_FFN,
    config_keys=_keys("num_local_experts", "intermediate_size"),
    unstated=("num_experts",),
    experts="mlp.experts",
    stored={
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{expert}.w2.weight",),
    },
)

GRANITEMOE = Family(
    name="granitemoe",
    model_types=("granitemoe",),
    block={
        **TWO_NORMS,
        **ATTENTION,
        **ATTENTION_BIASES,
        "block_sparse_moe.router.weight": ("experts", "hidden"),
        **_experts("block_sparse_moe"),
    },
    optional=ATTENTION_SWITCH,
    sites=_sites(dense=False),
    uncut=_NO_FFN,
    config_keys=_keys("num_local_experts", "intermediate_size"),
    logit_divisor="logits_scaling",
    experts="block_sparse_moe.experts",
    stored={
        "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
        "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
        "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    },
)

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    block={
        **TWO_NORMS,
        **ATTENTION,
        **ATTENTION_BIASES,
        "self_attn.sinks": ("heads",),
        "mlp.router.weight": ("experts", "hidden"),
        "mlp.router.bias": ("experts",),
        "mlp.experts.gate_up_proj": ("experts", "hidden", "expert_pair"),
        "mlp.experts.gate_up_proj_bias": ("experts", "expert_pair"),
        "mlp.experts.down_proj": ("experts", "expert_ffn", "hidden"),
        "mlp.experts.down_proj_bias": ("experts", "hidden"),
    },
    optional=ATTENTION_SWITCH,
    sites=_sites(dense=False),
    uncut=_NO_FFN,
    config_keys=_keys("num_local_experts", "intermediate_size"),
    unstated=("num_experts",),
    derives_head_dim=False,
    pattern=2,
    experts="mlp.experts",
)

_SHARED_WIDTH = {"shared_ffn": ("n_shared_experts", "moe_intermediate_size")}
_CORRECTED: Tensors = {"mlp.gate.e_score_correction_bias": ("experts",)}

GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    block={**TWO_NORMS, **ATTENTION, **QKV_BIASES, **HEAD_NORMS},
    kinds={_DENSE: FFN, _EXPERTS: {**_ROUTED, **_CORRECTED, **_shared("shared_experts")}},
    buffers=tuple(_CORRECTED),
    kinds_of=_leading_kinds,
    kind_keys=_leading_kind_keys,
    optional={**dict.fromkeys(QKV_BIASES, "attention_bias"), **dict.fromkeys(HEAD_NORMS, "use_qk_norm")},
    fixed=_SHARED_WIDTH,
    sites=_sites("shared_experts"),
    uncut=_ONE_SIZE,
    config_keys=_keys("n_routed_experts"),
    unstated=("num_local_experts", "num_experts"),
    experts="mlp.experts",
    stored=_ONE_BY_ONE,
    expert_groups=("n_group", "topk_group"),
    further_layers="num_nextn_predict_layers",
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    block={
        **TWO_NORMS,
        "self_attn.q_proj.weight": (("query_content", "query_position"), "hidden"),
        "self_attn.q_a_proj.weight": ("query_rank", "hidden"),
        "self_attn.q_a_proj.bias": ("query_rank",),
        "self_attn.q_a_layernorm.weight": ("query_rank",),
        "self_attn.q_b_proj.weight": (("query_content", "query_position"), "query_rank"),
        "self_attn.kv_a_proj_with_mqa.weight": (("kv_rank", "position"), "hidden"),
        "self_attn.kv_a_proj_with_mqa.bias": (("kv_rank", "position"),),
        "self_attn.kv_a_layernorm.weight": ("kv_rank",),
        "self_attn.kv_b_proj.weight": (("query_content", "values"), "kv_rank"),
        "self_attn.o_proj.weight": ("hidden", "values"),
        "self_attn.o_proj.bias": ("hidden",),
    },
    kinds={_DENSE: FFN, _EXPERTS: {**_ROUTED, **_CORRECTED, **_shared("shared_experts")}},
    buffers=tuple(_CORRECTED),
    kinds_of=_leading_kinds,
    kind_keys=_leading_kind_keys,
    optional={
        "self_attn.q_proj.weight": "!q_lora_rank",
        **dict.fromkeys(("self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight"), "q_lora_rank"),
        "self_attn.q_b_proj.weight": "q_lora_rank",
        "self_attn.q_a_proj.bias": "q_lora_rank&attention_bias",
        "self_attn.kv_a_proj_with_mqa.bias": "attention_bias",
        "self_attn.o_proj.bias": "attention_bias",
    },
    fixed={
        **_SHARED_WIDTH,
        "query_rank": ("q_lora_rank|1",),
        "kv_rank": ("kv_lora_rank",),
        "position": ("qk_rope_head_dim",),
        "query_content": ("num_attention_heads", "qk_nope_head_dim"),
        "query_position": ("num_attention_heads", "qk_rope_head_dim"),
        "values": ("num_attention_heads", "v_head_dim"),
    },
    sites={
        **_sites("shared_experts"),
        "attention_input": Site(
            "input_layernorm",
            "hidden",
            output=True,
            readers=("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ),
        "query_rank": Site("self_attn.q_b_proj", "query_rank", readers=("self_attn.q_b_proj",)),
        "kv_rank": Site("self_attn.kv_b_proj", "kv_rank", readers=("self_attn.kv_b_proj",)),
        "attention_output": Site("self_attn.o_proj", "values", readers=("self_attn.o_proj",)),
    },
    cached=("kv_rank", "position"),
    uncut={**_ONE_SIZE, "kv": "its heads share one latent state"},
    config_keys={name: key for name, key in _keys("n_routed_experts").items() if name != "head_dim"},
    derived={"head_dim": lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim},
    unstated=("num_local_experts", "num_experts"),
    experts="mlp.experts",
    stored=_ONE_BY_ONE,
    expert_groups=("n_group", "topk_group"),
    further_layers="num_nextn_predict_layers",
)

_SHARED_BIASES: Tensors = {
    "mlp.shared_experts.gate_proj.bias": ("shared_ffn",),
    "mlp.shared_experts.up_proj.bias": ("shared_ffn",),
    "mlp.shared_experts.down_proj.bias": ("hidden",),
}

ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    model_types=("ernie4_5_moe",),
    block={**TWO_NORMS, **ATTENTION, **ATTENTION_BIASES},
    outer={**OUTER, "lm_head.bias": (None,)},
    kinds={
        _DENSE: {**FFN, **FFN_BIASES},
        _EXPERTS: {
            **_ROUTED,
            "mlp.gate.moe_statics.e_score_correction_bias": ("unit", "experts"),
            **_shared("shared_experts"),
            **_SHARED_BIASES,
        },
    },
    kinds_of=_ernie_kinds,
    kind_keys=_ernie_kind_keys,
    optional={
        **dict.fromkeys((*ATTENTION_BIASES, *FFN_BIASES, "lm_head.bias"), "use_bias"),
        **dict.fromkeys(_shared("shared_experts"), "moe_num_shared_experts"),
        **dict.fromkeys(_SHARED_BIASES, "use_bias&moe_num_shared_experts"),
    },
    fixed={"shared_ffn": ("moe_num_shared_experts|1", "moe_intermediate_size"), "unit": (1,)},
    sites=_sites("shared_experts"),
    uncut=_ONE_SIZE,
    config_keys=_keys("moe_num_experts", active="moe_k"),
    experts="mlp.experts",
    stored={
        **_ONE_BY_ONE,
        "mlp.gate.moe_statics.e_score_correction_bias": ("mlp.moe_statics.e_score_correction_bias",),
    },
)
