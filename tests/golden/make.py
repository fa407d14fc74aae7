"""Record golden values: what each method does to each family, a short training run, and the smoke study.

``python tests/golden/make.py [FOLDER]`` writes the JSON files, beside it unless a folder is named;
``tests/unit/test_golden.py`` compares with them. Hashes are equal only on the same processor features and versions
(``environment``); losses are equal up to rounding anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from helpers import tiny_family, token_corpus, windows  # noqa: E402
from secateur.cli import main  # noqa: E402

#: the families that the pinned results are of
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "olmo2", "phi3")
RATIOS = {"sparse": "0.5", "width": "0.4", "depth": "0.4"}
METHODS = {
    "shortgpt": "depth",
    "minitron-depth": "depth",
    "shortened-llama": "depth",
    "shortened-llama-ppl": "depth",
    "random-depth": "depth",
    "llm-pruner": "width",
    "minitron-width": "width",
    "wanda-sp": "width",
    "flap": "width",
    "random-width": "width",
    "sheared": "width",
    "magnitude": "sparse",
    "wanda": "sparse",
    "sparsegpt": "sparse",
    "random-weight": "sparse",
}
UNCALIBRATED = ("random-depth", "random-width", "random-weight", "magnitude")
SHEARED = ("--option", "steps=120", "--option", "windows=4", "--option", "phi=1000", "--option", "multiplier_rate=300")


def environment() -> dict[str, str]:
    """What bytes depend on: the processor's arithmetic, Python, torch and transformers."""
    return {
        "arithmetic": arithmetic(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def arithmetic() -> str:
    """A digest of the gradients of a small model: processors of the same features round differently."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    ids = torch.randint(97, (4, 64), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None]
    return hashlib.sha256(b"".join(gradients)).hexdigest()[:16]


def run(*arguments: object) -> dict[str, Any]:
    """Run one command of the command line and return its JSON answer."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()) as log:
        code = main([*map(str, arguments), "--json"])
    if code:
        raise SystemExit(f"{arguments}: exit code {code}: {log.getvalue()[-2000:]}")
    return json.loads(output.getvalue())


def sha256(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def prune(folder: Path, family: str, method: str) -> dict[str, Any]:
    """Prune a tiny checkpoint and return its hashes, its plan's fingerprint, what was removed and its loss."""
    model, ids, out = folder / f"{family}-0", folder / "ids.npy", folder / f"{family}-{method}"
    if not model.exists():
        tiny_family(folder, family)
    if not ids.exists():
        np.save(ids, windows(count=8, length=16).numpy())
    source = () if method in UNCALIBRATED else ("--calibration", f"tokens:{ids}")
    options = SHEARED if method == "sheared" else ()
    amount = ("--shape", "ffn=32") if method == "sheared" else ("--ratio", RATIOS[METHODS[method]])
    answer = run("prune", model, out, "--method", method, *amount, *source, *options)
    loss = run("eval", out, "--data", f"tokens:{ids}")["results"][0]["measurements"][0]["value"]
    hashes = {name: sha256(out / name) for name in ("model.safetensors", "plan.safetensors")}
    return {"sha256": hashes, "ratio": answer["ratio"], "shape": answer["shape"], "loss": loss}


def train(folder: Path) -> dict[str, Any]:
    """Train a tiny model from scratch, prune it, retrain it by itself and from a teacher, and compare the two."""
    tiny_family(folder, "llama", seed=3)
    like = folder / "llama-3"
    corpus = token_corpus(folder / "corpus", tokens=6000, vocabulary=61)
    recipe = [f"--set={s}" for s in ("sequence=32", "tokens_per_step=256", "peak_rate=3e-3", "init_std=0.06")]
    common = ("--data", f"shards:{corpus}", *recipe)
    run("train", folder / "dense", "--init", "scratch", "--like", like, "--tokens", 4000, *common)
    np.save(folder / "ids3.npy", windows(count=8, length=16, seed=2).numpy())
    source = ("--calibration", f"tokens:{folder / 'ids3.npy'}")
    run("prune", folder / "dense", folder / "pruned", "--method", "wanda", "--ratio", 0.5, *source)
    found = {}
    for name, extra in (("retrained", ()), ("distilled", ("--teacher", folder / "dense"))):
        answer = run("train", folder / name, "--init", folder / "pruned", "--tokens", 1500, *common, *extra)
        found[name] = {
            "curve": [point["loss"] for point in answer["curve"]],
            "sha256": sha256(folder / name / "model.safetensors"),
        }
    models = [folder / "retrained", folder / "distilled"]
    data = ("--data", f"shards:{corpus}", "--seqlen", 32)
    run("eval", *models, *data, "--out", folder / "results")
    compared = run("compare", *(folder / "results" / f"{model.name}.json" for model in models))["comparisons"]
    return {**found, "comparisons": [{k: v for k, v in c.items() if k != "paths"} for c in compared]}


def smoke(folder: Path) -> dict[str, Any]:
    """Run the smoke study and return each stage's fingerprint, its record's hash and loss, and the verdicts."""
    file = HERE.parents[1] / "studies" / "smoke.yaml"
    answer = run("study", "run", file, "--out", folder / "smoke", "--jobs", 2, "--device", "cpu")
    stages = {}
    for path in sorted((folder / "smoke" / "stages").glob("*/record.json")):
        record = json.loads(path.read_text())
        result = record["result"]
        curve = result.get("curve")
        loss = result.get("loss", curve[-1]["loss"] if curve else None)
        stages[path.parent.name] = {"record": sha256(path), "loss": loss}
    volatile = ("report", "ran", "already_done", "elsewhere", "failed", "skipped", "not_started")
    return {"stages": stages, "answer": {k: v for k, v in answer.items() if k not in volatile}}


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write one golden file into ``folder``."""
    text = json.dumps({"environment": environment(), **content}, indent=1, sort_keys=True)
    (folder / f"{name}.json").write_text(text + "\n")
    print(name, "written", flush=True)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if sys.argv[1:] else HERE
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write(out, "prune", {f"{f}/{m}": prune(root, f, m) for f in FAMILIES for m in METHODS})
        write(out, "train", train(root))
        write(out, "smoke", smoke(root))
