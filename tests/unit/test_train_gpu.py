"""Training on a GPU, against the CPU; everything skips itself without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_llama, token_corpus
from secateur.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 12 * 256 + 23


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "corpus").mkdir()
    return tiny_llama(folder), token_corpus(folder / "corpus", tokens=TOKENS + 500, vocabulary=61)


def command(world: tuple[Path, Path], out: Path, *options: str) -> list[str]:
    model, corpus = world
    recipe = ["--set", "sequence=16", "--set", "tokens_per_step=256", "--set", "peak_rate=3e-3"]
    data = ["--data", f"shards:{corpus}", "--tokens", str(TOKENS), "--points", "2", "--heldout-windows", "7"]
    return ["train", str(out), "--init", str(model), *data, *recipe, *options]


def losses(out: Path) -> list[float]:
    return [e["loss"] for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in e]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["--dtype", "float32"], 1e-4),
        (["--dtype", "bfloat16"], 1e-2),
        (["--dtype", "bfloat16", "--recompute", "--set", "attention=document"], 1e-2),
        (["--dtype", "bfloat16", "--compile"], 1e-2),
    ],
)
def test_a_gpu_trains_as_a_cpu_does(
    options: list[str], tolerance: float, world: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = [o for o in options if o.startswith("attention")]
    assert main(command(world, tmp_path / "cpu", "--device", "cpu", *(["--set", *plain] if plain else []))) == 0
    assert main(command(world, tmp_path / "gpu", "--device", "cuda", *options)) == 0
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


def test_a_run_on_a_gpu_goes_on(world: tuple[Path, Path], tmp_path: Path) -> None:
    """Checkpoints are written behind the run there; one of them is all that is left of it."""
    options = ["--device", "cuda", "--save-every", "4", "--keep", "9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(world, whole, *options)) == 0
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("secateur.cli.verbs.training._write", killed)
        assert main(command(world, cut, *options)) == 130
    steps = sorted((tmp_path / "cut.partial" / "work" / "checkpoints").glob("step-*"))
    assert [step.name for step in steps] == ["step-00000004", "step-00000008", "step-00000012", "step-00000013"]
    for later in steps[1:]:
        shutil.rmtree(later)
    assert main(command(world, cut, *options)) == 0
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-2)
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(load_file(cut / "model.safetensors")[name], tensor, rtol=0, atol=2e-2, msg=name)
