"""The sliding windows of a model's layers, as the cache of transformers reads them from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["attention_windows", "states_windows"]

#: model types whose config has a window even where the file names none
_BY_DEFAULT = ("mistral", "ministral", "gemma2", "gemma3_text", "olmo3", "exaone4", "gpt_oss", "cohere2")

#: model types whose window is that of every layer
_ALL_LAYERS = ("mistral", "ministral3", "mixtral", "phi3", "starcoder2")


def attention_windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, None where it attends to all positions; empty where every layer does.

    As in ``transformers.cache_utils``: without ``layer_types``, a window is that of every layer.
    """
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window:
        return ()
    windows = [window if types is None or types[layer] == "sliding_attention" else None for layer in range(layers)]
    return tuple(windows) if any(windows) else ()


def states_windows(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says by itself what windows its layers have, without a default of its class."""
    if raw.get("sliding_window"):
        return raw["model_type"] in _ALL_LAYERS or isinstance(raw.get("layer_types"), list)
    return "sliding_window" in raw or raw["model_type"] not in _BY_DEFAULT
