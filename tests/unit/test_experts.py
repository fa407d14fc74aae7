"""Pruning the routed experts of every family of mixtures, against transformers' own modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from expert_configs import MIXTURES
from expert_models import Routed, naive_scores, routed_experts, tiny_mixture, without_experts
from helpers import calibration, edit_config, hf, logits, naive_loss, windows
from reference import opened
from secateur.calibration.block_walk import BlockWalk
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

IDS = windows(6, 12)
METHODS = ("reap", "expert-frequency", "expert-activation")


class Mixtures:
    """Tiny mixtures and what pruning makes of them, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = cache(self._directory)
        self.pruned = cache(self._pruned)
        self.routed = cache(self._routed)

    def _directory(self, name: str, fused: bool = False) -> Path:
        return tiny_mixture(self.root, name, fused=fused)

    def _pruned(self, name: str, fused: bool = False, method: str = "reap") -> tuple[Plan, Path]:
        return prune(self.directory(name, fused), method, Target(ratio=0.5))

    def _routed(self, name: str) -> dict[int, Routed]:
        return routed_experts(self.directory(name), IDS)


def prune(directory: Path, method: str, target: Target, **options: Any) -> tuple[Plan, Path]:
    """Prune a checkpoint beside itself; the plan and the output."""
    checkpoint = Checkpoint(directory)
    plan = make_plan(checkpoint, method, target, calibration(IDS), batch=4, options=options)
    out = directory.parent / f"{directory.name}-out-{len(list(directory.parent.iterdir()))}"
    out.mkdir()
    write_pruned(checkpoint, plan, out)
    return plan, out


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixtures]:
    root = tmp_path_factory.mktemp("mixtures")
    yield Mixtures(root)
    shutil.rmtree(root)


