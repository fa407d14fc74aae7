"""What training costs: secateur beside transformers' Trainer, with masks and without, by one process and by two.

    python benchmarks/train.py [--sizes 5m,25m] [--dtypes float32,bfloat16] [--device cpu] [--steps 12] [--repeats 3]
    python benchmarks/train.py --sizes 200m,1b --dtypes bfloat16 --device cuda
    python benchmarks/train.py --ranks

Both train the same random Llama on the same windows with fused AdamW, in a process of its own each, in turn. The first
two steps are left out; figures are medians over the rest and over the repeats. CPU-seconds count all threads of the
process. Memory is what the process alone holds above its imports ("anon"), at its peak. "cost" and "memory ratio" are
the row's by plain secateur's, in CPU-seconds (on a GPU in wall seconds): above 1 is dearer. With --ranks, two gloo
processes train beside one at the same global batch, and the largest difference between their losses over 50 steps is
told. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = ("trainer", "secateur", "secateur, masked")
WARM = 2  #: steps that are left out


@dataclass(frozen=True)
class Size:
    """The shape of a Llama and of a step."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    sequence: int
    windows: int  #: of a step, all at once
    tied: bool = False


SIZES = {
    "5m": Size(256, 688, 4, 4, 4, 4096, 256, 8),
    "25m": Size(512, 1376, 7, 8, 8, 4096, 256, 8),
    "200m": Size(1024, 2816, 12, 16, 16, 32000, 4096, 8),
    "1b": Size(2048, 5632, 20, 16, 16, 32000, 4096, 8),
}


class Random:
    """Random ids, the same for everyone."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """A window's ids: int64 [stop - start]."""
        return np.random.default_rng(start).integers(0, self.size.vocabulary, stop - start)


class Laps:
    """CPU and wall seconds at the end of each step."""

    def __init__(self) -> None:
        self.cpu, self.wall = [time.process_time()], [time.perf_counter()]

    def lap(self) -> None:
        """A step has ended."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def per_step(self) -> dict[str, float]:
        """Medians over the steps after the first ones."""
        return {
            key: statistics.median(b - a for a, b in zip(laps[WARM:], laps[WARM + 1 :], strict=False))
            for key, laps in (("cpu", self.cpu), ("wall", self.wall))
        }


def config(size: Size) -> Any:
    """The configuration of the Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.sequence,
        head_dim=size.hidden // size.heads,
        tie_word_embeddings=size.tied,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def by_trainer(size: Size, dtype: str, device: str, steps: int, laps: Laps) -> list[float]:
    """Train with transformers' Trainer; return the losses."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    store = Random(size)

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * size.windows

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.from_numpy(store.read("train", index * size.sequence, (index + 1) * size.sequence))
            return {"input_ids": ids, "labels": ids}

    class Lapping(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            laps.lap()

    losses: list[float] = []

    class Logged(Trainer):
        def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=size.windows,
            bf16=dtype == "bfloat16",
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            use_cpu=device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
            seed=0,
        )
        torch.manual_seed(0)
        Logged(
            model=LlamaForCausalLM(config(size)), args=arguments, train_dataset=Windows(), callbacks=[Lapping()]
        ).train()
    return losses


def by_secateur(
    size: Size, dtype: str, device: str, steps: int, laps: Laps, *, masked: bool = False, compiled: bool = False
) -> list[float]:
    """Train with secateur, half of the blocks' weights masked if asked; return the losses."""
    import torch

    from secateur.model.checkpoint import skeleton
    from secateur.training.batches import Slice
    from secateur.training.init import fresh_weights
    from secateur.training.loop import RunOptions, train_loop
    from secateur.training.metrics import Metrics
    from secateur.training.parallel import Execution, place_model
    from secateur.training.recipe import InitSpec, Recipe
    from secateur.training.throughput import Meter

    class Lapping(Meter):
        def step(self, tokens: int, seconds: float) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            laps.lap()

    class Kept(Metrics):
        def write(self, entry: dict[str, Any]) -> None:
            losses.extend([entry["loss"]] if "loss" in entry else [])

    losses: list[float] = []
    step = size.windows * size.sequence
    recipe = Recipe(sequence=size.sequence, tokens_per_step=step, micro_batch=size.windows, peak_rate=1e-4)
    model = skeleton(config(size), Path("config.json"))
    execution = Execution(device, "bfloat16" if dtype == "bfloat16" else "float32", compile=compiled)
    module = place_model(model, fresh_weights(model, InitSpec(std=0.02), seed=0), execution)
    masks = {}
    if masked:
        for name, parameter in module.model.named_parameters():
            if name.endswith("_proj.weight"):
                masks[name] = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    data = Slice(Random(size), 0, steps * step, recipe)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(Path(folder), "benchmark", save_every=steps, metrics=Kept(None), meter=Lapping())
        train_loop(module, data, masks=masks, measure=lambda _: None, points=1, options=options)
    return losses


