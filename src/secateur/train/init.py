"""Fresh models: the same weights from the same seed, whatever the library's own initialisation does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.shapes import Shape

__all__ = ["llama_config", "new_model"]


def llama_config(shape: Shape, *, context: int, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The configuration of a Llama of this shape, in float32."""
    biases: dict[str, Any] = dict.fromkeys(shape.switches, True)  # of a pruned model, which its twin has as well
    special: Any = tokenizer  # whose ids the library types as int, str or list
    return LlamaConfig(
        **shape.config_changes(),
        **biases,
        vocab_size=shape.vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def new_model(config: Any, *, std: float, seed: int) -> PreTrainedModel:
    """A model with fresh weights: matrices from a normal truncated at two deviations, norms one, biases zero."""
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return model
