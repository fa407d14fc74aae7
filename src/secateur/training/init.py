"""Where a run's first weights come from: a seed, or a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.model.checkpoint import Checkpoint
from secateur.model.families import LLAMA, family_of
from secateur.model.shapes import Shape

__all__ = ["fresh_weights", "llama_config", "stored_weights"]


def llama_config(shape: Shape, *, context: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a Llama of this shape, in float32; of its sibling, where Llama's own refuses the shape."""
    kind: tuple[str, str, Mapping[str, object]] = ("llama", "LlamaForCausalLM", {})
    if dataclasses.replace(shape, family=LLAMA).refused_by_config:
        assert LLAMA.relaxed is not None
        kind = LLAMA.relaxed
    model_type, architecture, besides = kind
    biases: dict[str, Any] = dict.fromkeys(shape.switches, True)  # of a pruned model, which its twin has as well
    special: Any = tokenizer  # whose ids the library types as int, str or list
    make: Any = CONFIG_MAPPING[model_type]  # whose arguments differ from kind to kind
    return make(
        **shape.config_changes(),
        **biases,
        **besides,
        vocab_size=shape.vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=None,
        architectures=[architecture],
        dtype="float32",
    )


def fresh_weights(model: PreTrainedModel, *, std: float, seed: int) -> Callable[[str], Tensor]:
    """Draw weights: matrices from a normal truncated at two deviations, norms that scale by one, biases zero.

    Args:
        model: whose parameters' sizes count; it may be without weights.
        std: of the normal, before it is truncated.
        seed: the same one gives the same weights, whatever the library's own initialisation does.

    Returns:
        name of a parameter -> float32, which follows from the name, the size and the seed alone.
    """
    norm = 1.0 - family_of(model.config.model_type, where="the model").norm_offset

    def draw(name: str) -> Tensor:
        value = torch.empty(model.get_parameter(name).shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if value.dim() >= 2:
            return nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
        return value.fill_(0.0 if name.endswith("bias") else norm)

    return draw


def stored_weights(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A checkpoint's weights: name of a parameter -> its value as stored.

    Raises:
        UserError: when called, if the tensor holds NaN or infinity.
    """

    def read(name: str) -> Tensor:
        tensor = checkpoint.tensor(name)
        checkpoint.check_finite(name, tensor)
        return tensor

    return read
