"""RIA, ALPS and SLEB: against loops written from their formulas, and ALPS against SparseGPT on correlated inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formulas import Subject, bypass
from helpers import calibration, naive_loss
from secateur.calibration.statistics import Gram, MeanSquare
from secateur.errors import UserError
from secateur.methods.alps import ALPS
from secateur.methods.ria import RIA
from secateur.methods.selection import Selector
from secateur.methods.sparsegpt import SparseGPT
from secateur.model.plan import Plan
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("model"), request.param)


def plan_of(subject: Subject, method: str, target: Target, **options: Any) -> Plan:
    return make_plan(subject.checkpoint, method, target, calibration(subject.ids), options=options, batch=2)


def inputs(tokens: int, channels: int, seed: int) -> Tensor:
    """Inputs of which a few directions have most of the size, and a few channels too."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(channels // 8, channels, generator=generator)
    x = torch.randn(tokens, channels // 8, generator=generator) @ directions
    noise = 0.5 * torch.randn(tokens, channels, generator=generator)
    return (x + noise) * (0.2 + torch.rand(channels, generator=generator).square() * 5)


def weights(out: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def test_ria_score_against_loops() -> None:
    weight, x = weights(5, 8), inputs(40, 8, 1)
    weight[2] = 0  # a row without shares
    square = x.square().mean(dim=0)
    score = RIA(exponent=0.7).score(weight, {MeanSquare: square})
    for i in range(5):
        for j in range(8):
            size = abs(float(weight[i, j]))
            column = sum(abs(float(weight[k, j])) for k in range(5))
            row = sum(abs(float(weight[i, k])) for k in range(8))
            share = size / column + (size / row if row else 0.0)
            assert float(score[i, j]) == pytest.approx(share * float(square[j]) ** 0.35, rel=1e-5)


def test_ria_spares_a_column_of_small_weights_that_magnitude_empties() -> None:
    """What the shares are for: no channel is cut off, however small its weights."""
    weight = weights(16, 16)
    weight[:, 3] *= 0.01
    flat = {MeanSquare: torch.ones(16)}
    assert not Selector(0.5, "linear")(weight.abs())[:, 3].any()
    assert Selector(0.5, "linear")(RIA().score(weight, flat))[:, 3].any()


def _error(weight: Tensor, dense: Tensor, x: Tensor) -> float:
    return float((x @ (weight - dense).T).double().square().sum() / (x @ dense.T).double().square().sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("select", [Selector(0.5, "linear"), Selector(0.7, "linear"), Selector(0.5, "linear", 4)])
def test_alps_never_leaves_a_larger_error_than_sparsegpt(select: Selector, seed: int) -> None:
    dense, x = weights(48, 64, seed), inputs(400, 64, seed)
    stats = {Gram: x.T @ x / len(x)}
    sparse_gpt, _ = SparseGPT(block=16).prune(dense, SparseGPT().prepare(stats), select)
    weight, mask = ALPS().prune(dense, ALPS().prepare(stats), select)
    assert int(mask.sum()) == int(select(dense.abs()).sum()) and not weight[~mask].any()
    assert _error(weight, dense, x) < 0.8 * _error(sparse_gpt, dense, x)
    masked_only, _ = ALPS(steps=1, refinement=0).prune(dense, ALPS().prepare(stats), select)
    assert _error(weight, dense, x) < _error(masked_only, dense, x)


def test_alps_refinement_is_the_least_squares_fit_under_its_mask() -> None:
    dense, x = weights(6, 16), inputs(200, 16, 2)
    method = ALPS(refinement=60, damping=1e-4)
    gram = (x.T @ x / len(x)).double()
    weight, mask = method.prune(dense.double(), method.prepare({Gram: gram}), Selector(0.5, "linear"))
    damped = gram + 1e-4 * gram.diagonal().mean() * torch.eye(16)
    for row, keep, fit in zip(dense.double(), mask, weight, strict=True):
        exact = torch.linalg.solve(damped[keep][:, keep], (damped @ row)[keep])
        torch.testing.assert_close(fit[keep], exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gram", [torch.zeros(8, 8), torch.diag(torch.tensor([1e-12, 1.0, 1e12, *[1.0] * 5]))])
def test_alps_on_inputs_without_size_or_of_extreme_sizes(gram: Tensor) -> None:
    weight, mask = ALPS().prune(weights(4, 8), ALPS().prepare({Gram: gram}), Selector(0.5, "linear"))
    assert torch.isfinite(weight).all() and int(mask.sum()) == 16


def test_alps_leaves_an_earlier_mask_empty() -> None:
    dense, x = weights(8, 16), inputs(100, 16, 0)
    earlier = weights(8, 16, 9) > 0.8
    select = Selector(0.5, "linear", mask=earlier)
    weight, mask = ALPS().prune(dense * earlier, ALPS().prepare({Gram: x.T @ x / 100}), select)
    assert not (mask & ~earlier).any() and not weight[~earlier].any()


def test_sleb_removes_layer_after_layer_as_a_loop_does(subject: Subject) -> None:
    plan = plan_of(subject, "sleb", Target(sizes={"layers": subject.layers - 2}))
    removed: list[int] = []
    for turn in plan.summary["rounds"]:
        free = [n for n in range(1, subject.layers - 1) if n not in removed]
        losses = [naive_loss(bypass(subject.model(), [*removed, n]), subject.ids) for n in free]
        assert [c["first"] for c in turn["candidates"]] == free
        assert [c["loss"] for c in turn["candidates"]] == pytest.approx(losses, rel=1e-5)
        removed.append(free[losses.index(min(losses))])
        assert turn["removed"] == removed[-1]
    assert sorted({*range(subject.layers)} - set(removed)) == plan.keep_layers.tolist()


def test_sleb_resumes_within_its_rounds(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.calibration import layer_removal
    from secateur.calibration.journal import Workspace

    target = Target(sizes={"layers": subject.layers - 2})
    whole = plan_of(subject, "sleb", target)
    measure, calls = layer_removal._removal_losses, []

    def stop_in_the_second_round(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(layer_removal, "_removal_losses", stop_in_the_second_round)
    arguments = (subject.checkpoint, "sleb", target, calibration(subject.ids))
    with pytest.raises(KeyboardInterrupt):
        make_plan(*arguments, batch=2, workspace=Workspace(tmp_path))
    plan = make_plan(*arguments, batch=2, workspace=Workspace(tmp_path))
    assert len(calls) == 3  # the first round was in the journal
    assert plan.keep_layers.tolist() == whole.keep_layers.tolist() and plan.summary == whole.summary


def test_sleb_spares_the_ends_or_what_its_options_say(subject: Subject) -> None:
    few = Target(sizes={"layers": 1})
    with pytest.raises(UserError, match=r"layers to remove, but too few may go: 2 layers stay"):
        plan_of(subject, "sleb", few)
    assert len(plan_of(subject, "sleb", few, keep_first=0).keep_layers) == 1
