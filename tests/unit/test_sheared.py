"""Sheared LLaMA: the formulas against naive ones, and what learning comes to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from family_configs import FAMILIES
from helpers import tiny_family, tiny_llama
from secateur.errors import RunError, UserError
from secateur.methods.sheared import Sheared
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.plan import Plan
from secateur.model.shapes import train_flops
from secateur.pruning.cost import scoring_flops
from secateur.pruning.learned import gate_values, learning_recipe
from secateur.pruning.target import Target
from secateur.training.gates import Gates
from secateur.training.init import stored_weights
from secateur.training.parallel import Execution, place_model
from secateur.training.recipe import make_optimizer, set_rate

IDS = torch.randint(0, 61, (40, 16), generator=torch.Generator().manual_seed(3))
EMBEDDING = "model.embed_tokens.weight"  # no gate is multiplied into it
SHAPE = "layers=3,hidden=24,ffn=32,heads=2"


def naive_gate(a: float, u: float) -> float:
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


def test_gates_follow_the_hard_concrete_distribution() -> None:
    method = Sheared()
    a, u = torch.tensor([-3.0, 0.0, 0.4, 4.0]), torch.tensor([0.3, 0.5, 0.9, 0.01])
    expected = [naive_gate(x, y) for x, y in zip(a.tolist(), u.tolist(), strict=True)]
    torch.testing.assert_close(method.sample_gates(a, u), torch.tensor(expected))
    many = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for x in (-2.0, 0.0, 1.0):  # the probability in closed form is how often it happens
        share = (method.sample_gates(torch.full_like(many, x), many) > 0).float().mean()
        assert float(method.open_probability(torch.tensor(x))) == pytest.approx(float(share), abs=4e-3)


def test_the_penalty_is_linear_and_quadratic_in_what_is_too_much() -> None:
    d, linear, quadratic = torch.tensor([0.5, -0.25]), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 8.0])
    assert float(Sheared().penalty(d, linear, quadratic)) == 2 * 0.5 + 1 * 0.25 + 4 * -0.25 + 8 * 0.0625


def test_the_objective_is_the_loss_and_the_penalty_by_hand(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    after = Target.parse(shape=SHAPE).shape(checkpoint.shape, Sheared(), "sheared")
    model = skeleton(checkpoint.config, checkpoint.directory)
    gates = Gates(model, Sheared(warmup=0.5), checkpoint.shape, after)
    module = place_model(model, stored_weights(checkpoint), Execution(), gates).train()
    gates.begin(24, 100)  # half way down to the shape
    before, kept = checkpoint.shape, float(torch.sigmoid(torch.tensor(4 - 2 / 3 * math.log(0.1 / 1.1))))
    total = 0.0
    for space, rows in (("layers", 1), ("hidden", 1), ("ffn", 5), ("kv", 5)):
        goal = 1 - 0.5 * (1 - after.units(space) / before.units(space))
        total += rows * 200.0 * (kept - goal) ** 2
    once = module(IDS[:2]).once
    assert once is not None and float(once.detach()) == pytest.approx(total, rel=1e-5)
    assert gates.figures()["ffn"] == pytest.approx(kept * 48)
    first, second = module(IDS[:2]).each, module(IDS[:2]).each
    assert torch.equal(first, second)  # one draw for all batches of a step
    gates.begin(25, 100)
    assert not torch.equal(module(IDS[:2]).each, first)
    assert module.eval()(IDS[:2]).once is None


def learned(
    checkpoint: Checkpoint, folder: Path, target: str = SHAPE, *, ids: Tensor = IDS, **options: Any
) -> tuple[Plan, Checkpoint]:
    folder.mkdir(exist_ok=True)
    return helpers.learned(checkpoint, "sheared", Target.parse(shape=target), ids, folder, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def run(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Checkpoint]:
    """An undisturbed run: its plan and its trained weights."""
    return learned(checkpoint, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def plan(run: tuple[Plan, Checkpoint]) -> Plan:
    return run[0]


def test_the_shape_is_reached_exactly_and_by_score(plan: Plan) -> None:
    assert plan.after.as_dict() == {
        **plan.before.as_dict(),
        "layers": 3,
        "hidden": 24,
        "ffn": 32,
        "heads": 2,
        "kv_heads": 1,
    }
    assert len(plan.keep_layers) == 3 and len(plan.keep_hidden) == 24
    assert [len(plan.keep_ffn[layer]) for layer in plan.keep_layers.tolist()] == [32, 32, 32]
    assert [len(plan.keep_kv[layer]) for layer in plan.keep_layers.tolist()] == [1, 1, 1]
    hidden = plan.scores["hidden"]
    assert plan.keep_hidden.tolist() == hidden.argsort(descending=True, stable=True)[:24].sort().values.tolist()
    assert plan.calibration["tokens"] == 60 * 4 * 16


def test_expected_sizes_come_down_with_their_targets_and_end_there(plan: Plan) -> None:
    curve = plan.summary["curve"]
    for space, size in (("layers", 3), ("hidden", 24), ("ffn", 32), ("kv", 1)):
        targets = [point[f"{space}_target"] for point in curve[1:]]
        assert targets == sorted(targets, reverse=True) and targets[0] > size and targets[-1] == size
        assert curve[-1][space] == pytest.approx(size, abs=max(0.5, 0.02 * plan.before.units(space)))


def test_another_seed_gives_other_scores(checkpoint: Checkpoint, plan: Plan, tmp_path: Path) -> None:
    seven, _ = learned(checkpoint, tmp_path / "seven", seed=7)
    assert not torch.equal(seven.scores["hidden"], plan.scores["hidden"])


def test_weights_are_trained(checkpoint: Checkpoint, run: tuple[Plan, Checkpoint]) -> None:
    assert not torch.equal(run[1].tensor(EMBEDDING), checkpoint.tensor(EMBEDDING))


def test_a_killed_run_goes_on_to_the_same_bits(checkpoint: Checkpoint, plan: Plan, tmp_path: Path) -> None:
    calls = []

    def killed(_: Any) -> None:
        calls.append(1)
        if len(calls) == 9:  # a measurement between two checkpoints
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(checkpoint, tmp_path, measure=killed)
    steps = sorted(path.name for path in (tmp_path / "steps").glob("step-*"))
    assert steps and steps[-1] < "step-00000060"
    again, trained = learned(checkpoint, tmp_path)
    assert all(torch.equal(again.scores[name], score) for name, score in plan.scores.items())
    assert again.summary == plan.summary
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert trained.shape == checkpoint.shape


def test_gates_that_do_not_settle_are_refused_with_their_curve(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"the gates did not settle: .* of 5, and the target is 3 .*along the run: .*option steps"
    ):
        learned(checkpoint, tmp_path, "layers=3", mask_rate=1e-6, steps=10)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_settle_on_every_family_while_weights_are_frozen(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_family(tmp_path, family))
    plan, frozen = learned(checkpoint, tmp_path / "run", "layers=4,ffn=40", steps=60, windows=2, rate=0)
    assert (plan.after.layers, plan.after.ffn) == (4, 40)
    assert plan.summary["curve"][-1]["ffn"] == pytest.approx(40, abs=1.5)
    assert torch.equal(frozen.tensor(EMBEDDING), checkpoint.tensor(EMBEDDING))
    saved = [*(tmp_path / "run" / "steps").glob("step-00000060/*")]
    assert any(file.suffix == ".safetensors" for file in saved) and sum(f.stat().st_size for f in saved) < 40_000


def test_multipliers_wait_until_the_target_stands_then_step_by_the_constraint(checkpoint: Checkpoint) -> None:
    after = Target.parse(shape="ffn=32").shape(checkpoint.shape, Sheared(), "sheared")
    model = skeleton(checkpoint.config, checkpoint.directory)
    gates = Gates(model, Sheared(warmup=0.5), checkpoint.shape, after)
    module = place_model(model, stored_weights(checkpoint), Execution(), gates).train()
    kept = float(Sheared().open_probability(torch.tensor(4.0)))
    for step, wanted in ((10, 0.0), (49, kept - 32 / 48)):
        gates.begin(step, 100)
        gates.zero_grad()
        once = module(IDS[:2]).once
        assert once is not None
        once.backward()
        grad = gates.linear["ffn"].grad
        torch.testing.assert_close(grad, torch.full((5,), wanted))
    optimizer = make_optimizer([], learning_recipe(Sheared(), 16, 2), gates.groups())
    set_rate(optimizer, 1e-4, learning_recipe(Sheared(), 16, 2))  # the peak
    optimizer.step()
    step = 60 * wanted / (1 + wanted)
    torch.testing.assert_close(gates.linear["ffn"].detach(), torch.full((5,), step))


def test_what_stays_only_to_make_up_the_number_can_still_learn(checkpoint: Checkpoint) -> None:
    after = Target.parse(shape="hidden=24").shape(checkpoint.shape, Sheared(), "sheared")
    a = torch.full((1, 32), -4.0)
    a[0, :20] = 4.0
    values = gate_values(Sheared(), {"hidden": a}, after)["hidden"][0]
    assert (values[:20] == 1).all() and (values[24:] == 0).all()
    assert ((values[20:24] > 0) & (values[20:24] < 0.2)).all()


def test_learning_costs_what_training_does(checkpoint: Checkpoint) -> None:
    shape = checkpoint.shape
    assert scoring_flops(shape, shape, Sheared(), 1000, 16) == train_flops(shape, 1000, 16)
    assert scoring_flops(shape, shape, Sheared(rate=0.0), 1000, 16) == pytest.approx(
        train_flops(shape, 1000, 16) * 2 / 3
    )
    assert Sheared(steps=3200, windows=16).tokens(8192) == 419_430_400  # the paper's 0.42B


SIZES: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"ratio": 0.5}, {"layers": 5}),
    ({"ratio": 0.5, "axes": "layers,hidden,ffn,kv"}, {}),
    ({"shape": "layers=2"}, {"layers": 2, "hidden": 32, "ffn": 48}),
]


@pytest.mark.parametrize(("asked", "sizes"), SIZES)
def test_targets_may_be_of_every_axis(checkpoint: Checkpoint, asked: dict[str, Any], sizes: dict[str, int]) -> None:
    after = Target.parse(**asked).shape(checkpoint.shape, Sheared(), "sheared")
    assert after.non_embedding < checkpoint.shape.non_embedding
    assert {name: getattr(after, name) for name in sizes} == sizes
    if "ratio" in asked:
        assert 1 - after.non_embedding / checkpoint.shape.non_embedding == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"ratio": 0.5, "allocation": "global"}, "`allocation` global: sheared learns as many units in every layer"),
        ({"ratio": 0.5, "pattern": "2:4"}, "`pattern`"),
        ({}, r"`ratio`: how much should sheared remove\? Pass `ratio`, or `shape` layers=N,hidden=N,ffn=N,heads=N"),
    ],
)
def test_targets_that_do_not_suit_are_refused(checkpoint: Checkpoint, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Target.parse(**asked).shape(checkpoint.shape, Sheared(), "sheared")
