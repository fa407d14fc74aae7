"""Tiny random image-text models of every wrapper, and images with text for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from helpers import randomise

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
_VISION = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 4}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
_QWEN_IDS = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 10}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_GEMMA3 = {"head_dim": 12, "num_hidden_layers": 6, "sliding_window": 6}
_GEMMA3 |= {"layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2}

#: model_type -> its configuration, the language model's and the vision tower's
WRAPPER_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"image_token_index": 7, "boi_token_index": 9, "eoi_token_index": 10, "mm_tokens_per_image": 4},
        _GEMMA3,
        {"model_type": "siglip_vision_model", **_VISION},
    ),
    "mistral3": (
        {"image_token_index": 7, "tie_word_embeddings": False, "vision_feature_layer": -1},
        {"model_type": "mistral", "head_dim": 12},
        {"model_type": "pixtral", **_VISION, "head_dim": 12},
    ),
    "qwen2_5_vl": (
        _QWEN_IDS,
        _MROPE,
        {
            **_QWEN_VISION,
            "hidden_size": 24,
            "intermediate_size": 32,
            "out_hidden_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": (
        _QWEN_IDS,
        {"head_dim": 8, **_MROPE},
        {
            **_QWEN_VISION,
            "hidden_size": 24,
            "intermediate_size": 32,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
    "smolvlm": (
        {"image_token_id": 7, "scale_factor": 2, "tie_word_embeddings": False, "pad_token_id": 0},
        {"model_type": "llama", "head_dim": 8},
        _VISION,
    ),
    "internvl": (
        {"image_token_id": 7, "image_seq_length": 4, "downsample_ratio": 0.5, "tie_word_embeddings": False},
        {"model_type": "qwen2"},
        _VISION,
    ),
    "llava_next": (
        {"image_token_index": 7, "image_grid_pinpoints": [[16, 32], [32, 16]]},
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", **_VISION},
    ),
    "llava": (
        {"image_token_index": 7},
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", **_VISION},
    ),
    "qwen3_5": (
        _QWEN_IDS,
        {
            "head_dim": 8,
            "num_hidden_layers": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        },
        {
            **_QWEN_VISION,
            "hidden_size": 24,
            "intermediate_size": 32,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
        },
    ),
    "qwen2_vl": (_QWEN_IDS, _MROPE, {**_QWEN_VISION, "embed_dim": 24, "hidden_size": 48, "mlp_ratio": 2}),
}

IMAGE_TOKEN = 7
#: tokens of the language model for one image; other wrappers have 4
_IMAGE_TOKENS = {"llava": 16, "llava_next": 16 + 4 * (8 + 1)}


def tiny_wrapper(directory: Path, name: str, *, seed: int = 0, text: dict[str, Any] | None = None, **top: Any) -> Path:
    """Write a random image-text model below ``directory`` and return its directory.

    Args:
        text: changes to the language model's configuration.
        top: changes to the configuration around it.
    """
    outer, language, vision = WRAPPER_CONFIGS[name]
    parts = {"text_config": {**_TEXT, **language, **(text or {})}, "vision_config": dict(vision)}
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**{**outer, **top}, **parts))
    randomise(model, seed)
    out = directory / f"{name}-{seed}"
    model.save_pretrained(out)
    return out


def opened_wrapper(directory: Path) -> PreTrainedModel:
    """The model as transformers opens it by its own class, with every weight and no more."""
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values()), info
    return model.eval()


def image_inputs(name: str, *, seed: int = 3) -> dict[str, Any]:
    """Token ids with the place of an image, and the image, as the model's processor would give them."""
    generator = torch.Generator().manual_seed(seed)
    count = _IMAGE_TOKENS.get(name, 4)
    words = torch.randint(11, 61, (1, 20), generator=generator)
    ids = torch.cat([words[:, :5], torch.full((1, count), IMAGE_TOKEN), words[:, 5:]], dim=1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = (ids == IMAGE_TOKEN).long()

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if name.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]])
        return {**inputs, "pixel_values": noise(16, 48), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if name == "gemma3":
        return {**inputs, "pixel_values": noise(1, 3, 16, 16), "token_type_ids": kinds}
    if name == "mistral3":
        return {**inputs, "pixel_values": noise(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    if name == "llava_next":  # the whole image, and two halves of it
        return {**inputs, "pixel_values": noise(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}
    return {**inputs, "pixel_values": noise(*(1, 1) if name == "smolvlm" else (1,), 3, 16, 16)}


@torch.no_grad()
def image_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits [1, positions, vocabulary] of an image with text."""
    return model(**inputs, use_cache=False).logits


class Tower(nn.Module):
    """The language model within an image-text model, with the attributes of a language model by itself."""

    def __init__(self, whole: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.lm_head = whole.get_decoder(), whole.get_output_embeddings()

    @property
    def base_model(self) -> nn.Module:
        """The decoder."""
        return self.model
