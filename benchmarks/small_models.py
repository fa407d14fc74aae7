"""What makes training of models below a million parameters faster on one CPU core.

    python benchmarks/small_models.py [--steps 30] [--repeats 3]

Each row changes the row that it names: the heads, the length of a window, the type, compilation, the windows of a
micro-batch. Every step reads 2,048 tokens. Figures are medians over the repeats, in CPU-seconds of one thread, so that
other processes disturb them little; "speed" is by the first row. FLOPs are those of `secateur study plan`. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from train import ROOT, Laps, Size, by_secateur, config, environment

BASE = Size(hidden=48, ffn=128, layers=8, heads=4, kv_heads=2, vocabulary=512, sequence=256, windows=8, tied=True)


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    size: Size
    dtype: str = "float32"
    compiled: bool = False


SHORT = replace(BASE, sequence=128, windows=16)
FEW_HEADS = replace(SHORT, heads=2, kv_heads=1)
VARIANTS = {
    "4 heads of 12, windows of 256": Variant(BASE),
    "windows of 128": Variant(SHORT),
    "windows of 128, 2 heads of 24": Variant(FEW_HEADS),
    "the same, hidden 64, 2 heads of 32": Variant(replace(FEW_HEADS, hidden=64)),
    "windows of 128, 2 heads of 24, bfloat16": Variant(FEW_HEADS, "bfloat16"),
    "windows of 128, 2 heads of 24, compiled": Variant(FEW_HEADS, compiled=True),
    "windows of 128, 2 heads of 24, 4,096 tokens at once": Variant(replace(FEW_HEADS, windows=32)),
}


def measure(name: str, steps: int) -> None:
    """Train one variant in this process, and print the CPU-seconds of a step."""
    variant, laps = VARIANTS[name], Laps()
    by_secateur(variant.size, variant.dtype, "cpu", steps, laps, compiled=variant.compiled)
    print(json.dumps(laps.per_step()["cpu"]))


def seconds(name: str, steps: int) -> float:
    """Measure a variant in a process of its own."""
    command = [sys.executable, __file__, "--variant", name, "--steps", str(steps)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(1), cwd=Path(__file__).parent)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr[-2000:]}")
    return float(run.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if arguments.variant:
        measure(arguments.variant, arguments.steps)
        return
    from secateur.model.shapes import Shape, train_flops

    print("| variant | parameters | CPU s/step | tokens/CPU s | FLOPs/CPU s | speed |\n|---|---:|---:|---:|---:|---:|")
    first = None
    for name, variant in VARIANTS.items():
        size = variant.size
        tokens = size.sequence * size.windows
        shape = Shape.of_config(config(size), where=name)
        step = statistics.median(seconds(name, arguments.steps) for _ in range(arguments.repeats))
        speed, flops = tokens / step, train_flops(shape, tokens, size.sequence) / step
        first = first or speed
        print(
            f"| {name} | {shape.total:,} | {step:.3f} | {speed:,.0f} | {flops:.3g} | {speed / first:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
