"""Adapters over frozen weights in four bits: the training is that over weights rounded by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import hf, naive_loss, tiny_llama, token_corpus, windows
from processes import together
from secateur.cli import main
from secateur.model.plan import load_masks

pytest.importorskip("bitsandbytes")

LORA = "rank=4,alpha=8,base=4bit"
#: the values of NF4 between the scales -1 and 1 (arXiv:2305.14314, appendix E)
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


def rounded(weight: Tensor) -> Tensor:
    """Each block of 64 weights at the nearest value of NF4 times the block's largest weight."""
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    return (NF4[((blocks / scales)[..., None] - NF4).abs().argmin(-1)] * scales).view(weight.shape)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpus(tmp_path_factory.mktemp("corpus"), tokens=2000, vocabulary=61)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model, a sparse one, and both with the weights of the FFN's readers and of attention rounded."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "dense").mkdir()
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    dense = tiny_llama(folder / "dense", head_dim=16, num_attention_heads=4, **sizes)
    assert main(["prune", str(dense), str(folder / "sparse"), "--method", "magnitude", "--ratio", "0.5"]) == 0
    models = {"dense": dense, "sparse": folder / "sparse"}
    for kind, path in list(models.items()):
        models[f"{kind} rounded"] = Path(f"{path}-rounded")
        model = hf(path)
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2 and parameter.shape[1] == 64:  # down_proj has 80
                parameter.data = rounded(parameter.data)
        model.save_pretrained(models[f"{kind} rounded"])
        for part in ("plan.json", "plan.safetensors"):
            if (path / part).exists():
                (models[f"{kind} rounded"] / part).write_bytes((path / part).read_bytes())
    return models


def command(out: Path, init: Path, corpus: Path, *options: str, lora: str = LORA) -> list[str]:
    recipe = ["--set", "sequence=16", "--set", "tokens_per_step=64", "--set", "peak_rate=2e-2", "--points", "2"]
    files = [str(out), "--init", str(init), "--data", f"shards:{corpus}", "--tokens", "384"]
    return ["train", *files, *recipe, "--lora", lora, "--merge", *options]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_training_is_that_over_rounded_weights(
    kind: str, models: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "packed", models[kind], corpus)) == 0
    notices = capsys.readouterr().err
    assert "frozen weights of 12 linears are rounded to 4 bits" in notices and "the other 2 stay as they are" in notices
    assert main(command(tmp_path / "plain", models[f"{kind} rounded"], corpus, lora="rank=4,alpha=8")) == 0
    packed, plain = losses(tmp_path / "packed"), losses(tmp_path / "plain")
    assert len(packed) == 6 and packed == pytest.approx(plain, rel=1e-5)
    merged = hf(tmp_path / "packed")
    for (name, weight), (_, expected) in zip(
        merged.named_parameters(), hf(tmp_path / "plain").named_parameters(), strict=True
    ):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5, msg=name)
    curve = json.loads((tmp_path / "packed" / "train.json").read_text())["result"]["curve"]
    assert curve[0]["loss"] != pytest.approx(naive_loss(hf(models[kind]), windows()), abs=1e-6)
    if kind == "sparse":
        for name, mask in load_masks(models["sparse"]).items():
            assert not merged.get_parameter(name)[~mask].any(), name


@pytest.mark.slow
def test_processes_share_the_packed_weights(models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    lines = {kind: command(tmp_path / f"{kind}-2", models[kind], corpus) for kind in ("dense", "sparse")}
    lines["half"] = command(tmp_path / "half-2", models["sparse"], corpus, "--dtype", "bfloat16")
    together(2, list(lines.values()), tmp_path)
    for kind in ("dense", "sparse"):
        assert main(command(tmp_path / f"{kind}-1", models[kind], corpus)) == 0
        assert losses(tmp_path / f"{kind}-2") == pytest.approx(losses(tmp_path / f"{kind}-1"), rel=1e-5)
        tensors = load_file(tmp_path / f"{kind}-1" / "model.safetensors")
        for name, value in load_file(tmp_path / f"{kind}-2" / "model.safetensors").items():
            torch.testing.assert_close(value, tensors[name], rtol=0, atol=1e-4, msg=name)
    assert losses(tmp_path / "half-2") == pytest.approx(losses(tmp_path / "sparse-1"), rel=5e-3)


def test_bad_input(
    models: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error(lora: str) -> str:
        assert main(command(tmp_path / "out", models["dense"], corpus, lora=lora)) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "--lora: base: '3bit' is not known; did you mean '4bit'?" in error("base=3bit")
    assert "no adapted linear has a multiple of 64 inputs" in error("rank=2,targets=down_proj,base=4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "base=4bit needs bitsandbytes; pip install 'secateur[qlora]'" in error(LORA)
