"""A checkpoint of Llama, Mistral, Qwen3 or Gemma 3 as a GGUF file, by the tables of the package ``gguf``.

For tests only: it writes float32 and no tokenizer. Users convert with llama.cpp's own ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(folder: Path, path: Path) -> Path:
    """Write the checkpoint in ``folder`` as the GGUF file ``path``."""
    config = AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{gguf.MODEL_ARCH_NAMES[architecture]} has no place for {name}")
        writer.add_tensor(target, _convert(name, tensor.float(), config, architecture).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])


def _convert(name: str, tensor: Tensor, config: Any, architecture: gguf.MODEL_ARCH) -> Tensor:
    """The layout that llama.cpp computes with: Llama's rotary pairs lie side by side, Gemma's norms have their one."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = next((part for part in heads if f".{part}." in name), None)
    if architecture == gguf.MODEL_ARCH.LLAMA and projection:
        halves = tensor.reshape(heads[projection], 2, config.head_dim // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if architecture == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
        return tensor + torch.ones(())
    return tensor
