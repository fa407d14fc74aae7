"""Training in several processes, on the CPU: against one process, killed and gone on with by another number of them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import files, tiny_family, tiny_llama, token_corpus
from processes import Processes, run_all, together
from secateur.cli import main

RECIPE = ["--set", "sequence=16", "--set", "tokens_per_step=256", "--set", "peak_rate=3e-3", "--micro-batch", "5"]
STEPS = 7
TOKENS = (STEPS - 1) * 256 + 16 * 3 + 7  # whole steps, then three windows and seven tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpus(tmp_path_factory.mktemp("corpus"), tokens=TOKENS + 1000, vocabulary=61)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, options in MODELS.items():
        (folder / name).mkdir()
        found[name] = tiny_llama(folder / name, **options)
    found["sparse"] = folder / "sparse"
    prune = ["prune", str(found["plain"]), str(found["sparse"]), "--method", "magnitude", "--pattern", "2:4"]
    assert main(prune) == 0
    (folder / "teacher").mkdir()
    found["teacher"] = tiny_family(folder / "teacher", "gemma3", seed=1)  # with a tied head
    return found


MODELS: dict[str, dict[str, Any]] = {"plain": {}, "tied": {"tie_word_embeddings": True}}


def job(out: Path, corpus: Path, *options: str) -> list[str]:
    data = ["--data", f"shards:{corpus}", "--tokens", str(TOKENS), "--points", "3", "--heldout-windows", "7"]
    return ["train", str(out), *data, *RECIPE, *options]


def losses(out: Path) -> list[float]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, STEPS + 1))
    return [e["loss"] for e in entries if "loss" in e]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


CASES: dict[str, tuple[str, list[str]]] = {
    "plain": ("plain", []),
    "tied": ("tied", []),
    "sparse": ("sparse", []),
    "bfloat16": ("plain", ["--dtype", "bfloat16", "--recompute"]),
    "documents": ("plain", ["--set", "attention=document", "--recompute"]),
    "distilled": ("tied", ["--teacher", "teacher", "--recompute"]),
    "mixed": ("sparse", ["--teacher", "plain", "--alpha", "0.5", "--temperature", "2", "--top-k", "9"]),
    "taught in bfloat16": ("plain", ["--teacher", "teacher", "--alpha", "0.5", "--dtype", "bfloat16"]),
}


def arguments(name: str, models: dict[str, Path]) -> list[str]:
    model, options = CASES[name]
    taught = [str(models[o]) if before == "--teacher" else o for before, o in pairwise(["", *options])]
    return ["--init", str(models[model]), *taught]


@pytest.mark.slow
def test_processes_share_the_work(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """One, two and three processes: the same losses, the same model, the same tokens."""
    jobs = {name: arguments(name, models) for name in CASES}
    jobs["scratch"] = ["--init", "scratch", "--like", str(models["sparse"])]
    several = {2: [*jobs, "whole teachers"], 3: ["tied", "distilled"], 4: ["replicas", "pairs"]}
    jobs["replicas"] = [*arguments("sparse", models), "--replicas", "2"]
    jobs["pairs"] = jobs["whole teachers"] = [*arguments("mixed", models), "--replicas", "2"]
    for processes, names in several.items():
        together(processes, [job(tmp_path / f"{n}-{processes}", corpus, *jobs[n]) for n in names], tmp_path)
    for name, options in jobs.items():
        alone = options[: options.index("--replicas")] if "--replicas" in options else options
        assert main(job(tmp_path / f"{name}-1", corpus, *alone)) == 0
        for processes in [p for p, names in several.items() if name in names]:
            check_alike(tmp_path / f"{name}-1", tmp_path / f"{name}-{processes}", exact="bfloat16" not in name)


def check_alike(one: Path, several: Path, *, exact: bool) -> None:
    """bfloat16 has eight bits, so that sums in another order differ by 0.4%."""
    tolerance = 1e-5 if exact else 4e-3
    assert losses(several) == pytest.approx(losses(one), rel=tolerance), several.name
    records = [json.loads((out / "train.json").read_text()) for out in (one, several)]
    assert records[0]["asked"] == records[1]["asked"]
    assert [r["result"]["tokens"] for r in records] == [TOKENS] * 2
    found = [point["loss"] for point in records[1]["result"]["curve"]]
    assert found == pytest.approx([p["loss"] for p in records[0]["result"]["curve"]], rel=tolerance)
    for tensor, value in weights(one).items():
        named = f"{several.name}: {tensor}"
        torch.testing.assert_close(weights(several)[tensor], value, rtol=0, atol=1e-4 if exact else 2e-2, msg=named)


@pytest.mark.slow
def test_gates_are_learned_together(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """One and two processes come to the same gates, also in bfloat16 and with domains, one of which a step may lack."""
    domains = token_corpus(tmp_path / "domains", tokens=3000, vocabulary=61, domains=5)
    options = ["--method", "sheared", "--shape", "layers=4,hidden=24,ffn=32,heads=2", "--seqlen", "16", "--batch", "8"]
    options += [f"--option={option}" for option in ("steps=40", "windows=3", "phi=1000", "multiplier_rate=300")]
    cases = {"bfloat16": [f"shards:{corpus}", "--dtype", "bfloat16"], "domains": [f"shards:{domains}"]}
    jobs = {
        (name, processes): [
            "prune",
            str(models["plain"]),
            str(tmp_path / f"{name}-{processes}"),
            *options,
            "--calibration",
            *data,
        ]
        for name, data in cases.items()
        for processes in (1, 2)
    }
    together(2, [line for (_, processes), line in jobs.items() if processes == 2], tmp_path)
    for name in cases:
        assert main(jobs[name, 1]) == 0
        one, two = (load_file(tmp_path / f"{name}-{n}" / "plan.safetensors") for n in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            if key.startswith("score."):
                assert torch.isfinite(two[key]).all()
                error = (one[key] - two[key]).abs().mean()
                assert error < (0.02 if name != "bfloat16" else 0.5), (name, key, error)
        plans = [json.loads((tmp_path / f"{name}-{n}" / "plan.json").read_text()) for n in (1, 2)]
        assert plans[0]["after"] == plans[1]["after"] and plans[0]["calibration"] == plans[1]["calibration"]
    assert len(plans[1]["summary"]["domains"]["shares"]) == 5
    lines = [json.loads(line) for line in (tmp_path / "domains-2" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "domains" in line]
    assert [line["step"] for line in told][::8] == [0, 20, 40]
    assert all(math.isfinite(loss) for line in told for loss in line["domains"]["losses"].values())
    assert sum(plans[1]["summary"]["domains"]["shares"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_masks_hold_in_every_process(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Of four weights in a row two stay zero, pruned or redrawn; without the mask they would not."""
    jobs = [job(tmp_path / "kept", corpus, "--init", str(models["sparse"]))]
    jobs += [job(tmp_path / "redrawn", corpus, "--init", "scratch", "--like", str(models["sparse"]))]
    together(2, jobs, tmp_path)
    pruned = {n: t == 0 for n, t in weights(models["sparse"]).items() if n.endswith("_proj.weight")}
    assert pruned
    for name in ("kept", "redrawn"):
        after = weights(tmp_path / name)
        for tensor, zero in pruned.items():
            assert torch.equal(after[tensor] == 0, zero), f"{name}: {tensor}"
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in files(models["sparse"]):
        if not file.startswith("plan"):
            (dense / file).write_bytes(files(models["sparse"])[file])
    assert main(job(tmp_path / "lost", corpus, "--init", str(dense))) == 0
    lost = weights(tmp_path / "lost")
    assert sum(int((lost[t][zero] != 0).sum()) for t, zero in pruned.items()) > 0.9 * sum(
        int(z.sum()) for z in pruned.values()
    )


