"""Sizes of published checkpoints, one for each family, and the same ratios at small size."""

from __future__ import annotations

from typing import Any


def _sizes(
    model_type: str, hidden: int, ffn: int, layers: int, heads: str, head_dim: int, vocabulary: int, **rest: Any
) -> dict[str, Any]:
    """A config from sizes; ``heads`` is query heads/KV heads."""
    query, _, kv = heads.partition("/")
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "head_dim": head_dim}
    groups = {"num_attention_heads": int(query), "num_key_value_heads": int(kv)}
    return {"model_type": model_type, **sizes, **groups, "vocab_size": vocabulary, **rest}


def _tied(*sizes: Any, **rest: Any) -> dict[str, Any]:
    return _sizes(*sizes, tie_word_embeddings=True, **rest)


def _untied(*sizes: Any, **rest: Any) -> dict[str, Any]:
    return _sizes(*sizes, tie_word_embeddings=False, **rest)


def _period(layers: int, sliding: int) -> list[str]:
    """``layer_types``: one full layer after each ``sliding`` ones with a window."""
    return [["sliding_attention", "full_attention"][(i + 1) % (sliding + 1) == 0] for i in range(layers)]


_GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}
_GEMMA3_WINDOWS = {"sliding_window": 512, "layer_types": _period(26, 5)}
_OLMO3_WINDOWS = {"sliding_window": 4096, "layer_types": _period(32, 3)}
_EXAONE4_WINDOWS = {"sliding_window": 4096, "layer_types": _period(64, 3)}
_NTK = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10_000.0}

#: Name of a family -> the config of a published checkpoint, which the comment names.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": _tied("llama", 2048, 8192, 16, "32/8", 64, 128256),  # Llama-3.2-1B
    "mistral": _untied("mistral", 4096, 14336, 32, "32/8", 128, 32768, sliding_window=None),  # Mistral-7B-v0.3
    "qwen2": _tied("qwen2", 896, 4864, 24, "14/2", 64, 151936),  # Qwen2.5-0.5B
    "qwen3": _tied("qwen3", 1024, 3072, 28, "16/8", 128, 151936),  # Qwen3-0.6B
    "gemma3": _tied("gemma3_text", 1152, 6912, 26, "4/1", 256, 262144, **_GEMMA3_WINDOWS),  # gemma-3-1b
    "olmo2": _untied("olmo2", 2048, 8192, 16, "16/16", 128, 100352),  # OLMo-2-0425-1B
    "phi3": _untied("phi3", 3072, 8192, 32, "32/32", 96, 32064),  # Phi-3-mini-4k
    "ministral": _untied("ministral", 4096, 12288, 36, "32/8", 128, 131072, sliding_window=32768),  # Ministral-8B
    "ministral3": _tied("ministral3", 3072, 9216, 26, "32/8", 128, 131072),  # Ministral-3-3B
    "smollm3": _tied("smollm3", 2048, 11008, 36, "16/4", 128, 128256),  # SmolLM3-3B
    "granite": _tied("granite", 2048, 8192, 40, "32/8", 64, 49159, **_GRANITE),  # granite-3.3-2b
    "gemma": _tied("gemma", 2048, 16384, 18, "8/1", 256, 256000),  # gemma-2b
    "gemma2": _tied("gemma2", 2304, 9216, 26, "8/4", 256, 256000, query_pre_attn_scalar=256),  # gemma-2-2b
    "olmo3": _untied("olmo3", 4096, 11008, 32, "32/32", 128, 100278, **_OLMO3_WINDOWS),  # Olmo-3-7B
    "exaone4": _untied("exaone4", 5120, 27392, 64, "40/8", 128, 102400, **_EXAONE4_WINDOWS),  # EXAONE-4.0-32B
    "seed_oss": _untied("seed_oss", 5120, 27648, 64, "80/8", 128, 155136),  # Seed-OSS-36B
    "internlm3": _untied("internlm3", 4096, 10240, 48, "32/2", 128, 128512),  # internlm3-8b
    "helium": _untied("helium", 2560, 7040, 24, "20/20", 128, 48000),  # helium-1-preview-2b
    "ernie4_5": _tied("ernie4_5", 1024, 3072, 18, "16/2", 128, 103424),  # ERNIE-4.5-0.3B
    "arcee": _untied("arcee", 2560, 18432, 36, "20/4", 128, 128005),  # AFM-4.5B
    "hunyuan_v1_dense": _tied(
        "hunyuan_v1_dense", 4096, 14336, 32, "32/8", 128, 128167, rope_parameters=_NTK
    ),  # Hunyuan-7B
    "olmo": _tied("olmo", 2048, 8192, 16, "16/16", 128, 50304),  # OLMo-1B-hf
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The config with heads of 8 channels, hidden and FFN sizes divided alike, and one period of its layers."""
    divisor, layers = config["head_dim"] // 8, 6 if config["model_type"] == "gemma3_text" else 4
    small = {**config, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64, "num_hidden_layers": layers}
    small |= {key: config[key] // divisor for key in ("hidden_size", "intermediate_size")}
    small |= {"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {}
    small |= {"sliding_window": 6} if config.get("sliding_window") else {}
    return small | ({"query_pre_attn_scalar": 8} if "query_pre_attn_scalar" in config else {})
