"""Configurations of every family: tiny ones with all that a family has, and small ones shaped like real models."""

from __future__ import annotations

from typing import Any

from published_configs import PUBLISHED, shrunk
from secateur.model.families import FAMILIES as TABLE

Configs = dict[str, dict[str, Any]]

FAMILY_SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


def _kinds(letters: str) -> list[str]:
    """``layer_types`` from one letter for each layer."""
    return [{"f": "full_attention", "s": "sliding_attention"}[letter] for letter in letters]


_BIASED = {"attention_bias": True, "mlp_bias": True}
_GEMMA3 = {"model_type": "gemma3_text", "head_dim": 12, "num_hidden_layers": 6, "sliding_window": 6}
_QWEN2_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}

_GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 12,
    "sliding_window": 6,
    "query_pre_attn_scalar": 20,
    "layer_types": _kinds("sffsf"),
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_NTK = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10_000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 4,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}

#: The families of version 0.1, whose results `tests/golden` pins.
_FIRST: Configs = {
    "llama": {"model_type": "llama", "head_dim": 8},
    "mistral": {"model_type": "mistral", "head_dim": 12, "sliding_window": 6},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "gemma3": {**_GEMMA3, "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2},
    "olmo2": {"model_type": "olmo2", "pad_token_id": 1},
    "phi3": {"model_type": "phi3"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 6},
    "mistral-full": {"model_type": "mistral", "sliding_window": None},
    "qwen2-mixed": {"model_type": "qwen2", "tie_word_embeddings": True, **_QWEN2_WINDOWS},
    "qwen3-biased": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "gemma3-old": {**_GEMMA3, "sliding_window_pattern": 3},
    "gemma3-untied": {**_GEMMA3, "tie_word_embeddings": False, "attention_bias": True, "final_logit_softcapping": 30.0},
    "olmo2-biased": {"model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True},
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 6},
}

#: Llama-likes and their kin: sequential blocks of attention and FFN.
_DENSE: Configs = {
    "ministral": {"model_type": "ministral", "head_dim": 12, "sliding_window": 6, "layer_types": _kinds("ssfsf")},
    "ministral3": {"model_type": "ministral3", "head_dim": 12, "sliding_window": 6, "rope_parameters": _YARN},
    "smollm3": {
        "model_type": "smollm3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "no_rope_layers": [1, 0, 1, 1, 0],
        "layer_types": _kinds("sffss"),
    },
    "granite": {"model_type": "granite", **_MULTIPLIERS},
    "gemma": {"model_type": "gemma", "head_dim": 12},
    "gemma2": {**_GEMMA2, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0},
    "olmo3": {
        "model_type": "olmo3",
        "pad_token_id": 1,
        "sliding_window": 6,
        "layer_types": _kinds("ssfsf"),
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
        },
    },
    "exaone4": {"model_type": "exaone4", "head_dim": 12, "sliding_window": 6, "layer_types": _kinds("ssfsf")},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 12},
    "internlm3": {"model_type": "internlm3", "head_dim": 8},
    "helium": {"model_type": "helium", "head_dim": 8},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 12},
    "arcee": {"model_type": "arcee", "head_dim": 8},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 12, "rope_parameters": _NTK},
    "olmo": {"model_type": "olmo", "clip_qkv": 1.0, "pad_token_id": 1},
    "ministral-old": {"model_type": "ministral", "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 6},
    "ministral3-tied": {
        "model_type": "ministral3",
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": _YARN,
    },
    "smollm3-old": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": False,
        **_BIASED,
    },
    "granite-biased": {"model_type": "granite", **_MULTIPLIERS, "tie_word_embeddings": True, **_BIASED},
    "gemma-untied": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": False, "attention_bias": True},
    "gemma2-uncapped": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 6,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "olmo3-biased": {
        "model_type": "olmo3",
        "pad_token_id": 1,
        "sliding_window": 6,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "exaone4-full": {
        "model_type": "exaone4",
        "head_dim": 8,
        "sliding_window": None,
        "layer_types": _kinds("fffff"),
        "tie_word_embeddings": True,
    },
    "seed_oss-biased": {
        "model_type": "seed_oss",
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
    },
    "internlm3-old": {
        "model_type": "internlm3",
        "head_dim": 8,
        **_BIASED,
    },
    "helium-tied": {
        "model_type": "helium",
        "head_dim": 8,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
        "mlp_bias": True,
    },
    "ernie4_5-biased": {"model_type": "ernie4_5", "head_dim": 8, "tie_word_embeddings": False, "use_bias": True},
    "arcee-biased": {"model_type": "arcee", "tie_word_embeddings": True, **_BIASED},
    "hunyuan_v1_dense-biased": {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmo-biased": {"model_type": "olmo", "attention_bias": True, "tie_word_embeddings": True, "pad_token_id": 1},
}

#: Parallel blocks, layers of several kinds, and shapes that differ by layer.
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
_QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "head_dim": 16,
    "num_hidden_layers": 6,
    **_LINEAR,
    "linear_conv_kernel_dim": 3,
    "rms_norm_eps": 1e-5,
}
_COHERE2 = {"model_type": "cohere2", "sliding_window": 6, "logit_scale": 0.4}
_GEMMA4 = {
    "model_type": "gemma4_unified_text",
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "sliding_window": 6,
    "head_dim": 8,
    "global_head_dim": 12,
    "final_logit_softcapping": 5.0,
}
_LFM2 = {"model_type": "lfm2", "block_multiple_of": 16, "full_attn_idxs": [1, 4], "intermediate_size": 96}
_HYBRID: Configs = {
    "qwen3_5": {**_QWEN3_5, "layer_types": [*["linear_attention"] * 2, "full_attention"] * 2},
    "phi": {"model_type": "phi"},
    "glm": {"model_type": "glm", "head_dim": 12},
    "glm4": {"model_type": "glm4", "head_dim": 8, "attention_bias": False},
    "cohere2": {**_COHERE2, "layer_types": [*["sliding_attention"] * 3, "full_attention", "sliding_attention"]},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 6},
    "nemotron": {"model_type": "nemotron", "head_dim": 12},
    "apertus": {"model_type": "apertus"},
    "gemma4": {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 2},
    "lfm2": _LFM2,
    "qwen3_5-biased": {**_QWEN3_5, "full_attention_interval": 3, "attention_bias": True, "tie_word_embeddings": True},
    "phi-tied": {"model_type": "phi", "tie_word_embeddings": True, "num_key_value_heads": 6},
    "glm-plain": {"model_type": "glm", "head_dim": 8, "attention_bias": False, "tie_word_embeddings": True},
    "cohere2-biased": {**_COHERE2, "sliding_window_pattern": 2, "attention_bias": True, "tie_word_embeddings": False},
    "starcoder2-plain": {"model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": False},
    "nemotron-biased": {
        "model_type": "nemotron",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "apertus-biased": {"model_type": "apertus", "attention_bias": True, "head_dim": 12, "tie_word_embeddings": True},
    "gemma4-shared": {**_GEMMA4, "num_kv_shared_layers": 2, "attention_bias": True},
    "lfm2-biased": {**_LFM2, "conv_bias": True, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
}

#: Name -> the config of :func:`helpers.tiny_family`, besides ``FAMILY_SIZES``. A family's first entry bears its name;
#: its variants follow, with a suffix after a hyphen. Windows of attention are shorter than the texts of the tests
#: (12 and 20 tokens), and every scaling differs from its default.
FAMILY_CONFIGS: Configs = {
    name: config
    for name, config in {**_FIRST, **_DENSE, **_HYBRID}.items()
    if name.partition("-")[0] in {family.name for family in TABLE}
}
FAMILIES = tuple(name for name in FAMILY_CONFIGS if "-" not in name)
FIRST = tuple(name for name in _FIRST if "-" not in name)  #: the formulas of methods are checked on these


def cut_axes(name: str, *axes: str) -> tuple[str, ...]:
    """Those of ``axes`` that may be cut in the family of a config."""
    (row,) = (family for family in TABLE if family.name == name.partition("-")[0])
    return tuple(axis for axis in axes if axis in row.axes)


def families_with(*axes: str) -> tuple[str, ...]:
    """The families that may be cut along all these axes."""
    return tuple(name for name in FAMILIES if cut_axes(name, *axes) == axes)


#: Name -> changes of the config.json that transformers writes, as older files have it: ``drop`` removes keys.
FILE_CHANGES: Configs = {
    "qwen2-mixed": {"drop": ("layer_types",)},
    "gemma3-old": {"drop": ("layer_types",)},
    "ministral-old": {"drop": ("layer_types",)},
    "smollm3-old": {"drop": ("no_rope_layers", "layer_types")},
    "gemma2-uncapped": {"drop": ("layer_types",)},
    "olmo3-biased": {"drop": ("layer_types",)},
    "internlm3-old": {"drop": ("attention_bias", "mlp_bias"), "qkv_bias": True, "bias": True},
}

_SMALL = {"vocab_size": 61, "max_position_embeddings": 64}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        **_SMALL,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


#: The published checkpoint stands behind each line; its sizes are divided by 8 to 64.
_REALISTIC_HYBRID: Configs = {
    "qwen3_5": {  # Qwen3.5-9B
        "model_type": "qwen3_5_text",
        **_sizes(128, 384, 8, 16, 4, 8),
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    },
    "phi": {
        "model_type": "phi",
        **_sizes(80, 320, 8, 8, 8, 10),
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.1,
    },  # phi-2
    "glm": {"model_type": "glm", **_sizes(128, 428, 8, 32, 2, 4)},  # glm-4-9b
    "glm4": {"model_type": "glm4", **_sizes(192, 720, 6, 12, 2, 16), "attention_bias": False},  # GLM-4-32B-0414
    "cohere2": {  # c4ai-command-r7b-12-2024
        "model_type": "cohere2",
        **_sizes(128, 448, 8, 8, 2, 16),
        "logit_scale": 0.25,
        "sliding_window": 6,
    },
    "starcoder2": {  # starcoder2-3b
        "model_type": "starcoder2",
        **_sizes(96, 384, 6, 24, 2, 4),
        "sliding_window": 6,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "embedding_dropout": 0.1,
    },
    "nemotron": {"model_type": "nemotron", **_sizes(96, 288, 8, 6, 2, 16)},  # Minitron-4B-Base
    "apertus": {"model_type": "apertus", **_sizes(128, 672, 8, 8, 2, 16)},  # Apertus-8B-2509
    "gemma4": {  # the default of its config class
        "model_type": "gemma4_unified_text",
        **_sizes(72, 288, 12, 8, 4, 8),
        "global_head_dim": 16,
        "sliding_window": 6,
    },
    "lfm2": {  # LFM2-1.2B
        "model_type": "lfm2",
        **_sizes(64, 384, 16, 8, 2, 8),
        "block_multiple_of": 8,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    },
}

#: Name of a family -> a config with the ratios of a published checkpoint (heads, KV heads, head_dim, FFN, tied or not)
#: at small size, complete but for the token ids.
REALISTIC: Configs = {
    name: config
    for name, config in {**{n: shrunk(c) for n, c in PUBLISHED.items()}, **_REALISTIC_HYBRID}.items()
    if name in FAMILIES
}