def wait_for_checkpoint(partial: Path, alive: Callable[[], bool]) -> None:
    """Wait until a run has written another checkpoint."""

    def names() -> set[str]:
        return {path.parent.name for path in (partial / "work" / "checkpoints").glob("step-*/state.json")}

    before, end = names(), time.monotonic() + 200
    while names() <= before and alive() and time.monotonic() < end:
        time.sleep(0.005)
    assert alive(), "the run ended by itself"


def kill_torchrun(command: list[str], folder: Path, partial: Path) -> None:
    """Begin a run in two processes by torchrun itself, and kill all three once it has a checkpoint."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateur"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with subprocess.Popen([sys.executable, "-m", *launcher, *command], env=environment) as process:
        wait_for_checkpoint(partial, lambda: process.poll() is None)
        process.kill()
        for path in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's workers are in sessions of their own
            with contextlib.suppress(OSError):
                if str(partial.with_suffix("")).encode() in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_changes_hands(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Two processes begin and are killed, one goes on and is killed, two end it: the losses of an uninterrupted run."""
    sparse = ["--init", str(models["sparse"]), "--save-every", "2"]
    assert main(job(tmp_path / "whole", corpus, *sparse)) == 0
    out, partial = tmp_path / "cut", tmp_path / "cut.partial"
    command = job(out, corpus, *sparse)
    kill_torchrun(command, tmp_path, partial)
    alone = Processes(tmp_path, run_all, [command])
    wait_for_checkpoint(partial, lambda: alone.alive)
    alone.send(signal.SIGKILL)
    assert alone.join() == [-signal.SIGKILL] and not out.exists()
    together(2, [command], tmp_path)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for tensor, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(out)[tensor], value, rtol=0, atol=1e-4, msg=tensor)
    assert not partial.exists()


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_at_the_same_bits(
    corpus: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    plain = ["--init", str(models["plain"]), "--save-every", "4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(job(whole, corpus, *plain)) == 0
    process = Processes(tmp_path, run_all, [job(cut, corpus, *plain)])
    wait_for_checkpoint(tmp_path / "cut.partial", lambda: process.alive)
    process.send(signal.SIGTERM)
    assert process.join() == [75]
    assert "run the same command to resume" in process.errors and "Traceback" not in process.errors
    assert Processes(tmp_path, run_all, [job(cut, corpus, *plain)]).join() == [0]
    assert losses(cut) == losses(whole)
    for name, content in files(whole).items():
        if name not in ("metrics.jsonl", "README.md"):  # times of steps; the directory's name
            assert (cut / name).read_bytes() == content, name
