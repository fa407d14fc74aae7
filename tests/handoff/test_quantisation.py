"""Quantisation of pruned GGUF files by llama.cpp: which types a shape allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import secateur
from helpers import tiny_family, windows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of the tools themselves

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 32}
K_QUANTS = {"Q4_K", "Q6_K"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("gguf", "cyllama"):
        pytest.importorskip(module, reason=f"{module} is not installed (the extra handoff)")
    folder = tmp_path_factory.mktemp("dense")
    return tiny_family(folder, "llama", **SIZES, num_key_value_heads=4, num_hidden_layers=4, vocab_size=512)


def quantise(folder: Path, work: Path, name: str) -> dict[str, str]:
    """Types of the matrices of a checkpoint's GGUF file after quantisation by llama.cpp."""
    import gguf
    from cyllama.llama import llama_cpp
    from gguf_file import write_gguf

    parameters = llama_cpp.LlamaModelQuantizeParams()
    parameters.ftype = gguf.LlamaFileType[f"MOSTLY_{name}"].value
    llama_cpp.disable_logging()
    source, target = write_gguf(folder, work / "model.gguf"), work / "quantised.gguf"
    llama_cpp.model_quantize(str(source), str(target), parameters)
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors if len(t.shape) > 1}


@pytest.mark.parametrize(
    ("shape", "share"), [("hidden=256,ffn=768", 1.0), ("hidden=256,ffn=672", 26 / 30), ("hidden=224,ffn=768", 8 / 30)]
)
def test_k_quants_need_multiples_of_256(dense: Path, tmp_path: Path, shape: str, share: float) -> None:
    """Others fall back: of 30 matrices, those that read from a space of another size get a larger type."""
    ids: Tensor = windows(2, 12)
    out = secateur.prune(dense, tmp_path / "out", method="minitron-width", shape=shape, calibration=ids).path
    types = quantise(out, tmp_path, "Q4_K_M")
    assert sum(kind in K_QUANTS for kind in types.values()) / len(types) == pytest.approx(share)
    assert set(quantise(out, tmp_path, "Q8_0").values()) == {"Q8_0"}


def test_no_type_takes_what_is_no_multiple_of_32(dense: Path, tmp_path: Path) -> None:
    out = secateur.prune(dense, tmp_path / "out", method="minitron-width", shape="ffn=680", calibration=windows()).path
    with pytest.raises(RuntimeError, match="llama_model_quantize failed"):
        quantise(out, tmp_path, "Q8_0")
    assert "F16" in quantise(out, tmp_path, "Q4_K_M").values()