def contend(arguments: argparse.Namespace) -> None:
    """Be one contender; print what it took as JSON."""
    import torch
    import transformers

    from secateur.memory import track_resources
    from secateur.runtime import quiet_libraries

    transformers.logging.set_verbosity_error()
    quiet_libraries()
    size, name = SIZES[arguments.sizes], arguments.contender
    laps, options = Laps(), (arguments.dtypes, arguments.device, arguments.steps)
    torch.randn(512, 512) @ torch.randn(512, 512)
    with track_resources(arguments.device) as before:
        time.sleep(0.2)
    with track_resources(arguments.device) as use:
        if name == "trainer":
            losses = by_trainer(size, *options, laps)
        else:
            losses = by_secateur(size, *options, laps, masked=name != "secateur")
    taken = {**laps.per_step(), "memory": (use.memory or 0) - (before.memory or 0), "device": use.device}
    print(json.dumps({**taken, "losses": losses}))


def measured(name: str, size: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    command = [sys.executable, __file__, "--contender", name, "--sizes", size, "--dtypes", dtype]
    command += ["--device", arguments.device, "--steps", str(arguments.steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(arguments.threads))
    if done.returncode:
        raise SystemExit(f"{name}, {size}, {dtype}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(threads: int) -> dict[str, str]:
    """The environment of a contender."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    fixed = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def compare(size: str, dtype: str, arguments: argparse.Namespace) -> None:
    """Print the rows of one size and type."""
    from secateur.model.shapes import Shape, train_flops

    sizes = SIZES[size]
    shape = Shape.of_config(config(sizes), where=size)
    tokens = sizes.sequence * sizes.windows
    flops = train_flops(shape, tokens, sizes.sequence)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.repeats):
        for name in CONTENDERS:
            rows[name].append(measured(name, size, dtype, arguments))
    middle = {
        name: {key: statistics.median(row[key] or 0 for row in found) for key in ("cpu", "wall", "memory", "device")}
        for name, found in rows.items()
    }
    key = "cpu" if arguments.device == "cpu" else "wall"
    ours = middle["secateur"]
    for name, row in middle.items():
        ratio = row[key] / ours[key]
        peak = f"{row['device'] / 1e9:.2f} GB" if arguments.device != "cpu" else f"{row['memory'] / 1e6:.0f} MB"
        memory = "device" if arguments.device != "cpu" else "memory"
        losses = rows[name][0]["losses"]
        print(
            f"| {size} ({shape.total / 1e6:.1f}M) | {dtype} | {name} | {row['cpu']:.3f} | {row['wall']:.3f} | "
            f"{tokens / row['wall']:,.0f} | {tokens / row['cpu']:,.0f} | {flops / row['wall']:.3g} | {peak} | "
            f"{ratio:.3f} | {row[memory] / max(ours[memory], 1):.2f} | {losses[0]:.3f} -> {losses[-1]:.3f} |",
            flush=True,
        )


def ranks() -> None:
    """Train by one process and by two, 50 steps each, and print the largest difference between their losses."""
    from secateur.data.manifest import write_manifest
    from secateur.data.shards import ShardWriter

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        writer = ShardWriter(corpus, "train", "uint16")
        generator = np.random.default_rng(0)
        for _ in range(200):
            writer.append(np.cumsum(generator.integers(0, 5, 600)) % 512)
        write_manifest(corpus, 512, {"train": writer.close()})
        small = Size(128, 352, 4, 4, 2, 512, 128, 16)
        (folder / "config.json").write_text(json.dumps(config(small).to_dict()))
        found = []
        for processes in (1, 2):
            out = folder / str(processes)
            command = ["-m", "secateur", "train", str(out), "--init", "scratch", "--like", str(folder / "config.json")]
            command += ["--data", f"shards:{corpus}", "--tokens", str(50 * 2048), "--device", "cpu", "--micro-batch"]
            command += ["4", "--set", "sequence=128", "--set", "tokens_per_step=2048", "--set", "peak_rate=1e-3"]
            several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            prefix = [sys.executable, *(several if processes == 2 else [])]
            subprocess.run([*prefix, *command], check=True, env=environment(1), capture_output=True)
            lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            found.append([line["loss"] for line in lines if "loss" in line])
        worst = max(abs(a - b) / a for a, b in zip(*found, strict=True))
        print(
            f"two gloo processes against one, {len(found[0])} steps, losses {found[0][0]:.4f} -> {found[0][-1]:.4f}: "
        )
        print(f"largest relative difference {worst:.2g} (asked: 1e-5)")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="5m,25m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments)
        return
    sys.path.insert(0, str(ROOT / "src"))
    if arguments.ranks:
        ranks()
        return
    head = "size | dtype | contender | CPU s/step | wall s/step | tokens/s | tokens/CPU s | FLOPs/s | memory | cost | "
    print(f"| {head}memory ratio | losses |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for size in arguments.sizes.split(","):
        for dtype in arguments.dtypes.split(","):
            compare(size, dtype, arguments)


if __name__ == "__main__":
    main()
