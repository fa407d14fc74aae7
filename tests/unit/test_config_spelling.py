"""config.json of an output: what the source's had stays, and readers of the old spelling find RoPE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from family_configs import FAMILIES
from helpers import edit_config, hf, logits, tiny_family, token_corpus, windows
from secateur.model.config_spelling import with_dtype, with_old_spelling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
#: families that no release with the old keys opens, or that scale RoPE by default
NEW = ("qwen3_5", "gemma4", "lfm2", "apertus")
#: variant -> family, and what its configuration says besides
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {"rope_parameters": {"rope_type": "default", "rope_theta": 250_000.0}})
        for name in FAMILIES
        if name not in NEW
    },
    "ministral3": ("ministral3", {}),
    "olmo3": (
        "olmo3",
        {
            "layer_types": [["full_attention", "sliding_attention"][layer % 3 == 1] for layer in range(5)],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            }
        },
    ),
    "llama-llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}),
    "mistral-dynamic": ("mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4}}),
    "phi3-partial": ("phi3-partial", {}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": {**LONGROPE, "rope_theta": 5e4}, "original_max_position_embeddings": 16},
    ),
}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def without(folder: Path, copy: Path, *keys: str) -> Path:
    """A copy of a checkpoint whose config.json lacks some keys: what a reader that does not know them sees."""
    shutil.copytree(folder, copy)
    edit_config(copy, drop=keys)
    return copy


@pytest.mark.parametrize("variant", ROPES)
def test_both_spellings_are_one_model(variant: str, tmp_path: Path) -> None:
    family, config = ROPES[variant]
    source = tiny_family(tmp_path, family, **config)
    assert "rope_theta" not in read(source)  # transformers writes the new spelling alone
    out = secateur.prune(source, tmp_path / "out", method="random-depth", shape={"layers": 3}).path
    ids = windows(2, 24)
    expected = logits(hf(out), ids)
    old = without(out, tmp_path / "old", "rope_parameters")
    new = without(out, tmp_path / "new", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    assert torch.equal(logits(hf(old), ids), expected)
    assert torch.equal(logits(hf(new), ids), expected)
    plain = without(old, tmp_path / "plain", "rope_theta", "rope_scaling", "rope_local_base_freq")
    if family != "phi3-partial":  # which has the default theta
        assert not torch.equal(logits(hf(plain), ids), expected)


def old_reader(folder: Path) -> tuple[float, Any]:
    """RoPE as readers of the old spelling take it: absent keys are defaults."""
    config = read(folder)
    return config.get("rope_theta", 10_000.0), config.get("rope_scaling")


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_llama_written_as_mistral_keeps_its_rope(
    spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {**LLAMA3, "rope_theta": 500_000.0}
    source = tiny_family(tmp_path, "llama", rope_parameters=rope)
    if spelling == "old":
        changes = {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"}
        edit_config(source, drop=("rope_parameters", "dtype"), **changes, transformers_version="4.46.0")
    edit_config(source, eos_token_id=[2, 5], pretraining_tp=1, mlp_bias=False, house={"note": 1})
    pruned = secateur.prune(source, tmp_path / "out", method="random-width", shape={"hidden": 44})
    before, after = read(source), read(pruned.path)
    assert after["model_type"] == "mistral" and after["architectures"] == ["MistralForCausalLM"]
    assert old_reader(pruned.path) == (500_000.0, LLAMA3)
    assert after["rope_parameters"]["rope_theta"] == 500_000.0
    changed = {"model_type", "architectures", "hidden_size", "transformers_version"}
    assert {key: after[key] for key in before.keys() - changed} == {key: before[key] for key in before.keys() - changed}
    assert ("torch_dtype" in after, "dtype" in after) == (spelling == "old", spelling == "new")
    assert not after["transformers_version"].startswith("4.")
    ids = windows(2, 24)
    expected = logits(hf(pruned.path), ids)
    assert torch.equal(logits(hf(without(pruned.path, tmp_path / "a", "rope_parameters")), ids), expected)
    edit_config(tmp_path / "a", rope_scaling=None)
    assert not torch.equal(logits(hf(tmp_path / "a"), ids), expected)

    sentence = "written as Mistral instead of Llama"
    assert sentence in capsys.readouterr().err
    assert sentence in (pruned.path / "README.md").read_text()
    assert pruned.record()["family"] == "mistral" and sentence in str(pruned.family_change)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NEW])
def test_keys_of_an_old_file_stay(family: str, tmp_path: Path) -> None:
    source = tiny_family(tmp_path, family)
    rope = {"rope_theta": 70_000.0, "rope_scaling": None}
    rope |= {"rope_local_base_freq": 30_000.0} if family == "gemma3" else {}
    edit_config(
        source,
        drop=("rope_parameters", "dtype"),
        **rope,
        torch_dtype="float32",
        eos_token_id=[3, 4],
        _name_or_path="org/model",
        temperature=0.6,
        house={"note": 1},
        transformers_version="4.44.0",
    )
    corpus = token_corpus(tmp_path / "corpus", tokens=600, vocabulary=61)
    pruned = secateur.prune(
        source, tmp_path / "out", method="minitron-depth", shape={"layers": 2}, calibration=windows()
    )
    recipe = {"sequence": 16, "tokens_per_step": 64}
    trained = secateur.train(tmp_path / "t", init=pruned, tokens=128, data=f"shards:{corpus}", recipe=recipe, points=1)
    before = read(source)
    for result in (pruned, trained):
        after = read(result.path)
        cut = {"num_hidden_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval"}
        assert {key: after.get(key) for key in before.keys() - cut} == {key: before[key] for key in before.keys() - cut}
        assert "rope_parameters" not in after and "dtype" not in after
        ids = windows(1, 12)
        logits(hf(result.path), ids)


def test_a_live_model_gets_both_spellings(tmp_path: Path) -> None:
    source = tiny_family(tmp_path, "llama", rope_parameters={**LLAMA3, "rope_theta": 500_000.0})
    pruned = secateur.prune(hf(source), tmp_path / "out", method="magnitude", ratio=0.5)
    assert old_reader(pruned.path) == (500_000.0, LLAMA3)


def test_keys_that_are_there_are_not_changed() -> None:
    both = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "rope_theta": 7.0, "rope_scaling": {"a": 1}}
    assert with_old_spelling(both) == both
    assert with_old_spelling({"rope_theta": 7.0}) == {"rope_theta": 7.0}
    sliding = {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1.0}, "full_attention": {"rope_theta": 2.0}}
    assert with_old_spelling({"rope_parameters": sliding}) == {"rope_parameters": sliding}


def test_the_dtype_is_written_under_the_key_that_is_there() -> None:
    assert with_dtype({"torch_dtype": "float16"}, "float32") == {"torch_dtype": "float32"}
    assert with_dtype({"dtype": "float16", "a": 1}, "float32") == {"dtype": "float32", "a": 1}
    assert with_dtype({}, "float32") == {"dtype": "float32"}
