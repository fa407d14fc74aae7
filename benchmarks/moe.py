"""What pruning experts costs: a half of them, or of their weights, on blocks of Qwen3-30B-A3B, under a limit on memory.

    python benchmarks/moe.py [--methods reap] [--blocks 2,4] [--windows 8] [--seqlen 512] [--limit 4]

Writes random checkpoints of few such blocks (128 experts of 768 channels, hidden size 2048, 32 heads and 4 KV heads of
128 channels, bfloat16; 1.2 GB a block), block by block, and prunes each in a process of its own whose writable private
memory is limited. Prints seconds, tokens a second and peaks, the line through them, what it comes to for all 48 blocks,
and secateur's own estimate beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_tokens
from measure import Measured, run
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from secateur.calibration.block_walk import default_batch
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.config_file import read_shape
from secateur.pruning.memory_estimate import estimate_memory
from secateur.pruning.target import Target

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 32_768  #: smaller than the model's 151,936 tokens, whose embedding and head are never in memory whole
BLOCKS = 48  #: of the whole model
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, EXPERT_FFN, ACTIVE = 2048, 32, 4, 128, 128, 768, 8
IMPORTS = "import accelerate, secateur.cli.verbs.pruning; from transformers import Qwen3MoeForCausalLM"


def make_checkpoints(folder: Path, counts: list[int]) -> dict[int, Path]:
    """Write a checkpoint for each number of blocks; they share the files of their blocks."""
    shared = folder / "shared"
    shared.mkdir()
    generator = torch.Generator().manual_seed(0)
    files = {name: list(tensors) for name, tensors in _shards(max(counts), shared, generator)}
    directories = {}
    for count in counts:
        directory = directories[count] = folder / f"blocks-{count}"
        directory.mkdir()
        names = ["outer.safetensors", *(f"block-{layer}.safetensors" for layer in range(count))]
        for file in names:
            os.link(shared / file, directory / file)
        index = {"metadata": {}, "weight_map": {name: file for file in names for name in files[file]}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        config(count).save_pretrained(directory)
    return directories


def config(blocks: int) -> Qwen3MoeConfig:
    """The configuration of so many blocks."""
    heads: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Qwen3MoeConfig(
        **heads,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=blocks,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        moe_intermediate_size=EXPERT_FFN,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["Qwen3MoeForCausalLM"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _shards(blocks: int, folder: Path, generator: torch.Generator) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Write one file for the tensors outside the blocks, and one for each block; yield each as it is written."""

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    def norm(size: int) -> Tensor:
        return (1 + 0.3 * torch.randn(size, generator=generator)).to(torch.bfloat16)

    outer = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": norm(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    save_file(outer, folder / "outer.safetensors", {"format": "pt"})
    yield "outer.safetensors", outer
    for layer in range(blocks):
        block = {
            "input_layernorm.weight": norm(HIDDEN),
            "post_attention_layernorm.weight": norm(HIDDEN),
            "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            "self_attn.q_norm.weight": norm(HEAD_DIM),
            "self_attn.k_norm.weight": norm(HEAD_DIM),
            "mlp.gate.weight": matrix(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            block[f"mlp.experts.{expert}.gate_proj.weight"] = matrix(EXPERT_FFN, HIDDEN)
            block[f"mlp.experts.{expert}.up_proj.weight"] = matrix(EXPERT_FFN, HIDDEN)
            block[f"mlp.experts.{expert}.down_proj.weight"] = matrix(HIDDEN, EXPERT_FFN)
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in block.items()}
        save_file(named, folder / f"block-{layer}.safetensors", {"format": "pt"})
        yield f"block-{layer}.safetensors", named


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="reap", help="methods, e.g. reap,wanda,sparsegpt")
    parser.add_argument("--blocks", default="2,4", help="numbers of blocks, two of them for a line")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=float, default=4.0, help="GB of writable private memory")
    parser.add_argument("--threads", type=int, default=1)
    request = parser.parse_args()
    counts = sorted(int(count) for count in request.blocks.split(","))
    with tempfile.TemporaryDirectory(prefix="moe-") as scratch:
        folder = Path(scratch)
        directories = make_checkpoints(folder, counts)
        base = _run([sys.executable, "-c", IMPORTS], request)
        tokens = make_tokens(folder / "tokens.npy", VOCABULARY, request.windows, request.seqlen)
        print(f"{request.windows * request.seqlen:,} tokens, limit {request.limit:g} GB, {request.threads} thread")
        print(f"imports {base.wall:.1f} s, {base.anonymous / 1e6:,.0f} MB")
        for method in request.methods.split(","):
            results = {}
            for count, directory in directories.items():
                out = folder / f"out-{count}"
                options = ["--method", method, "--ratio", "0.5", "--calibration", f"tokens:{tokens}", "--device", "cpu"]
                command = [sys.executable, "-m", "secateur", "prune", str(directory), str(out), *options]
                results[count] = _run(command, request)
                shutil.rmtree(out)
            _report(method, results, base, request, directories)


