"""Cost of measuring accuracy on tasks: secateur and lm-evaluation-harness's own command line, on the same documents.

    python benchmarks/evaluate.py MODEL TASKS_DATA [--tasks arc_easy,hellaswag] [--threads 1] [--dtype float32]

MODEL is a checkpoint, TASKS_DATA a folder with ``<task>.jsonl`` in the fields of the task's dataset on the Hub. A row
compares two commands: ``secateur eval``, and ``lm_eval run --model hf`` in batches of 8 (its default is 1) with a YAML
file that includes the task's own and reads the same documents. Wall seconds are of whole processes, including imports
and reading; "scoring" is the CPU-seconds beyond those of the same command with one document. Scores must agree in all
digits that the harness prints. Prints a Markdown table; ratios are lm_eval over secateur, so secateur is faster above
1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import lm_eval.tasks
from measure import Measured, run

from secateur.evaluation.lm_eval.tasks import METRICS


@dataclass
class Contender:
    """One command: its time and memory, and its score to four digits."""

    usage: Measured
    score: str


def harness_task(name: str, data: Path, folder: Path) -> str:
    """Write the YAML of the harness's task on the documents of a file, and return the name of the new task.

    Examples in the prompt are drawn from ``<task>.examples.jsonl`` beside the file, if it exists.
    """
    root = Path(lm_eval.tasks.__file__).parent
    base = next(path for path in sorted(root.glob("**/*.yaml")) if f"\ntask: {name}\n" in f"\n{path.read_text()}\n")
    examples = data.with_name(f"{name}.examples.jsonl")
    split = "train" if examples.is_file() else "null"
    files = f"test: {data.resolve()}" + (f", train: {examples.resolve()}" if examples.is_file() else "")
    lines = [
        f"include: {base}",
        f"task: {name}_local",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{files}}}}}",
        f"training_split: {split}",
        "validation_split: null",
        "test_split: test",
        f"fewshot_split: {split}",
    ]
    (folder / f"{name}_local.yaml").write_text("\n".join(lines) + "\n")
    return f"{name}_local"


def harness(arguments: argparse.Namespace, name: str, data: Path, environment: dict[str, str]) -> Contender:
    """Run lm_eval."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        line += ["--model_args", f"pretrained={arguments.model},dtype={arguments.dtype}"]
        line += ["--tasks", harness_task(name, data, Path(scratch)), "--include_path", scratch]
        line += ["--device", arguments.device, "--batch_size", str(arguments.harness_batch), "--output_path", str(out)]
        usage = run(line, {**environment, "HF_DATASETS_CACHE": f"{scratch}/cache"}, device=arguments.device)
        if usage.failure:
            return Contender(usage, f"failed: {usage.failure}")
        (result,) = json.loads(next(out.rglob("*.json")).read_text())["results"].values()
        return Contender(usage, f"{result[f'{METRICS[name]},none']:.4f}")


def secateur(arguments: argparse.Namespace, name: str, data: Path, environment: dict[str, str]) -> Contender:
    """Run secateur."""
    with tempfile.TemporaryDirectory() as scratch:
        line = [sys.executable, "-m", "secateur", "eval", arguments.model, "--suite", name]
        line += [
            "--tasks-data",
            str(data.parent),
            "--device",
            arguments.device,
            "--dtype",
            arguments.dtype,
            "--out",
            scratch,
        ]
        usage = run(line, environment, device=arguments.device)
        if usage.failure:
            return Contender(usage, f"failed: {usage.failure}")
        (result,) = json.loads(next(Path(scratch).glob("*.json")).read_text())["measurements"]
        return Contender(usage, f"{result['value']:.4f}")


def row(arguments: argparse.Namespace, name: str, environment: dict[str, str]) -> str:
    """A line of the table."""
    data = Path(arguments.tasks_data) / f"{name}.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / f"{name}.jsonl"
        first.write_text(data.read_text().splitlines()[0] + "\n")
        idle = [command(arguments, name, first, environment).usage for command in (secateur, harness)]
    contenders = [command(arguments, name, data, environment) for command in (secateur, harness)]
    scoring = [max(c.usage.cpu - start.cpu, 1e-3) for c, start in zip(contenders, idle, strict=True)]
    scores, walls = [c.score for c in contenders], [c.usage.wall for c in contenders]
    cells = [name, *scores, "yes" if scores[0] == scores[1] else "no"]
    if contenders[1].usage.failure:
        return f"| {' | '.join(cells)} | {walls[0]:.1f} | | | {scoring[0]:.1f} | | |"
    cells += [f"{seconds:.1f}" for seconds in walls] + [f"{walls[1] / walls[0]:.2f}"]
    cells += [f"{seconds:.1f}" for seconds in scoring] + [f"{scoring[1] / scoring[0]:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks_data")
    parser.add_argument("--tasks", default=",".join(METRICS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--harness-batch", type=int, default=8)
    arguments = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    print("| task | secateur | lm_eval | same | wall s | lm_eval wall s | ratio | scoring CPU s | lm_eval | ratio |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in arguments.tasks.split(","):
        print(row(arguments, name, environment), flush=True)


if __name__ == "__main__":
    main()
