"""Adapters in training: losses against a loop of three lines, zeros, merges, PEFT's format, cost and bad input."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from expert_configs import MIXTURES
from expert_models import tiny_mixture
from helpers import files, hf, naive_loss, tiny_family, tiny_llama, token_corpus, windows
from processes import together
from secateur.cli import main
from secateur.config import identity
from secateur.data.shards import TokenStore
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.plan import load_masks
from secateur.training.adapter import Adapter, adapted_linears, adapter_flops, adapter_parameters, read_adapter
from secateur.training.batches import Slice
from secateur.training.init import generator_of, stored_weights
from secateur.training.lora import add_adapter
from secateur.training.origin import Start
from secateur.training.parallel import Execution, TrainModule, place_model
from secateur.training.recipe import Recipe, learning_rate
from secateur.training.request import TrainRequest

STEPS, SEQUENCE = 6, 16
RECIPE = ["--set", f"sequence={SEQUENCE}", "--set", "tokens_per_step=64", "--set", "peak_rate=2e-2"]
SHORT = [*RECIPE, "--points", "2", "--micro-batch", "3", "--tokens", str(STEPS * 64)]
LORA = "rank=4,alpha=8,targets=all"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpus(tmp_path_factory.mktemp("corpus"), tokens=2000, vocabulary=61)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "dense").mkdir()
    paths = {"dense": tiny_llama(folder / "dense"), "sparse": folder / "sparse"}
    prune = ["prune", str(paths["dense"]), str(paths["sparse"]), "--method", "magnitude", "--ratio", "0.5"]
    assert main(prune) == 0
    return paths


def command(out: Path, init: Path, corpus: Path, *options: str, lora: str = LORA) -> list[str]:
    return ["train", str(out), "--init", str(init), "--data", f"shards:{corpus}", *SHORT, "--lora", lora, *options]


def losses(out: Path) -> list[float]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


class ByHand(nn.Module):
    """A linear and its update, as the papers write it."""

    def __init__(self, base: Any, name: str, mask: Tensor | None, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        size = base.weight.shape
        draws = torch.empty(rank, size[1]).uniform_(-1, 1, generator=generator_of(0, f"{name}.lora_A.default.weight"))
        self.base, self.mask, self.scale = base, 1.0 if mask is None else mask, scale
        self.a, self.b = nn.Parameter(draws / math.sqrt(size[1])), nn.Parameter(torch.zeros(size[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.base.weight + self.scale * self.mask * (self.b @ self.a), self.base.bias)


def adapted_by_hand(directory: Path, masks: dict[str, Tensor]) -> PreTrainedModel:
    model = hf(directory)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ByHand(module, name, masks.get(f"{name}.weight")))
    return model


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_losses_are_those_of_a_loop_by_hand(kind: str, models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    assert main(command(tmp_path / "out", models[kind], corpus, "--merge")) == 0
    recipe = Recipe(sequence=SEQUENCE, tokens_per_step=64, peak_rate=2e-2)
    masks = dict(load_masks(models[kind])) if kind == "sparse" else {}
    model = adapted_by_hand(models[kind], masks)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (recipe.beta1, recipe.beta2)
    optimizer = torch.optim.AdamW(weights, betas=betas, eps=recipe.epsilon, weight_decay=recipe.weight_decay)
    data = Slice(TokenStore(corpus), 0, STEPS * 64, recipe)
    for step, loss in enumerate(losses(tmp_path / "out")):
        ids = torch.stack([data.batch([span]).ids[0] for span in data.spans(step)])
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        assert loss == pytest.approx(float(total), rel=1e-5), step
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(weights, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, STEPS)
        optimizer.step()
    merged = hf(tmp_path / "out")
    assert naive_loss(merged, windows()) == pytest.approx(naive_loss(model, windows()), abs=1e-5)
    curve = json.loads((tmp_path / "out" / "train.json").read_text())["result"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert naive_loss(merged, windows()) != pytest.approx(naive_loss(hf(models[kind]), windows()), abs=1e-3)


def test_zeros_stay_and_all_but_the_linears_is_as_it_was(
    models: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(out, models["sparse"], corpus, "--merge")) == 0
    message = capsys.readouterr().err
    assert "35 linears" in message and "masked in each forward pass" in message and "secateur mask" in message
    masks, before, after = load_masks(models["sparse"]), hf(models["sparse"]), hf(out)
    for (name, weight), (_, old) in zip(after.named_parameters(), before.named_parameters(), strict=True):
        if name in masks:
            assert not weight[~masks[name]].abs().any() and not torch.signbit(weight[~masks[name]]).any()
            assert not torch.equal(weight, old)
        else:
            assert torch.equal(weight, old), name
    assert load_masks(out).keys() == masks.keys()  # later runs hold them as well
    assert main(["eval", str(out), "--data", f"shards:{corpus}", "--seqlen", "16"]) == 0


def test_peft_loads_what_is_written(
    models: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = "rank=3,alpha=6,targets=attention+layers.1.mlp.up_proj"
    assert main(command(tmp_path / "merged", models["dense"], corpus, "--merge", lora=lora)) == 0
    assert main(command(tmp_path / "alone", models["dense"], corpus, lora=lora)) == 0
    assert files(tmp_path / "alone").keys() >= {"adapter_config.json", "adapter_model.safetensors", "train.json"}
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "merged" / "adapter" / name).read_bytes()
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models["dense"])
    attention = [f"self_attn.{letter}_proj" for letter in "koqv"]
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", *attention]
    assert len(load_file(tmp_path / "alone" / "adapter_model.safetensors")) == 2 * (4 * 5 + 1)
    loaded: Any = PeftModel.from_pretrained(hf(models["dense"]), str(tmp_path / "alone"))
    merged = hf(tmp_path / "merged")
    ids = windows()
    torch.testing.assert_close(loaded(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "alone"), "--data", f"shards:{corpus}"]) == 2
    assert "--merge" in capsys.readouterr().err


def test_masking_after_the_merge_of_peft_is_the_same_model(
    models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(command(out, models["sparse"], corpus, "--merge")) == 0
    model: Any = PeftModel.from_pretrained(hf(models["sparse"]), str(out / "adapter"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert main(["mask", str(tmp_path / "merged"), "--plan", str(models["sparse"])]) == 0
    masked, want = hf(tmp_path / "merged-masked"), hf(out)
    for (name, weight), (_, other_weight) in zip(masked.named_parameters(), want.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other_weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_killed_run_resumes_at_the_same_bits(
    kind: str, models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--merge", "--save-every", "2"]
    assert main(command(tmp_path / "whole", models[kind], corpus, *options)) == 0
    backward, calls = torch.Tensor.backward, 0

    def fails(tensor: Tensor, *arguments: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the fourth step of two micro-batches
            raise KeyboardInterrupt
        backward(tensor, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "backward", fails)
    assert main(command(tmp_path / "again", models[kind], corpus, *options)) == 130
    monkeypatch.undo()
    assert main(command(tmp_path / "again", models[kind], corpus, *options)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    for path in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


@pytest.mark.slow
def test_processes_share_the_work(models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Two processes: the losses, the merged model and the adapter of one; in bfloat16 as near as its eight bits are."""
    jobs = {
        "dense": (models["dense"], ["--merge"]),
        "sparse": (models["sparse"], ["--merge", "--recompute"]),
        "taught": (models["sparse"], ["--merge", "--teacher", str(models["dense"]), "--alpha", "0.5"]),
        "bfloat16": (models["sparse"], ["--merge", "--dtype", "bfloat16"]),
    }
    lines = [command(tmp_path / f"{name}-2", init, corpus, *options) for name, (init, options) in jobs.items()]
    together(2, lines, tmp_path)
    for name, (init, options) in jobs.items():
        assert main(command(tmp_path / f"{name}-1", init, corpus, *options)) == 0
        exact = name != "bfloat16"
        several, alone = losses(tmp_path / f"{name}-2"), losses(tmp_path / f"{name}-1")
        assert several == pytest.approx(alone, rel=1e-5 if exact else 4e-3), name
        parts = ("adapter/adapter_model.safetensors",) if exact else ()  # in bfloat16 A and B alone differ by more
        for path in ("model.safetensors", *parts):
            tensors = load_file(tmp_path / f"{name}-1" / path)
            for tensor, value in load_file(tmp_path / f"{name}-2" / path).items():
                torch.testing.assert_close(value, tensors[tensor], rtol=0, atol=1e-4 if exact else 0.1, msg=tensor)
        if name != "dense":
            masks, merged = load_masks(models["sparse"]), load_file(tmp_path / f"{name}-2" / "model.safetensors")
            assert not any(merged[tensor][~mask].any() for tensor, mask in masks.items())


