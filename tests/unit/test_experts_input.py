"""What is refused of mixtures, and experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expert_models import tiny_mixture
from helpers import calibration, edit_config, hf, logits, tiny_llama, windows
from reference import opened
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.job import prune_directory
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.preview import ShapesRequest, preview_shapes
from secateur.pruning.request import PruneRequest
from secateur.pruning.target import Target


def refusal(directory: Path, method: str, out: Path, **fields: Any) -> str:
    """The one line that a prune request ends with, before anything is written."""
    with pytest.raises(UserError) as error:
        request = PruneRequest(model=str(directory), method=method, out=out, calibration=windows(), **fields)
        prune_directory(request)
    assert not out.exists() and not list(out.parent.glob(f"{out.name}*"))
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "method", "fields", "message"),
    [
        ("olmoe", "reap", {"shape": "experts=1"}, "experts=1: the router needs at least 2 (2 experts for a token)"),
        ("glm4_moe", "reap", {"shape": "experts=5"}, "needs at least 4 and a multiple of its 2 groups"),
        ("glm4_moe", "reap", {"shape": "experts=2"}, "needs at least 4 and a multiple of its 2 groups"),
        ("olmoe", "reap", {"ratio": 0.9}, "of 8 routed experts it would keep 1"),
        ("olmoe", "reap", {"shape": "experts=9"}, "experts=9 is not between 1 and the model's 8"),
        ("olmoe", "reap", {"ratio": 0.5, "of": "total"}, "a ratio for reap always counts routed experts"),
        ("olmoe", "shortened-llama", {"ratio": 0.5}, "shortened-llama: scores layers by gradients of all weights"),
        ("olmoe", "sheared", {"shape": "layers=2"}, "sheared: has no gates for routed experts"),
        ("olmoe", "flap", {"shape": "ffn=32"}, "every layer has experts"),
        ("deepseek_v3", "wanda-sp", {"shape": "kv_heads=3,heads=3"}, "its heads share one latent state"),
    ],
)
def test_bad_input(name: str, method: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = tiny_mixture(tmp_path, name)
    assert message in refusal(directory, method, tmp_path / "out", **fields)


def test_experts_of_a_dense_model(tmp_path: Path) -> None:
    message = refusal(tiny_llama(tmp_path), "reap", tmp_path / "out", ratio=0.5)
    assert message.startswith("`method`: reap cuts experts") and "it has no routed experts" in message
    directory = tiny_mixture(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    assert "no layer of this model has any" in refusal(directory, "reap", tmp_path / "out", ratio=0.5)


def test_a_dense_ffn_that_no_layer_has(tmp_path: Path) -> None:
    directory = tiny_mixture(tmp_path, "qwen3_moe", mlp_only_layers=[])
    text = refusal(directory, "minitron-width", tmp_path / "out", shape="hidden=36,ffn=32")
    assert "cuts ffn, but no layer of this model has any" in text


def test_experts_that_are_quantised_otherwise(tmp_path: Path) -> None:
    directory = tiny_mixture(tmp_path, "olmoe")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj"
    tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").to(torch.int32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    text = refusal(directory, "reap", tmp_path / "out", ratio=0.5)
    assert f"holds {name}.qweight: its weights are quantized" in text


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A gpt_oss whose experts are stored in MXFP4, and those experts as transformers dequantises them."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 8}
    directory = tiny_mixture(tmp_path, "gpt_oss", dtype="bfloat16", **sizes)
    generator = torch.Generator().manual_seed(3)
    tensors, experts = load_file(directory / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, (count, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        experts[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return directory, experts


def test_mxfp4_is_read_as_transformers_dequantises_it(
    packed: tuple[Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, experts = packed
    checkpoint = Checkpoint(directory)
    for name, tensor in experts.items():
        assert checkpoint.dtype_of(name) == torch.bfloat16
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert torch.equal(checkpoint.rows(name, 2, 4), tensor[2:4])
    notices = [line for line in capsys.readouterr().err.splitlines() if "MXFP4" in line or "quantization" in line]
    assert len(notices) == 1 and "stored in MXFP4; they are read, and written, as bfloat16" in notices[0]


def test_mxfp4_is_written_as_bfloat16(packed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    directory, experts = packed
    checkpoint = Checkpoint(directory)
    plan = make_plan(checkpoint, "reap", Target(ratio=0.5), calibration(windows()))
    (out := tmp_path / "out").mkdir()
    write_pruned(checkpoint, plan, out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stored = load_file(out / "model.safetensors")
    for name, tensor in experts.items():
        assert torch.equal(stored[name], tensor[plan.keep_experts[int(name.split(".")[2])]])
    tensors = load_file(directory / "model.safetensors")
    plain = {n: t for n, t in tensors.items() if not n.endswith(("_blocks", "_scales"))} | experts
    save_file({n: t.contiguous() for n, t in plain.items()}, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, drop=("quantization_config",))
    again = make_plan(Checkpoint(directory), "reap", Target(ratio=0.5), calibration(windows()))
    assert all(torch.equal(again.keep_experts[layer], keep) for layer, keep in plan.keep_experts.items())
    assert logits(opened(out).float(), windows()).isfinite().all()
    assert logits(hf(directory), windows()).isfinite().all()


def test_mxfp4_without_matching_scales(packed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, _ = packed
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="do not match"):
        Checkpoint(directory)


def test_shapes_of_a_model_with_latent_heads(tmp_path: Path) -> None:
    half = preview_shapes(ShapesRequest(model=tiny_mixture(tmp_path, "deepseek_v3"), ratio=0.5, method="reap")).record()
    assert (half["shape"]["experts"], half["before"]["shape"]["experts"]) == (4, 8)


def test_shapes_of_a_published_mixture(tmp_path: Path) -> None:
    """Qwen3-30B-A3B has 30.5 billion parameters, 3.3 of them active."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    (path := tmp_path / "config.json").write_text(json.dumps(config))
    half = preview_shapes(ShapesRequest(model=path, ratio=0.5, method="reap")).record()
    assert half["before"]["parameters"]["total"] == 30_532_122_624
    assert half["before"]["parameters"]["active"] == 3_353_032_704
    assert (half["shape"]["experts"], half["of"], half["drift"]) == (64, "experts", 0)
    removed = 48 * 64 * (3 * 2048 * 768 + 2048)  # each with its row of the router
    assert half["parameters"]["total"] == 30_532_122_624 - removed
    ways = preview_shapes(ShapesRequest(model=path, ratio=0.5)).record()["targets"]
    assert ways["experts"]["shape"]["experts"] == 64
    assert ways["width"]["shape"]["ffn"] == 6144  # no layer has a dense FFN
    named = preview_shapes(ShapesRequest(model=path, shape="experts=96")).record()
    assert named["shape"]["experts"] == 96
