"""What a practitioner does with a downloaded checkpoint, from inspect to compare, as one command after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import naive_loss
from public_checkpoints import CHECKPOINTS, documents
from secateur.cli import main

SEQUENCE = 32
BUDGET = 20_480  #: 80 steps of 256 tokens
Call = Callable[..., Any]


@dataclass(frozen=True)
class Journey:
    """A checkpoint, how it is pruned, and what must be true of all outputs."""

    prune: str
    dtype: torch.dtype
    tied: bool
    carried: tuple[str, ...]
    config: dict[str, Any]  #: keys of config.json that pruning leaves alone


JOURNEYS = {
    "gemma3": Journey(
        "--method shortgpt --ratio 0.5 --of total",
        torch.bfloat16,
        True,
        (
            *("LICENSE", "chat_template.jinja", "generation_config.json", "processor_config.json"),
            *("preprocessor_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json"),
        ),
        {"sliding_window": 16, "query_pre_attn_scalar": 16, "rope_local_base_freq": 10000.0, "eos_token_id": 1},
    ),
    "qwen3": Journey(
        "--method minitron-width --ratio 0.4",
        torch.bfloat16,
        True,
        ("LICENSE", ".gitattributes", "vocab.json", "merges.txt", "generation_config.json", "tokenizer_config.json"),
        {"head_dim": 16, "rope_theta": 1000000, "vocab_size": 384},
    ),
    "llama2": Journey(
        "--method wanda --pattern 2:4",
        torch.float16,
        False,
        ("LICENSE.txt", "USE_POLICY.md", "added_tokens.json", "special_tokens_map.json", "generation_config.json"),
        {"rope_theta": 50000.0, "pretraining_tp": 1, "num_key_value_heads": 6},
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rows = documents(420, seed=1)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "calibration.txt").write_text("\n\n".join(documents(30, seed=2)))
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that succeeds; return its JSON answer, or what it prints."""

    def run(line: str, *, text: bool = False) -> Any:
        code = main([*line.split(), *([] if text else ["--json"])])
        captured = capsys.readouterr()
        assert code == 0 and "Traceback" not in captured.err, captured.err
        return captured.out if text else json.loads(captured.out)

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("model*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", JOURNEYS)
def test_from_inspect_to_compare(name: str, texts: Path, tmp_path: Path, call: Call) -> None:
    journey, source = JOURNEYS[name], CHECKPOINTS[name](tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    pruned, trained, corpus = tmp_path / "pruned", tmp_path / "trained", tmp_path / "corpus"

    description = call(f"inspect {source}")
    assert description["not_finite"] == [] and description["sparsity"] < 0.01
    stored = json.loads(before["config.json"])
    assert description["shape"]["layers"] == stored["num_hidden_layers"]
    assert str(stored["hidden_size"]) in call(f"shapes {source} --ratio 0.5", text=True)

    call(f"data text:{texts}/corpus.jsonl {corpus} --tokenizer {source} --workers 1")
    calibration = f"--calibration text:{texts}/calibration.txt --seqlen {SEQUENCE} --windows 8"
    call(f"prune {source} {pruned} {journey.prune} {calibration}")
    recipe = f"--set sequence={SEQUENCE} --set tokens_per_step=256 --set peak_rate=3e-3"
    answer = call(f"train {trained} --init {pruned} --tokens {BUDGET} --data shards:{corpus} {recipe} --points 2")
    results = tmp_path / "results"
    measured = call(f"eval {source} {pruned} {trained} --data shards:{corpus} --seqlen {SEQUENCE} --out {results}")
    losses = {Path(row["model"]).name: row["measurements"][0]["value"] for row in measured["results"]}
    assert list(losses) == ["source", "pruned", "trained"]
    assert losses["trained"] < losses["pruned"] - 1  # the texts are easy to learn
    assert answer["heldout_loss"]["before"] == pytest.approx(losses["pruned"], abs=1e-4)
    assert answer["heldout_loss"]["after"] == pytest.approx(losses["trained"], abs=5e-3)  # before it is rounded

    text = call(f"compare {results}/trained.json {results}/source.json", text=True)
    assert "trained" in text and "source" in text and str(tmp_path) not in text

    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for output in (pruned, trained):
        check_output(output, source, journey)
    check_masks(weights(pruned), weights(trained), sparse=name == "llama2")


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_loss_is_that_of_transformers(name: str, texts: Path, tmp_path: Path, call: Call) -> None:
    source = CHECKPOINTS[name](tmp_path / "source")
    journey = JOURNEYS[name]
    ids = AutoTokenizer.from_pretrained(source)("\n".join(documents(12, seed=3)))["input_ids"][: 6 * SEQUENCE]
    windows = torch.tensor(ids).reshape(6, SEQUENCE)
    np.save(tmp_path / "ids.npy", windows.numpy())
    calibration = f"--calibration tokens:{tmp_path}/ids.npy"
    call(f"prune {source} {tmp_path}/pruned {journey.prune} {calibration}")
    for directory in (source, tmp_path / "pruned"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
        (row,) = call(f"eval {directory} --data tokens:{tmp_path}/ids.npy")["results"]
        assert row["measurements"][0]["value"] == pytest.approx(naive_loss(model, windows), abs=1e-4)


def check_output(output: Path, source: Path, journey: Journey) -> None:
    """What transformers needs and a user expects of a checkpoint."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(output, local_files_only=True, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert model.dtype == journey.dtype
    assert {tensor.dtype for tensor in weights(output).values()} == {journey.dtype}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == journey.tied
    assert ("lm_head.weight" in weights(output)) != journey.tied
    for name in journey.carried:
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(output.glob("*.bin"))
    config = json.loads((output / "config.json").read_text())
    assert {key: config.get(key) for key in journey.config} == journey.config
    if "layer_types" in config:
        assert len(config["layer_types"]) == config["num_hidden_layers"]
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    assert tokenizer("A pear.")["input_ids"] == AutoTokenizer.from_pretrained(source)("A pear.")["input_ids"]
    licence = next(line for line in (source / "README.md").read_text().splitlines() if line.startswith("license:"))
    assert licence in (output / "README.md").read_text()


def check_masks(pruned: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], *, sparse: bool) -> None:
    """Zeros of a sparse model stay through training, two in each four; every weight of a dense one may move."""
    for name, weight in pruned.items():
        if "proj" not in name:
            continue
        zeros = weight == 0
        assert not torch.equal(trained[name], weight)
        if sparse:
            assert torch.equal(zeros.reshape(-1, 4).sum(1), torch.full((weight.numel() // 4,), 2))
            assert not trained[name][zeros].any()
