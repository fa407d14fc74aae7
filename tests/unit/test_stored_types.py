"""The type that a trained model is stored in: that of the weights it began with, or the one that is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from helpers import tiny_llama, token_corpus
from secateur.data.manifest import write_manifest
from secateur.data.shards import ShardWriter
from secateur.errors import RunError, UserError

RECIPE = {"sequence": 16, "tokens_per_step": 64, "peak_rate": 1e-3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpus(tmp_path_factory.mktemp("corpus"), tokens=2000, vocabulary=61)


def train(out: Path, corpus: Path, **fields: Any) -> dict[str, torch.Tensor]:
    fields = {"tokens": 128, "recipe": RECIPE, "points": 1, "heldout_windows": 4, **fields}
    return load_file(secateur.train(out, data=f"shards:{corpus}", **fields).path / "model.safetensors")


def stored(out: Path) -> str:
    return json.loads((out / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_checkpoint_stays(dtype: torch.dtype, computed: str, corpus: Path, tmp_path: Path) -> None:
    init, out = tiny_llama(tmp_path, dtype=dtype), tmp_path / "out"
    before, after = load_file(init / "model.safetensors"), train(out, corpus, init=init, dtype=computed)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert stored(out) == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in json.loads((out / "config.json").read_text())


def test_training_is_in_float32_whatever_is_stored(corpus: Path, tmp_path: Path) -> None:
    """Steps too small for float16 add up."""
    half = tiny_llama(tmp_path, dtype=torch.float16)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text((half / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    slow: dict[str, Any] = {"recipe": {**RECIPE, "peak_rate": 1e-5}, "tokens": 1600}
    trained = train(tmp_path / "a", corpus, init=half, **slow)
    expected = train(tmp_path / "b", corpus, init=whole, **slow)
    assert all(torch.equal(trained[name], tensor.half()) for name, tensor in expected.items())


def test_each_tensor_keeps_its_type(corpus: Path, tmp_path: Path) -> None:
    init, out = tiny_llama(tmp_path, dtype=torch.bfloat16), tmp_path / "out"
    tensors = load_file(init / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, init / "model.safetensors", {"format": "pt"})
    after = train(out, corpus, init=init)
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in mixed.items()}
    assert stored(out) == "bfloat16"


@pytest.mark.parametrize("chosen", ["float32", "bfloat16", "float16"])
def test_the_type_that_is_chosen(chosen: str, corpus: Path, tmp_path: Path) -> None:
    init = tiny_llama(tmp_path, dtype=torch.bfloat16)
    for number, start in enumerate(({"init": init}, {"init": "scratch", "like": init})):
        after = train(tmp_path / f"{number}", corpus, save_dtype=chosen, **start)
        assert {str(tensor.dtype) for tensor in after.values()} == {f"torch.{chosen}"}
        assert stored(tmp_path / f"{number}") == chosen


def test_fresh_weights_are_stored_as_they_are_computed(corpus: Path, tmp_path: Path) -> None:
    like = tiny_llama(tmp_path, dtype=torch.float16)
    for dtype in ("float32", "bfloat16"):
        after = train(tmp_path / dtype, corpus, init="scratch", like=like, dtype=dtype)
        assert {str(tensor.dtype) for tensor in after.values()} == {f"torch.{dtype}"}


def test_values_beyond_float16_are_refused_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    init, name = tiny_llama(tmp_path, dtype=torch.bfloat16), "model.embed_tokens.weight"
    tensors = load_file(init / "model.safetensors")
    tensors[name][3, 3] = 70_000
    save_file(tensors, init / "model.safetensors", {"format": "pt"})
    # fmt: off
    with pytest.raises((UserError, RunError), match=rf"{name} holds 70144, beyond the range of float16 .*`save_dtype`"):
        train(tmp_path / "out", corpus, init=init, save_dtype="float16")
    # fmt: on
    assert not (tmp_path / "out.partial").exists()
    train(tmp_path / "out", corpus, init=init)


def test_values_that_outgrow_float16_lose_no_step(tmp_path: Path) -> None:
    """The run is saved: another type for the output only writes it."""
    ids = np.random.default_rng(0).integers(2, 61, 400)
    folder = tmp_path / "corpus"
    folder.mkdir()
    writer = ShardWriter(folder, "train", "uint16", 5000)
    writer.append(ids)
    write_manifest(folder, 61, {"train": writer.close()})
    init, out = tiny_llama(tmp_path, dtype=torch.float16), tmp_path / "out"
    steep: dict[str, Any] = {"recipe": {**RECIPE, "peak_rate": 1e5, "warmup_from": "step"}, "tokens": 64, "init": init}
    with pytest.raises(RunError, match=r"beyond the range of float16.*the steps are saved: repeat the command"):
        train(out, folder, **steep)
    (saved,) = (tmp_path / "out.partial").glob("work/checkpoints/step-*")
    time = saved.stat().st_mtime_ns
    after = train(out, folder, **steep, save_dtype="bfloat16")
    assert time and max(float(tensor.abs().max()) for tensor in after.values()) > 65504
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "learning_rate" in line]) == 1
