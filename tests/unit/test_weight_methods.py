"""Methods that zero single weights against loops, and SparseGPT against brain surgery column by column."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formulas import NAMES, Subject, capture, follow, linears, naive_obs, pruned
from helpers import calibration, hf, tiny_family, windows
from secateur.calibration.statistics import Gram, MeanSquare
from secateur.errors import UserError
from secateur.methods.selection import Selector
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.pattern import Pattern
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

HALF, THIRD, TWO_FOUR, FOUR_EIGHT = (
    Target(ratio=0.5), Target(ratio=0.33), Target(pattern=Pattern(2, 4)), Target(pattern=Pattern(4, 8)),
)  # fmt: skip
TARGETS = pytest.mark.parametrize("target", [THIRD, TWO_FOUR], ids=["0.33", "2:4"])


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("model"), request.param, layers=3)


def plan_of(subject: Subject, method: str, target: Target, **options: Any) -> Plan:
    return make_plan(subject.checkpoint, method, target, calibration(subject.ids), options=options, batch=2)


def share(target: Target) -> Fraction:
    return 1 - Fraction(target.pattern.keep, target.pattern.group) if target.pattern else Fraction(str(target.ratio))


def groups(values: Tensor, target: Target, within: str) -> Tensor:
    """What competes: [groups, members]."""
    if target.pattern:
        return values.reshape(-1, target.pattern.group)
    return values if within == "row" else values.reshape(1, -1)


def fits_mask(scores: Tensor, keep: Tensor, target: Target, within: str, tolerance: float = 1e-5) -> int:
    """The exact count goes from each group. Returns how many groups lost one that scores higher than one that stays."""
    wrong = 0
    for values, kept in zip(
        groups(scores, target, within).tolist(), groups(keep, target, within).tolist(), strict=True
    ):
        gone = [v for v, k in zip(values, kept, strict=True) if not k]
        stay = [v for v, k in zip(values, kept, strict=True) if k]
        assert len(gone) == math.floor(share(target) * len(values))
        wrong += bool(gone and stay) and max(gone) > min(stay) * (1 + tolerance)
    return wrong


def wanda_scores(weight: Tensor, x: Tensor) -> Tensor:
    norms = [math.sqrt(sum(v * v for v in column)) for column in x.flatten(0, -2).T.tolist()]
    return torch.tensor([[abs(w) * n for w, n in zip(row, norms, strict=True)] for row in weight.tolist()]).double()


@TARGETS
def test_wanda_prunes_block_after_block(subject: Subject, target: Target) -> None:
    plan, model = plan_of(subject, "wanda", target), subject.model()
    misled = 0
    for layer in range(subject.layers):
        seen = capture(model, subject.ids)  # all of a block's linears are scored before any of them is pruned
        for name, linear in linears(model, layer).items():
            keep = plan.masks[f"{name}.weight"]
            assert fits_mask(wanda_scores(linear.weight, seen[name][0]), keep, target, "row") == 0
            misled += fits_mask(wanda_scores(linear.weight, subject.seen[name][0]), keep, target, "row")
            with torch.no_grad():
                linear.weight.mul_(keep)
    assert misled > 10  # what later blocks see does depend on the pruned ones before
    assert plan.before == plan.after and len(plan.masks) == sum(len(linears(model, n)) for n in range(subject.layers))
    assert all(plan.summary["sparsity"][n] == pytest.approx(1 - float(m.float().mean())) for n, m in plan.masks.items())


@TARGETS
def test_magnitude_within_each_linear(subject: Subject, target: Target) -> None:
    plan = make_plan(subject.checkpoint, "magnitude", target, None)
    for name, keep in plan.masks.items():
        assert fits_mask(subject.dense.get_parameter(name).detach().abs().double(), keep, target, "linear", 0) == 0
    assert plan.calibration["source"] is None and not plan.weights


@TARGETS
def test_sparsegpt_against_brain_surgery(subject: Subject, target: Target) -> None:
    """Block 16, so that a row has several blocks."""
    plan, model = plan_of(subject, "sparsegpt", target, block=16), subject.model()
    span = target.pattern.group if target.pattern else 16
    for layer in range(subject.layers):
        seen = capture(model, subject.ids)
        for name, linear in linears(model, layer).items():
            mask_of = follow(
                plan.masks[f"{name}.weight"], float(share(target)), target.pattern and target.pattern.group
            )
            wanted = naive_obs(linear.weight.detach(), seen[name][0].flatten(0, 1), mask_of, span)
            found = plan.weights[f"{name}.weight"]
            bf16 = found.dtype == torch.bfloat16
            torch.testing.assert_close(found.double(), wanted, rtol=2**-8 if bf16 else 1e-4, atol=3e-5)
            assert found.dtype == subject.checkpoint.tensor(f"{name}.weight").dtype
            assert not found[~plan.masks[f"{name}.weight"]].any()
            with torch.no_grad():
                linear.weight.copy_(found.float())  # as it is stored, and as what is behind sees it


def correlated(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions have most of the size, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, channels // 8, generator=generator) @ torch.randn(
        channels // 8, channels, generator=generator
    )
    return few + 0.5 * torch.randn(tokens, channels, generator=generator)


def gram(x: Tensor) -> dict[type, Tensor]:
    statistic, square = Gram(), MeanSquare()
    for batch in x[None].split(100, dim=1):
        statistic.update(batch)
        square.update(batch)
    return {Gram: statistic.value(), MeanSquare: square.value()}


SELECTORS = {
    "0.5": Selector(0.5, "linear"),
    "0.33": Selector(0.33, "linear"),
    "2:4": Selector(0.5, "linear", 4),
    "3:5": Selector(0.4, "linear", 5),
}


@pytest.mark.parametrize("pattern", SELECTORS)
@pytest.mark.parametrize("tokens", [900, 200])  # fewer tokens than channels: the Hessian is singular without damping
def test_sparsegpt_on_wide_matrices(pattern: str, tokens: int) -> None:
    """More than two blocks of 128 columns, the last of them shorter."""
    select, x = SELECTORS[pattern], correlated(tokens, 300)
    x[:, [7, 130, 299]] = 0
    weight = torch.randn(6, 300)
    found, keep = pruned(SparseGPT(), weight, gram(x), select)
    # 125 is the largest multiple of 5 in a block; within it, a mask is chosen for each 5 columns.
    mask_of = follow(keep, select.sparsity, select.span)
    wanted = naive_obs(weight, x, mask_of, select.span or 128)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-4)
    assert not found[:, [7, 130, 299]].any()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_sparsegpt_leaves_a_smaller_error_than_wanda(pattern: str) -> None:
    for seed in range(5):
        x = correlated(600, 256, seed)
        weight, stats = torch.randn(32, 256), gram(x)
        updated, keep = pruned(SparseGPT(), weight, stats, SELECTORS[pattern])
        zeroed, _ = pruned(Wanda(), weight, stats, Selector(0.5, "row", SELECTORS[pattern].span))
        error = [float((x @ (weight - w).T).square().sum()) for w in (updated, zeroed)]
        assert error[0] < 0.6 * error[1]
        assert float((updated[keep] - weight[keep]).abs().mean()) > 0.01  # what stays makes up for what goes


def test_sparsegpt_score_is_that_of_its_first_step() -> None:
    x, weight = correlated(200, 12), torch.randn(3, 12)
    hessian = 2 * x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    ranks = [(weight.double()[:, k] ** 2 / torch.linalg.inv(hessian[k:, k:])[0, 0]) for k in range(12)]
    method = SparseGPT()
    scores = method.score(weight, method.prepare(gram(x))).double()
    factor = scores / torch.stack(ranks, dim=1)
    torch.testing.assert_close(factor, factor.mean().expand_as(factor), rtol=1e-4, atol=0)


@pytest.mark.parametrize("pattern", SELECTORS)
def test_linears_that_share_an_input_are_pruned_each_for_itself(pattern: str) -> None:
    """Blocks of 16 columns; nothing that the method is shown, and may show again, is changed."""
    x, method, select = correlated(400, 60), SparseGPT(block=16), SELECTORS[pattern]
    stats, weights = gram(x), [torch.randn(rows, 60) for rows in (3, 7, 5)]
    kept_stats, kept_weights = stats[Gram].clone(), [weight.clone() for weight in weights]
    shared = method.prepare(stats)
    for weight in weights:
        for found, wanted in zip(
            method.prune(weight, shared, select), pruned(method, weight, stats, select), strict=True
        ):
            assert torch.equal(found, wanted)
    assert torch.equal(stats[Gram], kept_stats)
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights, kept_weights, strict=True))


@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2"])
def test_the_hessian_is_factored_once_for_each_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, sizes = Checkpoint(tiny_family(tmp_path, name, num_hidden_layers=2)), []
    factor = SparseGPT._factor
    monkeypatch.setattr(SparseGPT, "_factor", lambda self, gram: (sizes.append(len(gram)), factor(self, gram))[1])
    plan = make_plan(checkpoint, "sparsegpt", HALF, calibration(windows()))
    assert len(sizes) == 2 * 4 and len(plan.masks) == 2 * len(checkpoint.shape.linears())


def extremes() -> dict[str, Tensor]:
    usual = correlated(300, 160)
    repeated, spread = usual.clone(), usual.clone()
    repeated[:, 1::2] = repeated[:, ::2]
    spread[:, :80] *= 1e6
    spread[:, 80:] *= 1e-6
    dead = usual.clone()
    dead[:, ::3] = 0
    return {
        "dead": dead,
        "repeated": repeated,
        "all the same": usual[:, :1].expand(-1, 160).clone(),
        "zero": torch.zeros(300, 160),
        "one token": usual[:1],
        "spread": spread,
        "huge": usual * 1e15,
        "tiny": usual * 1e-18,
        "one input lives": torch.nn.functional.pad(usual[:, :1], (0, 159)),
    }


@pytest.mark.parametrize("name", extremes())
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_sparsegpt_on_extreme_inputs(name: str, pattern: str, damping: float) -> None:
    x, weight = extremes()[name], torch.randn(4, 160)
    found, keep = pruned(SparseGPT(damping=damping), weight, gram(x), SELECTORS[pattern])
    assert torch.isfinite(found).all() and not found[~keep].any()
    assert not found[:, (x == 0).all(dim=0)].any()
    assert int((~keep[:, :128]).sum()) == 256 and int((~keep[:, 128:]).sum()) == 64
    assert pattern != "2:4" or (keep.reshape(-1, 4).sum(dim=1) == 2).all()


def test_sparsegpt_does_not_mind_the_size_of_its_inputs() -> None:
    x, weight = correlated(300, 160), torch.randn(4, 160)
    usual, keep = pruned(SparseGPT(), weight, gram(x), SELECTORS["0.5"])
    for factor in (2.0**40, 2.0**-40):
        other, mask = pruned(SparseGPT(), weight, gram(x * factor), SELECTORS["0.5"])
        assert torch.equal(other, usual) and torch.equal(mask, keep)


def test_sparsegpt_gives_up_where_damping_cannot_help() -> None:
    weight = torch.randn(4, 160)
    with pytest.raises(UserError, match=r"^`options`: damping=1e-30 cannot invert"):
        pruned(SparseGPT(damping=1e-30), weight, gram(extremes()["repeated"]), SELECTORS["0.5"])
    with pytest.raises(UserError, match="`damping`: should be greater than 0"):
        SparseGPT(damping=0.0)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError):
            pruned(SparseGPT(), weight, {Gram: torch.full((160, 160), bad)}, SELECTORS["0.5"])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_activations_whose_squares_overflow_are_told(method: str, tmp_path: Path) -> None:
    model = hf(directory := tiny_family(tmp_path, "llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1e20)
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-20)
    model.save_pretrained(directory)
    with pytest.raises(UserError, match=r"the input of model\.layers\.2\.mlp\.down_proj\.weight is too large"):
        make_plan(Checkpoint(directory), method, HALF, calibration(windows()))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "random-weight"])
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (3, 5), (1, 2), (4, 4), (5, 5)])
def test_patterns_hold_in_what_is_written(method: str, kept: int, of: int, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 80,
    }
    checkpoint = Checkpoint(tiny_family(tmp_path, "llama", num_hidden_layers=1, **sizes))
    plan = make_plan(checkpoint, method, Target(pattern=Pattern(kept, of)), calibration(windows()))
    (tmp_path / "out").mkdir()
    write_pruned(checkpoint, plan, tmp_path / "out")
    before, after = hf(checkpoint.directory), hf(tmp_path / "out")
    for name, linear in linears(after, 0).items():
        assert ((linear.weight.reshape(-1, of) != 0).sum(dim=1) == kept).all()
        if kept == of:  # all stay, to the bit
            assert torch.equal(linear.weight, before.get_submodule(name).weight)
    assert plan.summary["detail"].endswith(f"pattern {kept}:{of}")


def test_rows_that_a_pattern_does_not_divide(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_family(tmp_path, "llama"))
    with pytest.raises(UserError, match=r"48 weights, not a multiple of 5"):
        make_plan(checkpoint, "magnitude", Target(pattern=Pattern(3, 5)), None)


def test_wanda_score_against_loops() -> None:
    weight, x = torch.randn(3, 4), torch.randn(2, 5, 4)
    statistic = MeanSquare()
    statistic.update(x)
    scores = Wanda().score(weight, {MeanSquare: statistic.value()}).double() * 10**0.5
    torch.testing.assert_close(scores, wanda_scores(weight, x), rtol=1e-5, atol=0)
