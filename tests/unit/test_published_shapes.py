"""``secateur shapes`` and ``inspect`` on the families of published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import tiny_family
from published_configs import PUBLISHED
from secateur.cli import main


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_counted_as_transformers_counts_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From config.json alone: as published, and cut in width as far as a method and a ratio ask."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[name]))
    assert main(["shapes", str(path), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert whole["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert main(["shapes", str(path), "--method", "wanda-sp", "--ratio", "0.3", "--axes", "ffn", "--json"]) == 0
    cut = json.loads(capsys.readouterr().out)
    assert cut["removed"]["non_embedding"] == pytest.approx(0.3, abs=0.01)
    config.intermediate_size = cut["shape"]["ffn"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert cut["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_inspect_names_what_can_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("granite", "gemma4"):
        directory = tiny_family(tmp_path, name)
        assert main(["inspect", str(directory), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert main(["inspect", str(directory)]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("can be cut")]
        assert all(axis in line for axis in record["axes"])
        if name == "granite":
            assert record["axes"] == ["layers", "hidden", "ffn", "kv"] and not record["uncut"]
        else:
            assert "kv" not in record["axes"] and f"not kv: {record['uncut']['kv']}" in line
