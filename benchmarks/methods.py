"""Perplexity after pruning, without retraining, for every method beside random choices at its granularity.

    python benchmarks/methods.py MODEL --calibration SOURCE --data SOURCE

Prints a Markdown table. A random control has several seeds and the same spaces; its mean (geometric, as
perplexities are exponentials) is what a method has to beat, and the best and worst draw are shown.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from secateur.data.sources import open_source
from secateur.data.tokenizer import encode_documents, load_tokenizer
from secateur.errors import UserError
from secateur.evaluation.loss import Protocol, window_losses
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.calibration import Calibration
from secateur.pruning.pattern import Pattern
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target
from secateur.runtime import quiet_libraries

#: title -> method, options, and fields of the target besides the ratio
Row = tuple[str, dict[str, Any], dict[str, Any]]
HEADS = {"axes": ("kv", "ffn")}
CHANNELS = {"axes": ("hidden", "ffn")}
GROUPS: dict[str, tuple[Row, dict[str, Row]]] = {
    "depth": (
        ("random-depth", {}, {}),
        {
            "shortgpt": ("shortgpt", {}, {}),
            "minitron-depth": ("minitron-depth", {}, {}),
            "shortened-llama": ("shortened-llama", {}, {}),
            "shortened-llama-ppl": ("shortened-llama-ppl", {}, {}),
            "sleb": ("sleb", {}, {}),
        },
    ),
    "width, heads and FFN": (
        ("random-width", {}, HEADS),
        {
            "llm-pruner": ("llm-pruner", {}, HEADS),
            "llm-pruner, vector": ("llm-pruner", {"aggregate": "vector"}, HEADS),
            "llm-pruner, second order": ("llm-pruner", {"order": "second"}, HEADS),
            "llm-pruner, mixed": ("llm-pruner", {"order": "mixed"}, HEADS),
            "minitron-width": ("minitron-width", {}, HEADS),
            "wanda-sp": ("wanda-sp", {}, HEADS),
            "flap": ("flap", {}, HEADS),
            "flap, no bias": ("flap", {"bias": "none"}, HEADS),
            "flap, global": ("flap", {}, {**HEADS, "allocation": "global"}),
        },
    ),
    "width, hidden and FFN": (
        ("random-width", {}, CHANNELS),
        {
            "minitron-width": ("minitron-width", {}, CHANNELS),
            "llm-pruner": ("llm-pruner", {}, CHANNELS),
        },
    ),
    "sparse": (
        ("random-weight", {}, {}),
        {name: (name, {}, {}) for name in ("magnitude", "wanda", "ria", "sparsegpt", "alps")},
    ),
}
PATTERNS = ("4:8", "2:4")


def main() -> None:
    """Run every method on one model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=128, help="evaluation windows")
    parser.add_argument("--skip", type=int, default=0, help="tokens of --data to leave out, where both texts are one")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5, help="draws of each random control")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.7])
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    arguments = parser.parse_args()
    quiet_libraries()
    checkpoint = Checkpoint(arguments.model)
    length = arguments.seqlen
    seen = _ids(checkpoint, arguments.calibration, arguments.windows * length)
    calibration = Calibration(torch.from_numpy(seen[: len(seen) // length * length].reshape(-1, length)), "calibration")
    held_out = _ids(checkpoint, arguments.data, arguments.skip + arguments.held_out * length)[arguments.skip :]
    protocol = Protocol.of_stream(held_out, length, arguments.data)

    def perplexity(row: Row, **target: Any) -> float:
        method, options, fields = row
        plan = make_plan(checkpoint, method, Target(**fields, **target), calibration, options=options)
        with tempfile.TemporaryDirectory() as out:
            write_pruned(checkpoint, plan, Path(out))
            return float(window_losses(Checkpoint(out).load(), protocol).summary()["perplexity"])

    dense = window_losses(checkpoint.load(), protocol).summary()["perplexity"]
    print(f"dense: {dense:.3f}; calibration {calibration.record()['hash'][:12]}, {protocol.tokens:,} held-out tokens\n")
    print("| granularity | method | " + " | ".join(f"{ratio:g}" for ratio in arguments.ratios) + " |")
    print("|---|---|" + "---|" * len(arguments.ratios))
    for group, (control, rows) in ((name, GROUPS[name]) for name in arguments.groups):
        controls = {ratio: _draws(perplexity, control, arguments.seeds, ratio=ratio) for ratio in arguments.ratios}
        cells = [f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in controls.values()]
        print(f"| {group} | {control[0]}, {arguments.seeds} draws | " + " | ".join(cells) + " |", flush=True)
        for title, row in rows.items():
            cells = []
            for ratio in arguments.ratios:
                try:
                    value = perplexity(row, ratio=ratio)
                    cells.append(f"{value:.2f}" + ("" if value < controls[ratio][0] else " (not below random)"))
                except UserError as error:
                    cells.append(f"refused: {error}")
            print(f"| {group} | {title} | " + " | ".join(cells) + " |", flush=True)
    if "sparse" not in arguments.groups:
        return
    print("\n| pattern | " + " | ".join(PATTERNS) + " |\n|---|" + "---|" * len(PATTERNS))
    control, rows = GROUPS["sparse"]
    for title, row in {"random-weight": control, **rows}.items():
        cells = []
        for pattern in PATTERNS:
            try:
                cells.append(f"{perplexity(row, pattern=Pattern.parse(pattern)):.2f}")
            except UserError as error:
                cells.append(f"refused: {error}")
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


def _draws(perplexity: Any, control: Row, seeds: int, **target: Any) -> tuple[float, float, float]:
    """Geometric mean, lowest and highest of the control's perplexities."""
    method, options, fields = control
    values = [perplexity((method, {**options, "seed": seed}, fields), **target) for seed in range(seeds)]
    return math.exp(sum(map(math.log, values)) / seeds), min(values), max(values)


def _ids(checkpoint: Checkpoint, source: str, limit: int) -> Any:
    return encode_documents(open_source(source).documents(), load_tokenizer(checkpoint.directory), limit).ids


if __name__ == "__main__":
    main()
