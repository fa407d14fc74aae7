"""Configurations of every family: tiny ones with all that a family has, and small ones with the ratios of real models."""

from __future__ import annotations

from typing import Any

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

_GEMMA3 = {"model_type": "gemma3_text", "head_dim": 12, "num_hidden_layers": 6, "sliding_window": 6}
_QWEN2_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}

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
    "qwen2-mixed": {"model_type": "qwen2", "tie_word_embeddings": True, **_QWEN2_WINDOWS, "drop": ("layer_types",)},
    "qwen3-biased": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "gemma3-old": {**_GEMMA3, "sliding_window_pattern": 3, "drop": ("layer_types",)},
    "gemma3-untied": {**_GEMMA3, "tie_word_embeddings": False, "attention_bias": True, "final_logit_softcapping": 30.0},
    "olmo2-biased": {"model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True},
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 6},
}

#: Llama-likes and their kin: sequential blocks of attention and FFN.
_DENSE: Configs = {}

#: Parallel blocks, layers of several kinds, and shapes that differ by layer.
_HYBRID: Configs = {}

#: Name -> the config of :func:`helpers.tiny_family`, besides ``FAMILY_SIZES``. A family's first entry bears its name;
#: its variants follow, with a suffix after a hyphen. Windows of attention are shorter than the texts of the tests
#: (12 and 20 tokens), and every scaling differs from its default. ``drop`` removes keys from config.json afterwards.
FAMILY_CONFIGS: Configs = {
    name: config
    for name, config in {**_FIRST, **_DENSE, **_HYBRID}.items()
    if name.partition("-")[0] in {family.name for family in TABLE}
}
FAMILIES = tuple(name for name in FAMILY_CONFIGS if "-" not in name)

#: Name of a family -> a config with the ratios of a published checkpoint (heads, KV heads, head_dim, FFN, tied or not)
#: at small size, complete but for the token ids.
REALISTIC: Configs = {}
