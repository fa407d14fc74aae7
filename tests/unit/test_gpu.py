"""On a GPU: what is decided there is what is decided on the CPU. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_llama, windows
from secateur.cli import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = [
    *("shortgpt", "minitron-depth", "shortened-llama"),
    *("minitron-width", "wanda-sp", "flap", "llm-pruner"),
    *("magnitude", "wanda", "sparsegpt"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_decides_as_the_cpu_does(method: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_llama(tmp_path)
    np.save(tmp_path / "ids.npy", windows(6).numpy())
    plans = {}
    for device in ("cpu", "cuda"):
        line = ["prune", str(model), str(tmp_path / device), "--method", method, "--ratio", "0.5", "--device", device]
        line += ["--calibration", f"tokens:{tmp_path / 'ids.npy'}", "--dtype", dtype, "--json"]
        assert main(line) == 0
        used = json.loads(capsys.readouterr().out)["used"]
        assert (used["device"] is not None) == (device == "cuda")
        plans[device] = load_file(tmp_path / device / "plan.safetensors")
    same = torch.cat([(plans["cuda"][n] == m).flatten() for n, m in plans["cpu"].items() if n.startswith("mask.")] or
                     [torch.ones(1)]).float()  # fmt: skip
    assert same.mean() > (0.99 if dtype == "float32" else 0.9)
    for name, scores in plans["cpu"].items():
        if name.startswith("score."):
            torch.testing.assert_close(plans["cuda"][name], scores, rtol=1e-3 if dtype == "float32" else 0.2, atol=1e-3)