# --- cost


def placed(directory: Path, adapter: Adapter) -> TrainModule:
    checkpoint = Checkpoint(directory)
    model = skeleton(checkpoint.config, directory)
    start = add_adapter(Start(model, stored_weights(checkpoint), checkpoint.masks), adapter, seed=0)
    return place_model(start.model, start.weights, Execution()).train()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("targets", ["all", "layers.3.self_attn.q_proj"])
def test_flops_are_those_that_torch_counts(kind: str, targets: str, models: dict[str, Path]) -> None:
    """The count without attention's scores, which it takes from another kernel, and without the lowest inputs."""
    adapter = Adapter(rank=4, targets=(targets,))
    module = placed(models[kind], adapter)
    shape, ids = Checkpoint(models[kind]).shape, windows(3, 16)
    counter = FlopCounterMode(display=False)
    with counter:
        module(ids).total.backward()
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counts.items() if any(mm in name for mm in ("mm", "addmm", "bmm")))
    first = 3 if "3" in targets else 0
    attention = 4 * shape.heads * shape.head_dim * (16 + 1) / 2
    formula = adapter_flops(adapter, shape, ids.numel(), 16, sparse=kind == "sparse", batch=ids.numel())
    formula -= ids.numel() * attention * (2 * shape.layers - first)
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    unneeded = 2 * shape.hidden * (query + 2 * kv)  # the gradient of the lowest block's input
    assert counts and products > 0
    # The head reads every position but the last of a window.
    head = 2 * 2 * shape.vocabulary * shape.hidden * len(ids)
    if targets == "all":
        formula -= unneeded * ids.numel() + head
        if kind == "dense":
            formula -= 2 * adapter.rank * 3 * shape.hidden * ids.numel()
        else:
            formula -= adapter.rank * unneeded  # their weights, which are not made again
        assert products == pytest.approx(formula, rel=1e-6)
    else:
        assert formula * 0.8 < products < formula


