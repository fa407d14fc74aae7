"""Random Llama checkpoints and token windows, made once, without ever holding more than one block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

__all__ = ["SIZES", "Size", "make_checkpoint", "make_tokens"]


@dataclass(frozen=True)
class Size:
    """The shape of a Llama, and how much text it is calibrated on unless told otherwise."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: torch.dtype
    windows: int
    seqlen: int
    threads: int
    shard: int = 1 << 30  #: bytes after which a new shard begins

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and sizes in the order of the model."""
        key = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            start = f"model.layers.{layer}"
            yield f"{start}.input_layernorm.weight", (self.hidden,)
            yield f"{start}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{start}.self_attn.k_proj.weight", (key, self.hidden)
            yield f"{start}.self_attn.v_proj.weight", (key, self.hidden)
            yield f"{start}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{start}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{start}.mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield f"{start}.mlp.up_proj.weight", (self.ffn, self.hidden)
            yield f"{start}.mlp.down_proj.weight", (self.hidden, self.ffn)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(int(np.prod(size)) for _, size in self.tensors)


SIZES = {
    "tiny": Size(64, 176, 4, 4, 2, 256, torch.float32, 8, 64, 1),  # to try the benchmark itself
    "8m": Size(256, 688, 8, 8, 4, 4096, torch.float32, 128, 512, 1),
    "200m": Size(1024, 2816, 12, 16, 8, 32000, torch.float32, 32, 512, 2),
    "3gb": Size(2048, 5632, 30, 16, 4, 32000, torch.bfloat16, 8, 256, 2, 1 << 29),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, torch.bfloat16, 128, 2048, 2, 1 << 32),
}


def make_checkpoint(size: Size, directory: Path) -> Path:
    """Write a random checkpoint, unless it is there already; each shard is written as soon as it is full."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(pending, directory / file, {"format": "pt"})
        where.update(dict.fromkeys(pending, file))
        pending.clear()

    generator = torch.Generator().manual_seed(0)
    for name, shape in size.tensors:
        noise = torch.randn(shape, generator=generator)
        # Far enough from a fresh model's 0.02 that layers and channels differ by more than rounding.
        value = 1 + 0.3 * noise if len(shape) == 1 else noise * (1.0 if "embed" in name else shape[1] ** -0.5)
        pending[name] = value.to(size.dtype)
        if sum(t.nbytes for t in pending.values()) >= size.shard:
            write()
    if pending:
        write()
    total = size.parameters * size.dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(4096, size.seqlen),
        dtype=size.dtype,
        architectures=["LlamaForCausalLM"],
        **ids,
    )
    config.save_pretrained(directory)  # last: it says that all the rest is there
    return directory


def make_tokens(file: Path, vocabulary: int, windows: int, seqlen: int) -> Path:
    """Write random token ids [windows, seqlen] from a fixed seed."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (windows, seqlen), dtype=np.int64)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, ids)
    return file
