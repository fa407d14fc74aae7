"""What accuracy on tasks costs: secateur's beside lm-evaluation-harness's own command line, on the same documents.

    python benchmarks/evaluate.py MODEL TASKS_DATA [--tasks arc_easy,hellaswag] [--threads 1] [--dtype float32]

MODEL is a checkpoint, TASKS_DATA a folder with ``<task>.jsonl`` in the fields of the task's dataset on the Hub. A row
compares two commands: ``secateur eval``, and ``lm_eval run --model hf`` with a YAML file that includes the task's own
and reads the same documents, in batches of 8 (its default is 1). Wall seconds are of whole processes, imports and
reading included; "scoring" is CPU-seconds above what the same command takes with one document. Scores must be the same
to the last digit that the harness prints. Prints a Markdown table; ratios are lm_eval over secateur, so above 1
secateur is faster.
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
    """One command, how long it took, and the score that it printed, to four digits."""

    taken: Measured
    score: str


def harness_task(name: str, data: Path, folder: Path) -> str:
    """Write the YAML of a local task and return its name: the harness's own task on the documents of a file.

    Examples in the prompt are drawn from the file beside it, ``<task>.examples.jsonl``, if it is there.
    """
    root = Path(lm_eval.tasks.__file__).parent
    own = next(path for path in sorted(root.glob("**/*.yaml")) if f"\ntask: {name}\n" in f"\n{path.read_text()}\n")
    examples = data.with_name(f"{name}.examples.jsonl")
    split = "train" if examples.is_file() else "null"
    files = f"test: {data.resolve()}" + (f", train: {examples.resolve()}" if examples.is_file() else "")
    lines = [
        f"include: {own}",
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


def harness(asked: argparse.Namespace, name: str, data: Path, environment: dict[str, str]) -> Contender:
    """Run lm_eval."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        line += ["--model_args", f"pretrained={asked.model},dtype={asked.dtype}"]
        line += ["--tasks", harness_task(name, data, Path(scratch)), "--include_path", scratch]
        line += ["--device", asked.device, "--batch_size", str(asked.harness_batch), "--output_path", str(out)]
        taken = run(line, {**environment, "HF_DATASETS_CACHE": f"{scratch}/cache"}, device=asked.device)
        if taken.failure:
            return Contender(taken, f"failed: {taken.failure}")
        (found,) = json.loads(next(out.rglob("*.json")).read_text())["results"].values()
        return Contender(taken, f"{found[f'{METRICS[name]},none']:.4f}")


def secateur(asked: argparse.Namespace, name: str, data: Path, environment: dict[str, str]) -> Contender:
    """Run secateur."""
    with tempfile.TemporaryDirectory() as scratch:
        line = [sys.executable, "-m", "secateur", "eval", asked.model, "--suite", name]
        line += ["--tasks-data", str(data.parent), "--device", asked.device, "--dtype", asked.dtype, "--out", scratch]
        taken = run(line, environment, device=asked.device)
        if taken.failure:
            return Contender(taken, f"failed: {taken.failure}")
        (found,) = json.loads(next(Path(scratch).glob("*.json")).read_text())["measurements"]
        return Contender(taken, f"{found['value']:.4f}")


def row(asked: argparse.Namespace, name: str, environment: dict[str, str]) -> str:
    """A line of the table."""
    data = Path(asked.tasks_data) / f"{name}.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        one = Path(scratch) / f"{name}.jsonl"
        one.write_text(data.read_text().splitlines()[0] + "\n")
        idle = [way(asked, name, one, environment).taken for way in (secateur, harness)]
    ours, theirs = (way(asked, name, data, environment) for way in (secateur, harness))
    scoring = [max(c.taken.cpu - start.cpu, 1e-3) for c, start in zip((ours, theirs), idle, strict=True)]
    same = "yes" if ours.score == theirs.score else "no"
    if theirs.taken.failure:
        return f"| {name} | {ours.score} | {theirs.score} | {same} | {ours.taken.wall:.1f} | | | {scoring[0]:.1f} | | |"
    cells = [name, ours.score, theirs.score, same]
    cells += [f"{c.taken.wall:.1f}" for c in (ours, theirs)] + [f"{theirs.taken.wall / ours.taken.wall:.2f}"]
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
    asked = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "TOKENIZERS_PARALLELISM": "false"}
    print("| task | secateur | lm_eval | same | wall s | lm_eval wall s | ratio | scoring CPU s | lm_eval | ratio |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in asked.tasks.split(","):
        print(row(asked, name, environment), flush=True)


if __name__ == "__main__":
    main()
