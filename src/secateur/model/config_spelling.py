"""The keys of config.json that transformers 5 spells anew, beside those that earlier releases and other readers know.

transformers 5 writes RoPE as one mapping, ``rope_parameters``. Earlier releases wrote ``rope_theta`` and
``rope_scaling``. Readers such as transformers 4 and mlx-lm look for these, and silently take a default without them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["with_dtype", "with_old_spelling"]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def with_old_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the old keys for RoPE beside ``rope_parameters``.

    Keys that it has stay as they are. What the old keys cannot say (a scaling of sliding windows alone) adds none.
    """
    config = dict(config)
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return config
    old: dict[str, Any] = {}
    if _FULL in parameters or _SLIDING in parameters:  # different ones for layers with and without a window
        full, sliding = parameters.get(_FULL) or {}, parameters.get(_SLIDING) or {}
        if sliding.get("rope_type", "default") != "default":
            return config
        if "rope_theta" in sliding:
            old["rope_local_base_freq"] = sliding["rope_theta"]
        parameters = full
    if "rope_theta" in parameters:
        old |= {"rope_theta": parameters["rope_theta"], "rope_scaling": None}
    rest = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kind = rest.get("rope_type", rest.get("type", "default"))
    if kind == "proportional":  # of Gemma 4, which no release with the old keys knows; beside them release 5 refuses it
        return config
    if kind == "longrope":  # exactly these keys; the others are the configuration's own
        old["rope_scaling"] = {"type": kind, "short_factor": rest["short_factor"], "long_factor": rest["long_factor"]}
        if "original_max_position_embeddings" in rest:
            old["original_max_position_embeddings"] = rest["original_max_position_embeddings"]
    elif kind != "default":
        old["rope_scaling"] = copy.deepcopy(rest)
    if "partial_rotary_factor" in parameters:
        old["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return config | {key: value for key, value in old.items() if key not in config}


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the content of a config.json with another dtype, under the keys that it has for it."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return {**config, **dict.fromkeys(names, dtype)}
