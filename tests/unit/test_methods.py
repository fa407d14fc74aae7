from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import VARIANTS, calibration, hf, naive_loss, seen_at, tiny_llama, windows, without_layers
from secateur.calibrate.stats import AbsMeanByPosition, MeanSquare
from secateur.checkpoint import Checkpoint
from secateur.errors import UserError
from secateur.families import LLAMA
from secateur.methods import METHODS, get_method
from secateur.methods.minitron_depth import MinitronDepth
from secateur.methods.minitron_width import MinitronWidth
from secateur.methods.wanda import Wanda
from secateur.plan import Plan
from secateur.prune import make_plan
from secateur.select import keep_channels, keep_weights, lowest


def test_wanda_score_against_loops() -> None:
    weight, x = torch.randn(3, 4), torch.randn(2, 5, 4)
    statistic = MeanSquare()
    statistic.update(x)
    scores = Wanda().score(weight, {MeanSquare: statistic.value()})
    for i in range(3):
        for j in range(4):
            norm = sum(float(x[b, t, j]) ** 2 for b in range(2) for t in range(5)) ** 0.5
            assert float(scores[i, j]) * 10**0.5 == pytest.approx(abs(float(weight[i, j])) * norm, rel=1e-5)


def flaws(weight: Tensor, x: Tensor, keep: Tensor, prune: int) -> int:
    """Rows in which a pruned weight scores higher than a kept one, beyond rounding; the count must be exact."""
    norms = [sum(v * v for v in column) ** 0.5 for column in x.flatten(0, 1).T.double().tolist()]
    wrong = 0
    for row, kept in zip(weight.tolist(), keep.tolist(), strict=True):
        assert kept.count(False) == prune
        scores = [abs(w) * n for w, n in zip(row, norms, strict=True)]
        highest_gone = max(s for s, k in zip(scores, kept, strict=True) if not k)
        wrong += highest_gone > min(s for s, k in zip(scores, kept, strict=True) if k) * (1 + 1e-4)
    return wrong


@pytest.mark.parametrize("variant", ["plain", "biased", "wide_heads", "bf16"])
@pytest.mark.parametrize("ratio", [0.5, 0.33])
def test_wanda_prunes_block_after_block(variant: str, ratio: float, tmp_path: Path) -> None:
    directory, ids = tiny_llama(tmp_path, **VARIANTS[variant]), windows()
    plan = make_plan(Checkpoint(directory), "wanda", ratio, calibration(ids), batch=2)
    model, dense = hf(directory), hf(directory)
    assert len(plan.masks) == 5 * 7
    flawed_if_dense = 0
    for layer in range(5):
        inputs = {}
        for linear in LLAMA.linears:
            module = f"model.layers.{layer}.{linear.removesuffix('.weight')}"
            inputs[f"{module}.weight"] = seen_at(model, module, ids, output=False)[0]
            keep, (seen,) = plan.masks[f"{module}.weight"], seen_at(dense, module, ids, output=False)
            prune = int(Fraction(str(ratio)) * keep.shape[1])
            flawed_if_dense += flaws(model.get_parameter(f"{module}.weight"), seen, keep, prune)
        for name, x in inputs.items():  # all of a block's linears are scored before any of them is pruned
            weight, keep = model.get_parameter(name), plan.masks[name]
            assert flaws(weight, x, keep, int(Fraction(str(ratio)) * keep.shape[1])) == 0
            with torch.no_grad():
                weight.mul_(keep)
    assert flawed_if_dense > 20  # what later blocks see does depend on the pruned ones before
    assert plan.before == plan.after
    assert all(plan.summary["sparsity"][n] == pytest.approx(1 - float(m.float().mean())) for n, m in plan.masks.items())


@pytest.mark.parametrize("variant", ["plain", "tied", "biased", "bf16"])
def test_minitron_width_against_the_formula(variant: str, tmp_path: Path) -> None:
    directory, ids = tiny_llama(tmp_path, **VARIANTS[variant]), windows()
    plan = make_plan(Checkpoint(directory), "minitron-width", 0.4, calibration(ids), batch=2)
    model = hf(directory)

    def formula(x: Tensor) -> list[float]:
        x = x.double()
        return [
            sum((sum(abs(v) for v in x[:, t, c].tolist()) / x.shape[0]) ** 2 for t in range(x.shape[1]))
            for c in range(x.shape[2])
        ]

    hidden = [0.0] * 32
    for layer in range(5):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            scores = formula(seen_at(model, f"model.layers.{layer}.{norm}", ids, output=True)[0])
            hidden = [a + b for a, b in zip(hidden, scores, strict=True)]
        ffn = formula(seen_at(model, f"model.layers.{layer}.mlp.down_proj", ids, output=False)[0])
        assert plan.scores[f"ffn.{layer}"].tolist() == pytest.approx(ffn, rel=1e-4)
        best = sorted(range(48), key=lambda c: -ffn[c])[: plan.after.ffn]
        assert plan.keep_ffn[layer].tolist() == sorted(best)
    assert plan.scores["hidden"].tolist() == pytest.approx(hidden, rel=1e-4)
    best = sorted(range(32), key=lambda c: -hidden[c])[: plan.after.hidden]
    assert plan.keep_hidden.tolist() == sorted(best)
    share = sum(hidden[c] for c in best) / sum(hidden)
    assert plan.summary["importance_kept"]["hidden"] == pytest.approx(share, rel=1e-4)
    assert len(plan.scores) == 6 and plan.after.hidden < 32 and plan.after.ffn < 48


