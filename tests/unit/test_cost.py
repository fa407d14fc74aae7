from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import hf, tiny_llama, windows
from secateur.cli import main
from secateur.evaluation.cost import NEEDS, measure_cost, pattern_of
from secateur.evaluation.workload import Workload
from secateur.model.checkpoint import Checkpoint

WORK = Workload(prompt=20, new=6, batches=(1, 3), repeats=3, warm_up=1)


def figures(answer: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, Any]]:
    return {(f["name"], f.get("batch")): f for f in answer["figures"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_shape(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path, tie_word_embeddings=tied))
    by_name = figures(measure_cost(checkpoint, checkpoint.load(dtype), WORK))
    total = checkpoint.shape.total
    assert by_name["parameters", None]["value"] == total
    buffers = sum(b.nbytes for b in checkpoint.load(dtype).buffers())
    in_memory = by_name["weights in memory", None]
    assert in_memory["unit"] == "bytes"
    assert dtype.itemsize * total <= in_memory["value"] <= dtype.itemsize * total + buffers
    assert by_name["checkpoint on disk", None]["value"] == (checkpoint.directory / "model.safetensors").stat().st_size
    # that of the shape is at 16 bits
    assert by_name["KV cache", None]["value"] == checkpoint.shape.kv_cache_bytes * dtype.itemsize / 2


def test_speeds_have_units_and_spread(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    answer = measure_cost(checkpoint, checkpoint.load(), WORK)
    by_name = figures(answer)
    for batch in (1, 3):
        for name, unit in (("prefill", "tokens/s"), ("decode", "tokens/s"), ("time to first token", "ms")):
            figure = by_name[name, batch]
            assert figure["unit"] == unit and figure["execution"] == "dense" and figure["repeats"] == 3
            assert 0 < figure["low"] <= figure["value"] <= figure["high"]
        first = by_name["time to first token", batch]["value"] / 1e3
        assert by_name["prefill", batch]["value"] == pytest.approx(20 * batch / first, rel=0.5)  # medians of both
    assert answer["workload"]["batches"] == [1, 3] and answer["device"] == "cpu" and answer["dtype"] == "float32"
    assert answer["sparsity"] == {"pattern": None, "note": "no masks: the model is dense"}
    assert all(figure["unit"] for figure in answer["figures"])


def test_what_is_written_is_what_generate_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = hf(tiny_llama(tmp_path)), windows(2, 20)
    inputs = []
    forward = type(model).forward

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.append(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr("secateur.evaluation.cost._prompt", lambda *_: ids)
    monkeypatch.setattr(type(model), "forward", recording)
    measure_cost(Checkpoint(tmp_path / "llama-0"), model, Workload(20, 6, (2,), 1, 0))
    written = torch.cat(inputs[1:], dim=1)
    monkeypatch.undo()
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, expected[:, 20:])


def test_the_workload_fits_the_positions() -> None:
    assert Workload().within(None) == Workload().within(4096) == Workload()
    cut = Workload().within(64)
    assert (cut.prompt, cut.new) == (48, 16) and Workload().within(8).prompt + Workload().within(8).new == 8


def test_patterns() -> None:
    half = torch.tensor([[True, False, True, False]] * 3)
    assert pattern_of({}) is None
    assert pattern_of({"a": half}) == "2:4"
    assert pattern_of({"a": half, "b": ~half, "c": torch.zeros(2, 8, dtype=torch.bool)}) == "2:4"
    assert pattern_of({"a": half, "b": torch.tensor([[True, True, True, False]])}) == "unstructured"
    assert pattern_of({"a": torch.tensor([[True, False, False]])}) == "unstructured"


@pytest.mark.parametrize(("amount", "pattern"), [(["--pattern", "2:4"], "2:4"), (["--ratio", "0.5"], "unstructured")])
def test_sparsity_is_told_honestly(amount: list[str], pattern: str, tmp_path: Path) -> None:
    assert main(["prune", str(tiny_llama(tmp_path)), str(tmp_path / "out"), "--method", "magnitude", *amount]) == 0
    checkpoint = Checkpoint(tmp_path / "out")
    answer = measure_cost(checkpoint, checkpoint.load(), Workload(4, 2, (1,), 1, 0))["sparsity"]
    assert answer["pattern"] == pattern and answer["zeros"] == pytest.approx(0.5, abs=0.01)
    assert answer["note"] == NEEDS if pattern == "2:4" else "neither speed nor memory gain anything" in answer["note"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_semi_structured_kernels(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    directory = tiny_llama(tmp_path, **sizes, num_key_value_heads=4, num_hidden_layers=2)
    assert main(["prune", str(directory), str(tmp_path / "out"), "--method", "magnitude", "--pattern", "2:4"]) == 0
    checkpoint = Checkpoint(tmp_path / "out")
    model: Any = checkpoint.load(torch.bfloat16).cuda()
    ids = windows(8, 16).cuda()
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        answer = measure_cost(checkpoint, model, Workload(16, 4, (8,), 2, 1))
        if torch.cuda.get_device_capability() < (8, 0):
            assert answer["sparsity"]["note"] == NEEDS
            return
        assert answer["sparsity"]["note"] == "with torch.sparse semi-structured kernels"
        assert {f["execution"] for f in answer["figures"]} == {"dense", "2:4 kernels"}
        torch.testing.assert_close(model(input_ids=ids).logits, dense, rtol=0.05, atol=0.05 * float(dense.abs().max()))
