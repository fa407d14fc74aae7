"""Sparse methods on routed experts against loops over transformers' own modules, expert by expert."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expert_configs import MIXTURES
from expert_loops import experts_of, hidden_of, matrices, planned, routed
from formulas import capture, follow, linears, naive_obs
from helpers import calibration, hf, logits, random_model, windows
from secateur.errors import UserError
from secateur.evaluation.cost import pattern_of
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import load_masks
from secateur.pruning.expert_scoring import FEW_TOKENS
from secateur.pruning.pattern import Pattern
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target
from secateur.study.stages.controls import each_matrix, permuted_mask, random_mask
from secateur.training.masks import Masks

IDS = windows(32, 16)  # 512 tokens, of which about a quarter go to each expert
HALF, TWO_FOUR = Target(ratio=0.5), Target(pattern=Pattern(2, 4))
FAMILIES = pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family's name to a random checkpoint of it."""

    @cache
    def make(name: str, fused: bool = False) -> Checkpoint:
        directory = tmp_path_factory.mktemp("mixture") / name
        model = random_model(MIXTURES[name])
        model.save_pretrained(directory, save_original_format=not fused)
        return Checkpoint(directory)

    return make


def lowest(scores: Tensor, target: Target) -> Tensor:
    """Which weights stay if the lower half of each row, or two of each four in a row, go."""
    groups = scores.reshape(-1, 4) if target.pattern else scores
    order = groups.argsort(dim=1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(1, order[:, : groups.shape[1] // 2], False)
    return keep.reshape(scores.shape)


@FAMILIES
@pytest.mark.parametrize("target", [HALF, TWO_FOUR], ids=["0.5", "2:4"])
@torch.no_grad()
def test_wanda_scores_each_expert_on_its_own_tokens(name: str, target: Target, checkpoint: Any) -> None:
    source = checkpoint(name)
    plan = make_plan(source, "wanda", target, calibration(IDS), batch=5)
    model, few = hf(source.directory), 0
    for layer in range(source.shape.layers):
        seen, entered = capture(model, IDS), routed(model, IDS)  # the layers before are pruned, this one is not
        for linear_name, linear in linears(model, layer).items():
            if f"{linear_name}.weight" in plan.masks:
                linear.weight *= plan.masks[f"{linear_name}.weight"]
        for module_name, module in experts_of(model).items():
            if f".{layer}." not in module_name:
                continue
            states, index, _ = entered[module_name]
            for expert in range(8):
                x = states[(index == expert).any(dim=1)]
                h = hidden_of(module, expert, x)
                few += len(x) < FEW_TOKENS
                masks = planned(module, plan.masks, module_name, expert)
                for weight, keep, inputs in zip(matrices(module, expert), masks, (x, x, h), strict=True):
                    norms = inputs.double().square().sum(dim=0).sqrt() if len(x) >= FEW_TOKENS else 1.0
                    scores = weight.double().abs() * norms
                    if not torch.equal(lowest(scores, target), keep):  # up to near-ties
                        assert (lowest(scores, target) != keep).float().mean() < 0.002
                    weight *= keep
        assert seen
    assert 0 < few < 8 * source.shape.layers  # both rules were at work
    assert plan.summary["routing"]["few_tokens"] == FEW_TOKENS
    assert sum(map(len, plan.summary["routing"]["few"].values())) == few
    names = {n for n, _ in model.named_parameters()}
    assert plan.masks.keys() <= names and not any("gate.weight" in n or "router" in n for n in plan.masks)


@FAMILIES
@torch.no_grad()
def test_sparsegpt_solves_each_expert_by_itself(name: str, checkpoint: Any) -> None:
    """Against brain surgery column by column, in the first layer that has experts."""
    source = checkpoint(name)
    plan = make_plan(source, "sparsegpt", HALF, calibration(IDS), batch=32, options={"block": 16})
    module_name, (states, index, _) = next(iter(routed(model := hf(source.directory), IDS).items()))
    module: Any = model.get_submodule(module_name)
    least = max(FEW_TOKENS, source.shape.hidden, source.shape.expert_ffn)
    solved = 0
    for expert in range(8):
        x = states[(index == expert).any(dim=1)]
        if len(x) < least:
            continue
        solved += 1
        masks = planned(module, plan.masks, module_name, expert)
        results = planned(module, plan.weights, module_name, expert)
        triples = zip(matrices(module, expert), results, masks, strict=True)
        for place, (weight, result, keep) in enumerate(triples):
            inputs = hidden_of(module, expert, x) if place == 2 else x
            expected = naive_obs(weight, inputs, follow(keep, 0.5, None), 16)
            torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=3e-4)
    assert solved >= 3


@pytest.mark.parametrize("name", list(MIXTURES))
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_written_masks_hold_and_fused_files_give_the_same(
    name: str, method: str, checkpoint: Any, tmp_path: Path
) -> None:
    plans, models = [], []
    for fused in (False, True):
        source = checkpoint(name, fused)
        plan = make_plan(source, method, TWO_FOUR, calibration(IDS), batch=16)
        out = tmp_path / f"{fused}"
        out.mkdir()
        write_pruned(source, plan, out)
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)  # type: ignore[misc]
        assert not any(info.values())
        Masks(model, load_masks(out)).check()  # under the names that training finds parameters by
        assert Checkpoint(out).masks.keys() == plan.masks.keys()
        plans.append(plan)
        models.append(model.eval())
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    dropped = sum(int((~mask).sum()) for mask in plans[0].masks.values())
    assert dropped == plans[0].zeroed == plans[0].before.block_weights // 2
    dense = hf(checkpoint(name).directory)
    if method == "magnitude":
        with torch.no_grad():
            for parameter, mask in plans[0].masks.items():
                dense.get_parameter(parameter).mul_(mask)
        torch.testing.assert_close(logits(dense, IDS[:2]), logits(models[0], IDS[:2]))


@FAMILIES
@torch.no_grad()
def test_masks_of_experts_follow_a_cut(name: str, checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint(name)
    sparse, cut = tmp_path / "sparse", tmp_path / "cut"
    sparse.mkdir()
    cut.mkdir()
    write_pruned(source, make_plan(source, "magnitude", HALF, None), sparse)
    plan = make_plan(Checkpoint(sparse), "reap", Target(ratio=0.5), calibration(IDS), batch=32)
    write_pruned(Checkpoint(sparse), plan, cut)
    before, after = load_masks(sparse), load_masks(cut)
    assert before.keys() == after.keys()
    for layer, keep in plan.keep_experts.items():
        for tensor in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{layer}.mlp.experts.{tensor}"
            assert torch.equal(after[key], before[key][keep])
    Masks(hf(cut), after).check()


def test_a_second_pruning_keeps_the_first_masks(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("gpt_oss")
    write_pruned(source, make_plan(source, "magnitude", Target(ratio=0.3), None), tmp_path)
    first = load_masks(tmp_path)
    plan = make_plan(Checkpoint(tmp_path), "wanda", HALF, calibration(IDS), batch=16)
    for name, mask in plan.masks.items():
        assert not (mask & ~first[name]).any()
    assert plan.zeroed / plan.before.block_weights == pytest.approx(0.5, abs=0.01)


def test_few_tokens_are_listed_in_a_line(checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("mixtral")
    plan = make_plan(source, "wanda", HALF, calibration(IDS[:4]), batch=4)  # 64 tokens: too few for every expert
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "pruned by magnitude" in line]
    assert f"32 of 32 saw fewer than {FEW_TOKENS} tokens" in line and "layer 2: 0, 1, 2, 3, 4, 5, 6, 7" in line
    weight = hf(source.directory).get_parameter("model.layers.1.mlp.experts.down_proj")[5].detach()
    assert torch.equal(plan.masks["model.layers.1.mlp.experts.down_proj"][5], lowest(weight.abs(), HALF))


@pytest.mark.parametrize("name", list(MIXTURES))
@torch.no_grad()
def test_propagation_scores_a_block_behind_the_cut_blocks(name: str, checkpoint: Any, tmp_path: Path) -> None:
    """REAP's tokens for each expert, block after block, are those of a model cut that far."""
    source = checkpoint(name)
    target = Target(ratio=0.5, propagate="pruned")
    plan = make_plan(source, "reap", target, calibration(IDS), batch=5)
    plain = make_plan(source, "reap", Target(ratio=0.5), calibration(IDS), batch=5)
    tokens, layers = plan.summary["routing"]["tokens"], sorted(plan.keep_experts)
    assert tokens[str(layers[0])] == plain.summary["routing"]["tokens"][str(layers[0])]
    assert tokens[str(layers[-1])] != plain.summary["routing"]["tokens"][str(layers[-1])]
    assert plan.request["propagate"] == "pruned" and "propagate" not in plain.request
    write_pruned(source, plan, tmp_path)
    # Each module of experts of the cut model, fed by the cut blocks before it, sees what the scored one saw.
    entered = {int(n.split(".")[2]): states for n, (states, _, _) in routed(hf(tmp_path), IDS).items()}
    whole = hf(source.directory)
    for layer, (_, index, _) in zip(layers, _rerouted(whole, entered), strict=True):
        assert index.flatten().bincount(minlength=8).tolist() == tokens[str(layer)]


def _rerouted(model: Any, entered: dict[int, Tensor]) -> Any:
    """What the routers of the whole model say of states that enter them: as :func:`routed` gives it, layer by layer."""
    for layer, states in sorted(entered.items()):
        block = model.model.layers[layer]
        mixture = getattr(block, "block_sparse_moe", None) or block.mlp
        router = getattr(mixture, "gate", None) or mixture.router
        _, weights, index = router(states)
        yield states, index, weights


def test_propagation_goes_with_methods_that_score_experts_on_text(checkpoint: Any) -> None:
    for method in ("wanda", "random-expert", "minitron-width"):
        with pytest.raises(UserError, match="`propagate` pruned: goes with methods that score experts on text"):
            make_plan(checkpoint("mixtral"), method, Target(ratio=0.5, propagate="pruned"), calibration(IDS))


def test_controls_change_each_matrix_of_an_expert_by_itself(checkpoint: Any) -> None:
    source = checkpoint("gpt_oss")
    plan = make_plan(source, "magnitude", TWO_FOUR, None)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    masks = {key: plan.masks[key] for key in (name, "model.layers.0.self_attn.q_proj.weight")}
    assert pattern_of(plan.masks, source.tensors()) == "2:4"
    for control in (permuted_mask, random_mask):
        changed = each_matrix(control, masks, source.tensors(), 7, Pattern(2, 4))
        assert pattern_of(changed, source.tensors()) == "2:4" and not torch.equal(changed[name], masks[name])
        gates = changed[name][:, :, ::2].sum(dim=(1, 2))
        assert torch.equal(gates, masks[name][:, :, ::2].sum(dim=(1, 2)))

    def columns(mask: Tensor) -> Tensor:  # how many weights stay in each column of gate, up to their order
        return mask[:, :, ::2].sum(dim=2).sort(dim=1).values

    permuted = each_matrix(permuted_mask, masks, source.tensors(), 7, None)
    assert torch.equal(columns(permuted[name]), columns(masks[name]))