@pytest.mark.parametrize(("ratio", "length"), [(0.2, 1), (0.4, 2), (0.6, 3)])
def test_minitron_depth_takes_the_run_that_costs_least(ratio: float, length: int, tmp_path: Path) -> None:
    gone = set()
    for seed in range(4):
        directory, ids = tiny_llama(tmp_path, seed=seed), windows()
        plan = make_plan(Checkpoint(directory), "minitron-depth", ratio, calibration(ids), batch=2)
        runs = [range(first, first + length) for first in range(5 - length + 1)]
        losses = [naive_loss(without_layers(hf(directory), run), ids) for run in runs]
        best = min(range(len(runs)), key=lambda i: losses[i])
        assert plan.keep_layers.tolist() == [i for i in range(5) if i not in runs[best]]
        full = naive_loss(hf(directory), ids)
        assert plan.scores["layers"].tolist() == pytest.approx([loss - full for loss in losses], abs=1e-4)
        assert [c["loss"] for c in plan.summary["candidates"]] == pytest.approx(losses, rel=1e-5)
        assert plan.summary["detail"].startswith(f"layer{'s' * (length > 1)} {best}")
        gone.add(best)
    assert len(gone) > 1  # the choice is not always the same


def test_depth_score_is_the_loss_that_is_added() -> None:
    assert MinitronDepth().score(2.0, torch.tensor([2.5, 1.5])).tolist() == [0.5, -0.5]


def test_width_score_by_hand() -> None:
    sites = [{AbsMeanByPosition: torch.tensor([[1.0, 2.0], [3.0, 0.0]])}, {AbsMeanByPosition: torch.ones(2, 2)}]
    assert MinitronWidth().score("hidden", sites).tolist() == [1 + 9 + 2, 4 + 2]


def test_the_batch_is_execution_only(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    for method in METHODS:
        one, two = (
            make_plan(Checkpoint(directory), method, 0.4, calibration(windows()), batch=batch) for batch in (1, 4)
        )
        assert torch.equal(one.keep_layers, two.keep_layers) and torch.equal(one.keep_hidden, two.keep_hidden)
        for name, mask in one.masks.items():
            assert float((mask != two.masks[name]).float().mean()) < 0.01


def test_blank_models_are_pruned_from_the_lowest_index(tmp_path: Path) -> None:
    """All scores are equal, so ties decide."""
    directory = tiny_llama(tmp_path)
    model = hf(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if "layers" in name and "norm" not in name else 1.0)
    model.save_pretrained(directory)

    def plan(method: str) -> Plan:
        return make_plan(Checkpoint(directory), method, 0.4, calibration(windows()))

    assert plan("minitron-depth").keep_layers.tolist() == [2, 3, 4]
    width = plan("minitron-width")
    assert width.keep_hidden.tolist() == list(range(width.after.hidden))
    for mask in plan("wanda").masks.values():
        prune = int(0.4 * mask.shape[1])
        assert not mask[:, :prune].any() and mask[:, prune:].all()


ratios = st.integers(1, 99).map(lambda hundredths: hundredths / 100)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 120))
    values = draw(st.integers(1, 8))  # few different values make many ties
    return torch.randint(0, values, (rows, columns), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@pytest.mark.parametrize(("ratio", "columns", "pruned"), [(0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7), (0.5, 7, 3)])
def test_the_count_is_the_floor_of_the_decimal_ratio(ratio: float, columns: int, pruned: int) -> None:
    """In binary, 0.29 * 100 is 28.999999999999996."""
    assert int((~keep_weights(torch.zeros(2, columns), ratio, within="row")).sum()) == 2 * pruned


@settings(deadline=None, max_examples=150)
@given(matrices(), ratios, ratios)
def test_keep_weights(scores: Tensor, ratio: float, other: float) -> None:
    keep = keep_weights(scores.float(), ratio, within="row")
    columns = scores.shape[1]
    prune = int(Fraction(round(ratio * 100), 100) * columns)
    for row, kept in zip(scores.tolist(), keep.tolist(), strict=True):
        pruned = sorted(range(columns), key=lambda j: (row[j], j))[:prune]
        assert [j for j in range(columns) if not kept[j]] == sorted(pruned)
    fewer = keep_weights(scores.float(), max(ratio, other), within="row")
    more = keep_weights(scores.float(), min(ratio, other), within="row")
    assert not (fewer & ~more).any()
    whole = keep_weights(scores.float(), ratio, within="linear")
    assert int((~whole).sum()) == int(Fraction(round(ratio * 100), 100) * scores.numel())
    if prune and whole.any() and not whole.all():
        assert scores[~whole].max() <= scores[whole].min()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_keep_channels(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    kept = keep_channels(scores, count)
    assert kept.tolist() == sorted(sorted(range(len(values)), key=lambda c: (-values[c], c))[:count])
    assert kept.dtype == torch.int64
    assert set(keep_channels(scores, data.draw(st.integers(1, count))).tolist()) <= set(kept.tolist())
    assert lowest(scores) == values.index(min(values))


def test_unknown_methods() -> None:
    with pytest.raises(UserError, match="did you mean 'wanda'"):
        get_method("wnada")
    for name in METHODS:
        assert get_method(name).granularity in ("depth", "width", "sparse") and get_method(name).source


@pytest.mark.parametrize(
    ("method", "ratio", "part"), [("minitron-depth", 0.05, "possible: 0.2"), ("minitron-width", 0.001, "too small")]
)
def test_impossible_ratios_are_told_before_scoring(method: str, ratio: float, part: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    with pytest.raises(UserError, match=part):
        make_plan(checkpoint, method, ratio, calibration(windows()))
