"""Weights as they are served: rounding against a loop over groups, their bytes, and figures that never mix."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import secateur
from expert_models import tiny_mixture
from helpers import hf, naive_loss, tiny_llama, windows
from secateur.cli import main
from secateur.errors import UserError
from secateur.evaluation.request import EvaluateRequest
from secateur.model.checkpoint import Checkpoint
from secateur.model.quantisation import WEIGHT_FORMATS, serve

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao, of the extra quantisation")


def rounded(matrix: Tensor, bits: int, group: int | None) -> Tensor:
    """Each group to the nearest of its levels, one weight at a time; every step in bfloat16, as a server has it."""
    out = torch.empty_like(matrix)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], group or matrix.shape[1]):
            part = matrix[row, start : start + (group or matrix.shape[1])].bfloat16()
            scale = (part.abs().max() / ((high - low) / 2)).clamp(min=torch.finfo(torch.bfloat16).smallest_normal)
            for column, weight in enumerate(part):
                level = (weight * (1 / scale)).round().clamp(low, high)
                out[row, start + column] = level.bfloat16() * scale
    return out


def in_blocks(name: str, tensor: Tensor) -> bool:
    return "layers" in name and tensor.dim() == 2


@needs_torchao
@pytest.mark.parametrize(("weights", "bits", "group"), [("int8", 8, None), ("int4", 4, 32)])
def test_the_loss_is_that_of_weights_rounded_by_hand(
    weights: Any, bits: int, group: int | None, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    reference, ids = hf(folder), windows()
    for name, parameter in reference.named_parameters():
        if in_blocks(name, parameter):
            parameter.data = rounded(parameter.data, bits, group)
    np.save(tmp_path / "ids.npy", ids.numpy())
    data = f"tokens:{tmp_path / 'ids.npy'}"
    (served,) = secateur.evaluate(folder, data=data, weights=weights)
    (stored,) = secateur.evaluate(folder, data=data)
    figure, plain = served.measurements[0], stored.measurements[0]
    assert figure.value == pytest.approx(naive_loss(reference, ids), rel=1e-5)
    assert abs(figure.value - plain.value) > 1e-5
    assert figure.protocol["fingerprint"] != plain.protocol["fingerprint"]
    outer = sum(p.numel() for n, p in reference.named_parameters() if not in_blocks(n, p)) * 4
    matrices = [p for n, p in reference.named_parameters() if in_blocks(n, p)]
    size = sum(m.numel() * bits // 8 + 2 * m.shape[0] * (m.shape[1] // (group or m.shape[1])) for m in matrices)
    assert served.about["served"]["bytes"] == outer + size


@needs_torchao
def test_zeros_stay_and_what_no_group_divides_stays(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_llama(tmp_path, hidden_size=64, intermediate_size=40, num_hidden_layers=1)
    checkpoint, stored = Checkpoint(folder), hf(folder).state_dict()
    model: Any = checkpoint.load()
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data[:, ::2] = 0
    served = serve(checkpoint, model, "int4")
    assert (mlp.up_proj.weight[:, ::2] == 0).all() and (mlp.up_proj.weight[:, 1::2] != 0).any()
    (name,) = served.as_stored
    assert name == "model.layers.0.mlp.down_proj.weight" and torch.equal(mlp.down_proj.weight, stored[name])
    line = capsys.readouterr().err
    assert "1 of 7 matrices in the blocks stay as stored" in line and name in line
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


@needs_torchao
def test_matrices_of_experts_are_rounded_as_well(tmp_path: Path) -> None:
    folder = tiny_mixture(tmp_path, "mixtral", hidden_size=64, intermediate_size=32, num_hidden_layers=1)
    checkpoint, stored = Checkpoint(folder), hf(folder).state_dict()
    model = checkpoint.load()
    serve(checkpoint, model, "int8")
    name = next(name for name, tensor in model.state_dict().items() if tensor.dim() == 3)
    torch.testing.assert_close(model.state_dict()[name][1], rounded(stored[name][1], 8, None))


def test_bfloat16_is_every_weight_and_needs_no_package(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    model: Any = Checkpoint(folder).load()
    served = serve(Checkpoint(folder), model, "bf16")
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert served.bytes == 2 * sum(p.numel() for p in model.parameters()) and not served.as_stored


def test_a_missing_package_is_one_line_before_anything_is_computed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("secateur.model.quantisation.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"`weights` int4: needs torchao; .*secateur\[quantisation\]"):
        secateur.evaluate(tiny_llama(tmp_path), data="text:missing", weights="int4")
    with pytest.raises(UserError, match="`weights`"):
        EvaluateRequest(models=("a",), data="text:b", weights="int3")  # type: ignore[arg-type]


def test_figures_of_different_weights_share_no_comparison(tmp_path: Path, capsys: Any) -> None:
    folder, ids = tiny_llama(tmp_path), tmp_path / "ids.npy"
    np.save(ids, windows().numpy())
    call = ["eval", str(folder), "--data", f"tokens:{ids}", "--out", str(tmp_path / "out")]
    assert main([*call, "--weights", "bf16", "--suite", "cost"]) == 0
    table = capsys.readouterr().out
    assert "weights in bf16, bytes" in table and "not timed" in table and "decode" not in table
    assert main(call) == 0
    stored, served = (tmp_path / "out" / f"{folder.name}{end}.json" for end in ("", "-bf16"))
    assert json.loads(served.read_text())["measurements"][0]["protocol"]["weights"].startswith("bf16, bfloat16")
    assert main(["compare", str(stored), str(served)]) == 2
    assert "different protocols (weights None and bf16" in capsys.readouterr().err


def test_forms_have_the_bytes_of_their_bits() -> None:
    assert [form.bytes((64, 64)) for form in WEIGHT_FORMATS.values()] == [8192, 4096 + 128, 2048 + 256]