def _run(command: list[str], request: argparse.Namespace) -> Measured:
    threads = {f"{name}_NUM_THREADS": str(request.threads) for name in ("OMP", "MKL", "OPENBLAS")}
    calm = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **threads, **calm, "PYTHONPATH": str(ROOT / "src")}
    result = run(command, environment, limit=round(request.limit * 1e9))
    if result.failure:
        raise SystemExit(f"{' '.join(command[:4])} failed: {result.failure}")
    return result


def _report(
    method: str,
    results: dict[int, Measured],
    base: Measured,
    request: argparse.Namespace,
    directories: dict[int, Path],
) -> None:
    tokens = request.windows * request.seqlen
    print(f"\n## {method}")
    print("\n| blocks | checkpoint, GB | wall, s | CPU, s | tokens per CPU-second | anonymous, MB | estimate, MB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for count, result in results.items():
        stored = Checkpoint(directories[count]).stored_bytes
        peak, cpu = result.anonymous - base.anonymous, result.cpu - base.cpu
        print(
            f"| {count} | {stored / 1e9:.2f} | {result.wall - base.wall:.1f} | {cpu:.1f} | {tokens / cpu:,.0f} "
            f"| {peak / 1e6:,.0f} | {_estimate(method, count, stored, request) / 1e6:,.0f} |"
        )
    if len(results) < 2:
        return
    (few, first), *_, (many, last) = results.items()
    each = (last.cpu - first.cpu) / (many - few)
    growth = (last.anonymous - first.anonymous) / (many - few)
    cpu = last.cpu - base.cpu + (BLOCKS - many) * each
    peak = last.anonymous - base.anonymous + (BLOCKS - many) * growth
    stored = round(Checkpoint(directories[many]).stored_bytes * BLOCKS / many)
    print(
        f"\n{each:.1f} CPU s and {growth / 1e6:+,.1f} MB for each further block; all {BLOCKS} blocks by this line: "
        f"{cpu / 60:.0f} CPU minutes, {tokens / cpu:,.1f} tokens per CPU-second, {peak / 1e6:,.0f} MB; estimate "
        f"{_estimate(method, BLOCKS, stored, request) / 1e6:,.0f} MB"
    )


def _estimate(method: str, blocks: int, stored: int, request: argparse.Namespace) -> int:
    """What secateur says before it starts, in bytes above the program's own memory."""
    with tempfile.TemporaryDirectory() as scratch:
        config(blocks).save_pretrained(scratch)
        shape, _ = read_shape(Path(scratch) / "config.json")
    prototype = get_method(method)
    after = Target(ratio=0.5).shape(shape, prototype, method)
    batch = default_batch(shape.family, request.seqlen, "cpu")
    needs = estimate_memory(prototype, shape, request.windows, request.seqlen, batch, torch.float32, stored, [after])
    return needs.host("cpu", "ram")


if __name__ == "__main__":
    main()
