"""CPU-seconds (user and system) of commands that compute nothing: they should answer at once.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = Path(__file__).parents[1] / "studies" / "demo.yaml"
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
COMMANDS = (
    "--help",
    "prune --help",
    "shapes config.json --ratio 0.5",
    f"study plan {DEMO}",
    f"study status {DEMO}",
    "prune a b --method wandda",
    "prune a b --method wanda --ratio 1.5",
    "train x",
    "eval a --suite zero-shott",
)


def cpu_seconds(arguments: list[str], folder: Path, repeats: int = 3) -> float:
    """CPU-seconds of a Python process, the least of several."""
    least = float("inf")
    for _ in range(repeats):
        before = os.times()
        subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        least = min(least, used)
    return least


def main() -> None:
    """Print a line for each command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(LLAMA_8B))
        print(f"{cpu_seconds(['-c', 'import secateur'], folder):6.2f}  import secateur")
        for line in COMMANDS:
            print(f"{cpu_seconds(['-m', 'secateur', *line.split()], folder):6.2f}  secateur {line}")


if __name__ == "__main__":
    main()
