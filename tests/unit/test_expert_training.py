"""Mixtures of experts in training: the balance of routers, routers alone, files as published, and studies."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import secateur
from expert_configs import MIXTURES
from helpers import randomise, tiny_family, token_corpus, windows
from reference import opened
from secateur.config import parse
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.study.sections import ParentSpec
from secateur.training.parallel import TrainModule

IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
RECIPE = {"sequence": 16, "tokens_per_step": 64, "peak_rate": 1e-2, "micro_batch": 2}
BALANCED = (
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "mixtral",
    "granitemoe",
    "gpt_oss",
)  #: with a coefficient in their config


def mixture(name: str, **config: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**IDS, **MIXTURES[name], **config}))
    randomise(model)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()))
    return model


def write(name: str, folder: Path, **config: Any) -> Path:
    out = folder / name
    mixture(name, **config).save_pretrained(out)
    return out


@pytest.mark.parametrize("name", BALANCED)
def test_the_balance_in_the_loss_is_that_of_transformers(name: str) -> None:
    model = mixture(name, router_aux_loss_coef=0.3, output_router_logits=True).train()
    ids = windows(3, 12)
    expected = model(input_ids=ids, labels=ids)
    twin = copy.deepcopy(model)
    twin.config.output_router_logits = False
    module = TrainModule(twin).train()
    losses = module(ids)
    tokens = losses.each.numel()
    assert losses.total.item() / tokens == pytest.approx(expected.loss.item(), rel=1e-5)
    assert module.figures()["router_balance"] == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    losses.total.backward()
    (tokens * expected.loss).backward()
    routers = [n for n, _ in model.named_parameters() if n.endswith(("gate.weight", "router.weight"))]
    assert routers
    for router in routers:
        expected_gradient = model.get_parameter(router).grad
        assert expected_gradient is not None
        tolerance = 1e-4 * float(expected_gradient.abs().max())
        torch.testing.assert_close(twin.get_parameter(router).grad, expected_gradient, rtol=1e-3, atol=tolerance)


def test_a_batch_in_evaluation_has_no_balance_in_its_loss() -> None:
    model = mixture("mixtral", router_aux_loss_coef=0.3)
    ids = windows(2, 12)
    with torch.no_grad():
        losses = TrainModule(model).eval()(ids)
    assert float(losses.total) == pytest.approx(float(losses.each.sum()), rel=1e-6)


def test_the_busiest_expert_shows_a_router_that_has_collapsed() -> None:
    model = mixture("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # all experts score alike, so that the first two are chosen for every token
    module = TrainModule(model).train()
    module(windows(2, 12))
    assert module.figures()["busiest_expert"] == pytest.approx(4.0)  # 1 of 2 choices where 1 of 8 would be even


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "glm4_moe"])
def test_routers_alone_are_trained(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, corpus = write(name, tmp_path), token_corpus(tmp_path / "corpus", tokens=2000, vocabulary=61)
    trained = secateur.train(
        tmp_path / "out", init=directory, tokens=256, data=f"shards:{corpus}", recipe=RECIPE, only="router", points=1
    )
    assert ("plus 0.001 times the balance" in capsys.readouterr().err) == (
        name != "glm4_moe"
    )  # which has no coefficient
    before, after = load_file(directory / "model.safetensors"), load_file(trained.path / "model.safetensors")
    assert before.keys() == after.keys()  # as the file spelled them
    changed = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
    routers = {t for t in before if t.endswith(("mlp.gate.weight", "router.layer.weight"))}
    assert changed == routers and routers
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["router_balance"] > 0 for line in lines if "grad_norm" in line)


def test_routers_alone_need_a_mixture_and_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`only`: router: all else would stay random"):
        secateur.train(tmp_path / "x", init="scratch", tokens=100, data="shards:x", like="y", only="router")
    dense, corpus = tiny_family(tmp_path, "llama"), token_corpus(tmp_path / "corpus", tokens=2000, vocabulary=61)
    with pytest.raises(UserError, match=r"`only`: router: .* is no mixture of experts"):
        secateur.train(tmp_path / "x", init=dense, tokens=64, data=f"shards:{corpus}", recipe=RECIPE, only="router")


@pytest.mark.parametrize("name", MIXTURES)
def test_a_trained_mixture_is_spelled_as_its_source(name: str, tmp_path: Path) -> None:
    directory, corpus = write(name, tmp_path), token_corpus(tmp_path / "corpus", tokens=2000, vocabulary=61)
    trained = secateur.train(
        tmp_path / "out", init=directory, tokens=128, data=f"shards:{corpus}", recipe=RECIPE, points=1
    )
    before, after = load_file(directory / "model.safetensors"), load_file(trained.path / "model.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    biases = [tensor for tensor in after if tensor.endswith("correction_bias")]
    assert all(torch.equal(after[tensor], before[tensor]) for tensor in biases)  # they choose, and have no gradient
    opened(trained.path)


PARENT = {"tokens": 1000, "hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "tied": True}
MIXED = {**PARENT, "experts": 8, "active": 2, "expert_ffn": 16}


def test_a_mixture_as_parent_is_a_mixtral() -> None:
    shape = parse(ParentSpec, MIXED, origin="parent").shape(61)
    assert shape is not None and shape.family.name == "mixtral"
    config = AutoConfig.for_model("mixtral", **shape.config_changes(), vocab_size=61, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.total == sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * 32 * 16  # gate, up and down of one expert
    assert shape.active_parameters == shape.total - 2 * 6 * expert


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": None}, "parent.active: a mixture needs experts, active, expert_ffn"),
        ({"active": 9}, "parent.active: 9 is more than parent.experts 8"),
        ({"ffn": 64}, "parent.ffn: layers of a mixture have experts"),
        ({"experts": None, "active": None, "expert_ffn": None, "ffn": 64, "router_balance": 0.1}, "goes with"),
    ],
)
def test_a_parent_with_contradicting_keys_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ParentSpec, {**MIXED, **changes}, origin="parent")


STUDY = {
    "name": "mixture",
    "corpus": {"source": "stdlib", "vocabulary": 300, "excerpt": 200, "holdout": 0.05},
    "parent": {**MIXED, "tokens": 2048},
    "methods": [{"method": "reap", "controls": ["dense-active", "dense-total"]}],
    "ratios": 0.5,
    "retrain": {"tokens": 512},
    "settings": ["equal_training_tokens", "equal_total_tokens"],
    "calibration": {"windows": 4},
    "recipe": {"sequence": 32, "tokens_per_step": 128, "peak_rate": 5e-3, "init": {"std": 0.06}, "micro_batch": 4},
    "evaluation": {"windows": 8, "points": 1},
}


def test_a_study_compares_a_pruned_mixture_with_its_twins_and_dense_models(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(json.dumps(STUDY))
    study = secateur.Study.load(path, out=tmp_path / "out")
    study.run()
    models = {folder.name.partition("-")[2].rpartition("-")[0]: folder / "model" for folder in stages(tmp_path / "out")}
    shapes = {name: Checkpoint(folder).shape for name, folder in models.items() if (folder / "config.json").is_file()}
    pruned, twin = shapes["reap-0.5-P-R"], shapes["reap-0.5-S_R"]
    assert (pruned.experts, pruned.active) == (4, 2) and pruned == twin
    assert shapes["reap-0.5-S_P+R"] == twin and shapes["parent"].experts == 8
    active, total = shapes["reap-0.5-dense-active"], shapes["reap-0.5-dense-total"]
    assert active.experts == total.experts == 0
    assert active.total == pytest.approx(pruned.active_parameters, rel=0.01)
    assert total.total == pytest.approx(pruned.total, rel=0.01)
    page = study.report().read_text()
    assert "REAP" in page and "parameters of a token" in page and f"{pruned.active_parameters:,}" in page


def stages(out: Path) -> list[Path]:
    return sorted(folder for folder in (out / "stages").iterdir() if folder.name.startswith(("train-", "prune-")))
