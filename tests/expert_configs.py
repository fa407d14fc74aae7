"""Tiny configurations of every family of mixtures, with all that a family has: shared experts, groups, dense layers."""

from __future__ import annotations

from typing import Any

from family_configs import FAMILY_SIZES

_FOUR = {**FAMILY_SIZES, "num_hidden_layers": 4}
_TOP_2 = {"num_experts_per_tok": 2}
_GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LATENT = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_ERNIE = {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}

#: name -> configuration; a family's first entry bears its name, its variants have a suffix after a hyphen
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_FOUR,
        **_TOP_2,
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        **_FOUR,
        **_TOP_2,
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "olmoe": {**_FOUR, **_TOP_2, "model_type": "olmoe", "num_experts": 8, "eos_token_id": None, "pad_token_id": 1},
    "mixtral": {**_FOUR, **_TOP_2, "model_type": "mixtral", "num_local_experts": 8},
    "granitemoe": {**_FOUR, **_TOP_2, **_MULTIPLIERS, "model_type": "granitemoe", "num_local_experts": 8},
    "gpt_oss": {
        **_FOUR,
        **_TOP_2,
        "model_type": "gpt_oss",
        "head_dim": 12,
        "num_local_experts": 8,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "glm4_moe": {
        **_FOUR,
        **_TOP_2,
        **_GROUPS,
        "model_type": "glm4_moe",
        "head_dim": 12,
        "moe_intermediate_size": 16,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.7,
    },
    "deepseek_v3": {
        **_FOUR,
        **_TOP_2,
        **_GROUPS,
        **_LATENT,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 6,
        "moe_intermediate_size": 16,
    },
    "ernie4_5_moe": {**_FOUR, **_ERNIE, "model_type": "ernie4_5_moe", "moe_intermediate_size": 16},
    "qwen3_moe-step": {
        **_FOUR,
        **_TOP_2,
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2_moe-normalised": {
        **_FOUR,
        **_TOP_2,
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
        "qkv_bias": False,
        "norm_topk_prob": True,
    },
    "olmoe-normalised": {
        **_FOUR,
        **_TOP_2,
        "model_type": "olmoe",
        "num_experts": 8,
        "eos_token_id": None,
        "pad_token_id": 1,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "gpt_oss-plain": {
        **_FOUR,
        **_TOP_2,
        "model_type": "gpt_oss",
        "head_dim": 8,
        "num_local_experts": 8,
        "sliding_window": 6,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
    },
    "glm4_moe-one_group": {
        **_FOUR,
        **_TOP_2,
        **_GROUPS,
        "model_type": "glm4_moe",
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "attention_bias": False,
    },
    "deepseek_v3-whole_query": {
        **_FOUR,
        **_TOP_2,
        **_GROUPS,
        **_LATENT,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 6,
        "moe_intermediate_size": 16,
        "q_lora_rank": None,
        "topk_group": 2,
        "attention_bias": True,
        "norm_topk_prob": False,
    },
    "ernie4_5_moe-interval": {
        **_FOUR,
        **_ERNIE,
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 2,
        "moe_num_shared_experts": 0,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
}
