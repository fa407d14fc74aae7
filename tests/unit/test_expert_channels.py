"""FFN channels of routed experts: chosen expert by expert, on the tokens routed to each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from expert_configs import MIXTURES
from expert_loops import experts_of, hidden_of, matrices, routed
from helpers import calibration, hf, logits, random_model, windows
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.model.solver import solve_width
from secateur.pruning.expert_scoring import FEW_TOKENS
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

IDS = windows(32, 16)
WITH_SIZE = [name for name in MIXTURES if not name.startswith(("glm4_moe", "deepseek_v3", "ernie"))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family's name to a random checkpoint in which experts put nothing out on half their channels.

    Which half is silent differs from expert to expert.
    """

    @cache
    def make(name: str) -> Checkpoint:
        directory = tmp_path_factory.mktemp("mixture") / name
        model = random_model(MIXTURES[name])
        with torch.no_grad():
            for module in experts_of(model).values():
                silence(module)
        model.save_pretrained(directory)
        return Checkpoint(directory)

    return make


def silent(expert: int, channels: int) -> Tensor:
    """The channels of an expert that are silent in the planted model, sorted."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(expert))
    return order[: channels // 2].sort().values


def silence(module: Any) -> None:
    for expert in range(8):
        gate, up, down = matrices(module, expert)
        lost = silent(expert, len(up))
        gate[lost], up[lost] = 0, 0  # the hidden activation is zero ...
        down[:, lost] = 0.01  # ... and the columns that read it still differ from zero
        if hasattr(module, "gate_up_proj_bias"):
            bias = module.gate_up_proj_bias.data[expert]
            bias[2 * lost], bias[2 * lost + 1] = 0, -1  # gpt-oss adds one to what comes up


def half(name: str) -> Target:
    size = random_shape(name)
    return Target(sizes={"expert_ffn": size // 2})


def random_shape(name: str) -> int:
    config = MIXTURES[name]
    return config.get("moe_intermediate_size") or config["intermediate_size"]


def cut(source: Checkpoint, plan: Plan, out: Path) -> PreTrainedModel:
    out.mkdir()
    write_pruned(source, plan, out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values())
    return model.eval()


@pytest.mark.parametrize("name", WITH_SIZE)
def test_silent_channels_go_and_the_function_stays(name: str, checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint(name)
    plan = make_plan(source, "minitron-width", half(name), calibration(IDS), batch=5)
    loud = {expert: set(range(source.shape.expert_ffn)) - {*silent(expert, source.shape.expert_ffn).tolist()}
            for expert in range(8)}  # fmt: skip
    for keep in plan.keep_expert_ffn.values():
        assert [{*row.tolist()} for row in keep] == list(loud.values())
    model = cut(source, plan, tmp_path / "cut")
    torch.testing.assert_close(logits(model, IDS[:3]), logits(hf(source.directory), IDS[:3]), rtol=1e-5, atol=1e-5)
    assert plan.after.expert_ffn == source.shape.expert_ffn // 2
    assert plan.after.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_scores_are_those_of_a_loop(name: str, tmp_path: Path) -> None:
    """The root over windows of the squared mean over a window's positions, where tokens of other experts are zero."""
    random_model(MIXTURES[name], seed=3).save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    plan = make_plan(source, "minitron-width", half(name), calibration(IDS), batch=7)
    model = hf(source.directory)
    few = 0
    for module_name, (states, index, _) in routed(model, IDS).items():
        module, layer = model.get_submodule(module_name), int(module_name.split(".")[2])
        for expert in range(8):
            members = (index == expert).any(dim=1)
            scores = plan.scores[f"expert_ffn.{layer}"][expert]
            if int(members.sum()) < FEW_TOKENS:
                few += 1
                expected = matrices(module, expert)[2].square().sum(dim=0).sqrt()
            else:
                active = hidden_of(module, expert, states).double().abs() * members[:, None]
                expected = active.reshape(*IDS.shape, -1).mean(dim=1).square().sum(dim=0).sqrt()
            torch.testing.assert_close(scores.double(), expected.double(), rtol=1e-4, atol=1e-6)
            best = expected.argsort(descending=True, stable=True)[: plan.after.expert_ffn]
            assert {*plan.keep_expert_ffn[layer][expert].tolist()} == {*best.tolist()}
    assert few and sum(map(len, plan.summary["routing"]["few"].values())) == few


def test_ratio_over_channels_of_experts_and_hidden(tmp_path: Path) -> None:
    random_model(MIXTURES["qwen3_moe"]).save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    target = Target(ratio=0.4, axes=("hidden", "expert_ffn"))
    plan = make_plan(source, "minitron-width", target, calibration(IDS), batch=32)
    assert plan.after == solve_width(source.shape, 0.4, ("hidden", "expert_ffn"))
    assert plan.after.hidden < source.shape.hidden and plan.after.expert_ffn < source.shape.expert_ffn
    assert plan.removed()["non_embedding"] == pytest.approx(0.4, abs=0.02)
    model = cut(source, plan, tmp_path / "cut")
    assert plan.after.total == sum(p.numel() for p in model.parameters())
    assert torch.isfinite(logits(model, IDS[:1])).all()


def test_random_channels_need_no_text_and_differ_by_expert(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("gpt_oss")
    plan = make_plan(source, "random-width", half("gpt_oss"), None)
    rows = torch.stack([row for keep in plan.keep_expert_ffn.values() for row in keep])
    assert len(rows.unique(dim=0)) == len(rows) == 8 * source.shape.layers
    cut(source, plan, tmp_path / "cut")


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_one_key_for_routed_and_shared_experts_is_refused(name: str, checkpoint: Any) -> None:
    with pytest.raises(UserError, match="sizes routed and shared experts"):
        make_plan(checkpoint(name), "minitron-width", half(name), calibration(IDS))


@pytest.mark.parametrize(
    ("name", "method", "target", "message"),
    [
        ("mixtral", "minitron-width", Target(ratio=0.3, axes=("ffn",)), "every layer has experts"),
        (
            "mixtral",
            "minitron-width",
            Target(ratio=0.3, axes=("expert_ffn",), allocation="global"),
            "`allocation` global",
        ),
        ("mixtral", "minitron-width", Target(sizes={"expert_ffn": 999}), "expert_ffn=999 is not between 1 and"),
        ("mixtral", "flap", Target(ratio=0.3, axes=("expert_ffn",)), "not expert_ffn"),
        ("mixtral", "llm-pruner", Target(ratio=0.1, axes=("kv", "hidden")), "gradients of all weights"),
    ],
)
def test_targets_that_do_not_fit(name: str, method: str, target: Target, message: str, checkpoint: Any) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(checkpoint(name), method, target, calibration(IDS))
