"""On a GPU: what is decided there is what is decided on the CPU. Skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import files, tiny_llama, windows
from secateur.calibration import async_writer as behind
from secateur.calibration import journal
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


@pytest.fixture
def prune(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Prunes on the GPU; every file that was written."""
    model = tiny_llama(tmp_path)
    np.save(tmp_path / "ids.npy", windows(6).numpy())

    def run(name: str, method: str, *more: str) -> dict[str, bytes]:
        line = ["prune", str(model), str(tmp_path / name), "--method", method, "--ratio", "0.5", "--device", "cuda"]
        text = [] if method == "magnitude" else ["--calibration", f"tokens:{tmp_path / 'ids.npy'}", "--batch", "2"]
        assert main([*line, *text, *more]) == 0
        return files(tmp_path / name)

    return run


#: those without a backward pass, whose sums are in the same order each time
FORWARD = [method for method in METHODS if method not in ("shortened-llama", "llm-pruner")]


@pytest.mark.parametrize("method", FORWARD)
def test_states_on_the_device_are_those_in_memory_and_on_disk(
    method: str, prune: Callable[..., dict[str, bytes]], capsys: pytest.CaptureFixture
) -> None:
    found = {place: prune(place, method, "--states", place) for place in ("auto", "device", "ram", "disk")}
    assert found["auto"] == found["device"] == found["ram"] == found["disk"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("estimate: ")]
    if method != "magnitude":
        assert ["on the device; the time" in line for line in told] == [True, True, False, False]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", FORWARD)
def test_what_is_written_behind_are_the_same_bytes(
    method: str, dtype: str, prune: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    copied = behind._copied
    monkeypatch.setattr(behind, "_copied", lambda tensor: (sent.append(tensor.is_cuda), copied(tensor))[1])
    found = prune("behind", method, "--dtype", dtype)
    assert any(sent) == (method in ("magnitude", "wanda", "sparsegpt"))
    monkeypatch.setattr(journal, "is_worthwhile", lambda device: False)
    assert prune("at-once", method, "--dtype", dtype) == found


def test_a_copy_is_of_what_the_stream_had_left_and_waits_in_page_locked_memory() -> None:
    thread = behind.AsyncWriter("cuda")
    values = torch.zeros(2**24, device="cuda")
    torch.cuda._sleep(10**8)  # the kernels before it are slow
    values += 1
    sent = thread.copy_to_host({"values": values, "on the host": torch.ones(2)})
    del values
    other = torch.full((2**24,), 7.0, device="cuda")  # which must not get its memory
    arrived = thread.submit(sent).result()
    thread.close()
    assert bool((arrived["values"] == 1).all()) and arrived["values"].is_pinned() and bool((other == 7).all())
    assert not arrived["on the host"].is_cuda
