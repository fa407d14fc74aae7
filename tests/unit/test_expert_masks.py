"""Masks over routed experts stay bit-exact zeros: in training, in other trainers, after a merge, and in a study."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import secateur
from expert_models import tiny_mixture
from helpers import hf, token_corpus, windows
from reference import opened
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import load_masks

IDS = windows(16, 16)
RECIPE = {"sequence": 16, "tokens_per_step": 64, "peak_rate": 1e-2, "micro_batch": 2}
FAMILIES = pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gpt_oss"])


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family to a checkpoint of it with half of its weights masked."""

    @cache
    def make(name: str) -> secateur.Pruned:
        folder = tmp_path_factory.mktemp("masks")
        method = "sparsegpt" if name == "gpt_oss" else "wanda"
        return secateur.prune(tiny_mixture(folder, name), folder / "out", method=method, ratio=0.5, calibration=IDS)

    return make


def dropped(model: nn.Module, masks: dict[str, Tensor]) -> Tensor:
    """All weights of a model that the masks drop."""
    parameters = dict(model.named_parameters())
    assert any("experts" in name and mask.dim() == 3 for name, mask in masks.items())
    return torch.cat([parameters[name].detach()[~mask] for name, mask in masks.items()])


@FAMILIES
def test_training_keeps_the_zeros_of_experts(name: str, pruned: Any, tmp_path: Path) -> None:
    source, corpus = pruned(name), token_corpus(tmp_path / "corpus", tokens=2000, vocabulary=61)
    masks = load_masks(source.path)
    trained = secateur.train(
        tmp_path / "out", init=source, tokens=128, data=f"shards:{corpus}", recipe=RECIPE, points=1
    )
    after = opened(trained.path)
    assert torch.equal(dropped(after, masks), torch.zeros_like(dropped(after, masks)))
    assert not dropped(after, masks).signbit().any()
    assert load_masks(trained.path).keys() == masks.keys()
    before = dict(hf(source.path).named_parameters())
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before[n])]
    assert {n for n in masks if "experts" in n} <= {*moved}
    names = load_file(source.path / "model.safetensors").keys()
    assert load_file(trained.path / "model.safetensors").keys() == names


@FAMILIES
@pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations and of a missing GPU
def test_another_trainer_keeps_them_with_the_callback(name: str, pruned: Any, tmp_path: Path) -> None:
    source = pruned(name)
    masks = load_masks(source.path)
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    model = hf(source.path)
    callbacks: list[TrainerCallback] = [secateur.KeepMasks(source)]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    assert not dropped(model, masks).any()
    plain = hf(source.path)
    Trainer(model=plain, args=arguments, train_dataset=rows).train()
    assert dropped(plain, masks).count_nonzero() > 0.9 * dropped(plain, masks).numel()


@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@FAMILIES
def test_the_mask_verb_after_a_foreign_change(name: str, fused: bool, pruned: Any, tmp_path: Path) -> None:
    """What another tool writes, in the family's spelling or as in memory, gets the zeros of the plan again."""
    source = pruned(name)
    masks, model = load_masks(source.path), hf(source.path)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "merged", save_original_format=not fused, max_shard_size="100KB")
    result = secateur.mask(tmp_path / "merged", source, tmp_path / "out")
    after = dict(opened(result.path).named_parameters())
    for parameter_name, parameter in model.named_parameters():
        expected = parameter * masks[parameter_name] if parameter_name in masks else parameter
        assert torch.equal(after[parameter_name], expected), parameter_name
    assert result.masked == sum(int((~mask).sum()) for mask in masks.values()) == result.zeroed
    assert Checkpoint(result.path).spelled == Checkpoint(tmp_path / "merged").spelled


STUDY = {
    "name": "sparse-mixture",
    "corpus": {"source": "stdlib", "vocabulary": 300, "excerpt": 200, "holdout": 0.05},
    "parent": {
        "tokens": 2048,
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "tied": True,
        "experts": 4,
        "active": 2,
        "expert_ffn": 16,
    },
    "methods": [{"method": "wanda", "controls": ["permuted"]}],
    "ratios": 0.5,
    "retrain": {"tokens": 512},
    "settings": ["equal_training_tokens"],
    "calibration": {"windows": 4},
    "recipe": {"sequence": 32, "tokens_per_step": 128, "peak_rate": 5e-3, "init": {"std": 0.06}, "micro_batch": 4},
    "evaluation": {"windows": 8, "points": 1},
}


#: the stages that write a model: its kind, and what follows the name of the cell
WANDA = (("prune", ""), ("train", "-P-R"), ("train", "-S_R"), ("train", "-permuted"))


def test_a_study_of_a_sparse_mixture_and_its_masked_twins(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY))
    study = secateur.Study.load(tmp_path / "study.yaml", out=tmp_path / "out")
    study.run()
    folders = [*(tmp_path / "out" / "stages").glob("train-wanda*"), *(tmp_path / "out" / "stages").glob("prune-wanda*")]
    models = {folder.name.rpartition("-")[0]: folder / "model" for folder in folders}
    assert {*models} == {f"{kind}-wanda-0.5{end}" for kind, end in WANDA}
    masks = load_masks(models["prune-wanda-0.5"])
    for name in ("prune-wanda-0.5", "train-wanda-0.5-P-R", "train-wanda-0.5-S_R"):
        assert not dropped(opened(models[name]), masks).any(), name
    permuted = opened(models["train-wanda-0.5-permuted"])
    assert dropped(permuted, masks).any()
    for name, mask in masks.items():
        if mask.dim() == 3:  # other weights of an expert are zero, as many of them
            zeros = (permuted.get_parameter(name) == 0).flatten(1).sum(dim=1)
            assert torch.equal(zeros, (~mask).flatten(1).sum(dim=1)) and zeros.all()
    assert "Wanda" in study.report().read_text()