def test_what_is_trained_is_counted(models: dict[str, Path]) -> None:
    for adapter in (Adapter(rank=4), Adapter(rank=2, targets=("ffn", "q_proj"))):
        module = placed(models["sparse"], adapter)
        trained = sum(parameter.numel() for parameter in module.trainable_parameters().values())
        assert trained == adapter_parameters(adapter, Checkpoint(models["sparse"]).shape)


# --- what it is added to


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "phi", "deepseek_v3"])
def test_linears_of_families(family: str, tmp_path: Path) -> None:
    directory = (tiny_mixture if family in MIXTURES else tiny_family)(tmp_path, family)
    module = placed(directory, Adapter(rank=1))
    names = {name.partition(".lora_")[0] for name in module.trainable_parameters()}
    assert names == set(adapted_linears(Adapter(rank=1), Checkpoint(directory).shape))
    leaves = {name.rpartition(".")[2] for name in names}
    assert {"phi3": {"qkv_proj", "gate_up_proj"}, "phi": {"dense", "fc2"}}.get(family, {"o_proj"}) <= leaves
    assert not any("experts." in name and "shared" not in name for name in names)
    module(windows()).total.backward()
    assert all(parameter.grad is not None for parameter in module.trainable_parameters().values())


def test_groups_of_linears(models: dict[str, Path]) -> None:
    shape = Checkpoint(models["dense"]).shape
    sizes = {group: adapted_linears(Adapter(targets=(group,), rank=1), shape) for group in ("all", "attention", "ffn")}
    assert {name.split(".")[3] for name in sizes["attention"]} == {"self_attn"}
    assert {name.split(".")[3] for name in sizes["ffn"]} == {"mlp"}
    assert sizes["attention"] | sizes["ffn"] == sizes["all"] and len(sizes["all"]) == 7 * shape.layers
    assert sizes["all"]["model.layers.0.mlp.down_proj"] == (shape.hidden, shape.ffn)


def test_an_adapter_is_read_as_text_or_mapping() -> None:
    adapter = read_adapter("rank=8,alpha=4,targets=q_proj+ffn,peak_rate=1e-3")
    assert adapter == read_adapter({"rank": 8, "alpha": 4.0, "targets": ["q_proj", "ffn"], "peak_rate": 1e-3})
    assert (adapter.scale, adapter.label, Adapter(rank=4).alpha) == (0.5, "lora-8-ffn", 8.0)
    assert identity(adapter) == {"rank": 8, "alpha": 4.0, "targets": ["q_proj", "ffn"]}
    request = TrainRequest(out="o", init="i", tokens=10, data="shards:x", adapter=adapter)
    assert request.recipe.peak_rate == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": "rank=0"}, "--lora: rank: should be greater than 0"),
        ({"lora": "rank=2,alhpa=4"}, "--lora: alhpa: unknown key; did you mean 'alpha'?"),
        ({"lora": "rank"}, "--lora: 'rank' should be KEY=VALUE"),
        ({"lora": "rank=33"}, "--lora: rank 33 is more than the smaller side of model.layers.0.self_attn."),
        ({"lora": "targets=q_prj"}, "--lora: target 'q_prj' is no linear of the model; did you mean 'q_proj'"),
        ({"lora": "rank=2,targets=layers.5.mlp.up_proj"}, "has layers 0 to 4; after depth pruning"),
        ({"lora": None, "more": ["--merge"]}, "--merge: merges an adapter into the weights"),
        ({"more": ["--init", "scratch", "--like", "{dense}"]}, "--lora: fresh weights would stay random"),
        ({"more": ["--only", "router"]}, "--only: router: an adapter freezes the router"),
    ],
    ids=str,
)
def test_bad_input(
    options: dict[str, Any],
    message: str,
    models: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [text.format(**models) for text in options.get("more", [])]
    line = command(tmp_path / "out", models["dense"], corpus, *more, lora=options.get("lora", LORA) or "x")
    if options.get("lora", LORA) is None:
        line = [text for text in line if text not in ("--lora", "x")]
    assert main(line) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # before it, a line on the corpus without a tokenizer
    assert message in error
    assert not os.listdir(tmp_path)