@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_walk_computes_the_states_of_the_model(name: str, fused: bool, mixtures: Mixtures) -> None:
    model, walk = (
        hf(mixtures.directory(name, fused)),
        BlockWalk(Checkpoint(mixtures.directory(name, fused)), IDS, batch=4),
    )
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    states = walk.start()
    for block in walk.blocks():
        torch.testing.assert_close(torch.cat(states), expected[block.index], rtol=1e-5, atol=1e-5)
        states = block.run(states)
    assert walk.loss(states) == pytest.approx(naive_loss(model, IDS), rel=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_parameters_are_counted_as_transformers_has_them(name: str, mixtures: Mixtures) -> None:
    model, shape = hf(mixtures.directory(name)), Checkpoint(mixtures.directory(name)).shape
    tensors = dict(model.named_parameters())
    assert shape.total == sum(tensor.numel() for tensor in tensors.values())
    path = f".{shape.family.experts}."
    of_experts = {n: tensor for n, tensor in tensors.items() if path in n}
    assert of_experts
    assert all(len(tensor) == 8 for tensor in of_experts.values())
    idle = sum((8 - 2) * tensor[0].numel() for tensor in of_experts.values())
    assert shape.active_parameters == shape.total - idle


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MIXTURES)
def test_scores_are_those_of_a_loop_over_the_models_own_experts(name: str, method: str, mixtures: Mixtures) -> None:
    plan, _ = mixtures.pruned(name, method=method)
    routed = mixtures.routed(name)
    assert {f"experts.{layer}" for layer in routed} == plan.scores.keys()
    groups = MIXTURES[name].get("n_group", 1)
    for layer, of_layer in routed.items():
        scores = naive_scores(of_layer, 8)[method]
        torch.testing.assert_close(plan.scores[f"experts.{layer}"].double(), scores, rtol=1e-5, atol=1e-7)
        size = 8 // groups
        best = [
            sorted(range(g * size, (g + 1) * size), key=lambda e: (-float(scores[e]), e))[: size // 2]
            for g in range(groups)
        ]
        assert plan.keep_experts[layer].tolist() == sorted(expert for group in best for expert in group)
        tokens = plan.summary["routing"]["tokens"][str(layer)]
        assert tokens == naive_scores(of_layer, 8)["expert-frequency"].tolist()


def weights_by_formula(name: str, router: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """What a router multiplies each expert by, zero for those not chosen: [tokens, experts]."""
    config = {"norm_topk_prob": name.startswith(("glm4", "deepseek")), **MIXTURES[name]}
    logits = states @ router["weight"].T + router.get("bias", 0.0)
    shares = logits.sigmoid() if "n_group" in config else logits.softmax(dim=1)
    choice = shares + router.get("e_score_correction_bias", torch.zeros(8)).flatten()
    groups = config.get("n_group", 1)
    best_of_group = choice.view(len(states), groups, -1).topk(2).values.sum(dim=2)
    allowed = torch.zeros_like(best_of_group).scatter(1, best_of_group.topk(config.get("topk_group", 1)).indices, 1)
    choice = choice.masked_fill(allowed.repeat_interleave(8 // groups, dim=1) == 0, -torch.inf)
    choices = torch.zeros_like(choice).scatter(1, choice.topk(2).indices, 1)
    weights = shares * choices
    normalised = config["norm_topk_prob"] or name.startswith(("mixtral", "granitemoe", "gpt_oss", "ernie"))
    weights = weights / weights.sum(dim=1, keepdim=True) if normalised else weights
    factor = {"glm4_moe": 1.0, "deepseek_v3": 2.5}.get(name.partition("-")[0], 1.0)
    return weights * config.get("routed_scaling_factor", factor)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_weight_of_an_expert_is_the_formula_of_its_router(name: str, mixtures: Mixtures) -> None:
    model = hf(mixtures.directory(name))
    for layer, of_layer in mixtures.routed(name).items():
        parent = model.get_submodule(f"model.layers.{layer}.{Checkpoint(mixtures.directory(name)).family.experts}"[:-8])
        module: Any = parent.router if hasattr(parent, "router") else parent.gate
        router = {n.rpartition(".")[2]: t.detach() for n, t in module.state_dict().items()}
        weights = weights_by_formula(name, router, of_layer.states)
        observed = torch.zeros_like(weights).scatter(1, of_layer.index, of_layer.weights)
        torch.testing.assert_close(observed, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_cut_is_the_model_whose_router_cannot_choose_the_lost(name: str, fused: bool, mixtures: Mixtures) -> None:
    plan, out = mixtures.pruned(name, fused)
    assert plan.after.experts == 4
    whole = without_experts(hf(mixtures.directory(name, fused)), plan)
    ids = windows(3, 20, seed=9)
    expected = logits(whole, ids)
    assert float((expected - logits(hf(mixtures.directory(name)), ids)).abs().max()) > 0.01
    torch.testing.assert_close(logits(opened(out), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_both_spellings_give_the_same_result_and_stay(name: str, mixtures: Mixtures) -> None:
    (own_plan, own), (fused_plan, fused) = mixtures.pruned(name), mixtures.pruned(name, fused=True)
    assert {k: v.tolist() for k, v in own_plan.keep_experts.items()} == {
        k: v.tolist() for k, v in fused_plan.keep_experts.items()
    }
    first, second = dict(opened(own).named_parameters()), dict(opened(fused).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    for source, out in ((mixtures.directory(name), own), (mixtures.directory(name, fused=True), fused)):
        before, after = names(source), names(out)
        lost = {name for name in before if any(f"experts.{expert}." in name for expert in range(4, 8))}
        assert after == before - lost


def names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", MIXTURES)
def test_the_config_says_the_number_of_experts_once(name: str, mixtures: Mixtures, tmp_path: Path) -> None:
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    source = json.loads((mixtures.directory(name) / "config.json").read_text())
    config = json.loads((mixtures.pruned(name)[1] / "config.json").read_text())
    (key,) = [key for key in keys if key in config]
    assert config[key] == 4
    published = tmp_path / "published"
    shutil.copytree(mixtures.directory(name), published)
    spelling = Checkpoint(published).family.config_keys["experts"]
    edit_config(published, drop=keys, **{spelling: source[next(k for k in keys if k in source)]})
    again = json.loads((prune(published, "reap", Target(ratio=0.5))[1] / "config.json").read_text())
    assert [k for k in keys if k in again] == [spelling]
    assert again[spelling] == 4
