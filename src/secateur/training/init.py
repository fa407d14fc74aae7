"""First weights of a run: drawn from a seed, or read from a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.model.checkpoint import Checkpoint
from secateur.model.families import LLAMA, family_of
from secateur.model.shapes import Shape
from secateur.training.recipe import InitSpec

__all__ = ["fresh_config", "fresh_weights", "generator_of", "stored_weights"]


def fresh_config(
    shape: Shape,
    *,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
    rope_theta: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    rms_norm_eps: float = 1e-6,
    router_balance: float = 0.01,
) -> PreTrainedConfig:
    """A float32 configuration of this shape: a Llama, its sibling where Llama's refuses the shape, or a Mixtral.

    Since its release 5, transformers writes ``rope_theta`` and ``rope_scaling`` as one key, ``rope_parameters``.
    """
    kind: tuple[str, str, Mapping[str, object]] = ("llama", "LlamaForCausalLM", {})
    if shape.experts:
        kind = ("mixtral", "MixtralForCausalLM", {"sliding_window": None, "router_aux_loss_coef": router_balance})
    elif dataclasses.replace(shape, family=LLAMA).refused_by_config:
        assert LLAMA.relaxed is not None
        kind = LLAMA.relaxed
    model_type, architecture, extra = kind
    biases: dict[str, Any] = dict.fromkeys(
        shape.switches, True
    )  # a pruned model may have biases, and its twin then too
    special: Any = tokenizer  # the library types its ids as int, str or list
    make: Any = CONFIG_MAPPING[model_type]  # arguments differ between model types
    return make(
        **shape.config_changes(),
        **biases,
        **extra,
        rope_parameters={"rope_theta": rope_theta, "rope_type": "default", **(rope_scaling or {})},
        rms_norm_eps=rms_norm_eps,
        vocab_size=shape.vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=None,
        architectures=[architecture],
        dtype="float32",
    )


def fresh_weights(model: PreTrainedModel, init: InitSpec, *, seed: int) -> Callable[[str], Tensor]:
    """Draw weights: matrices from the distribution of ``init``, norms that scale by one, biases zero, buffers as made.

    Args:
        model: gives the sizes of the parameters; it may be without weights.
        seed: equal seeds give equal weights, whatever the library's initialisation does.

    Returns:
        Parameter name -> float32 value, which depends on the name, the size and the seed alone.
    """
    family = family_of(model.config.model_type, where="the model")
    shape = Shape.of_config(model.config, where="the model")
    norm = 1.0 - family.norm_offset

    buffers = dict(model.named_buffers())

    def draw(name: str) -> Tensor:
        if name in buffers:  # such as a router's correction of scores, which begins at zero
            return buffers[name]
        value = torch.empty(model.get_parameter(name).shape)
        generator = generator_of(seed, name)
        rest = name.removeprefix(f"{family.layers}.").partition(".")[2]
        if rest in family.first_values:
            return family.first_values[rest](value, generator)
        if value.dim() >= 2:
            if init.kind == "fan-in":
                return value.normal_(generator=generator) * _fan_in_scale(name, shape, init)
            std = init.std
            return nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
        return value.fill_(0.0 if name.endswith("bias") else norm)

    return draw


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random numbers of a parameter, which depend on the seed and its name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _fan_in_scale(name: str, shape: Shape, init: InitSpec) -> float | Tensor:
    """The standard deviation of a matrix, a column of them where a fused projection's rows differ."""
    family = shape.family
    if name == family.embedding:
        return init.std
    if name == family.head:
        return shape.hidden**-0.5
    layer, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
    axes = shape.block_tensors(int(layer))[rest]
    if axes[0] == "experts" and len(axes) == 3:
        return shape.axis_size(axes[-1]) ** -0.5
    rows, *columns = axes
    parts = rows if isinstance(rows, tuple) else (rows,)
    scales = [shape.head_dim**-0.5 if part in ("query", "gated_query") else 1.0 for part in parts]
    sizes = torch.tensor([shape.axis_size(part) for part in parts])
    column = torch.tensor(scales).repeat_interleave(sizes).reshape(-1, *[1] * len(columns))
    return column * math.prod(shape.tensor_size(tuple(columns))) ** -0.5


def stored_weights(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its value as stored.

    Raises:
        UserError: when that function is called, if the tensor holds NaN or infinity.
    """

    def read(name: str) -> Tensor:
        tensor = checkpoint.tensor(name)
        checkpoint.check_finite(name, tensor)
        return tensor

    return read
