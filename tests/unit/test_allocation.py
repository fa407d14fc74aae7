"""Allocations of zeros against naive formulas, planted layers, exact totals, and a search beside random search."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import calibration, hf, killed_behind, tiny_llama, windows
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.journal import Workspace
from secateur.cli import main
from secateur.errors import UserError
from secateur.methods.selection import Selector
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.allocation.alpha import alpha_ratios, hill_exponent
from secateur.pruning.allocation.counts import ratios_for_total, round_to_total
from secateur.pruning.allocation.evolve import EvolveSettings, child_of, evolve_levels
from secateur.pruning.allocation.owl import outlier_share, owl_ratios
from secateur.pruning.allocation.spliced import SplicedModels
from secateur.pruning.allocation.threshold import score_histogram, zeros_below_threshold
from secateur.pruning.cost import allocation_flops
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

IDS = windows(8, 16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=3))


def plan_of(checkpoint: Checkpoint, method: str, allocation: str, ratio: float = 0.5, **options: Any) -> Plan:
    target = Target.parse(ratio=ratio, allocation=allocation)  # type: ignore[arg-type]
    return make_plan(checkpoint, method, target, calibration(IDS), **options)


def layer_ratios(plan: Plan) -> list[float]:
    return plan.summary["allocation"]["ratios"]


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("wanda", name) for name in ("owl", "alpha", "global")]
    + [("sparsegpt", "owl"), ("sparsegpt", "alpha"), ("magnitude", "alpha"), ("magnitude", "global")],
)
def test_the_total_is_that_of_uniform_and_layers_differ(checkpoint: Checkpoint, method: str, allocation: str) -> None:
    plan, uniform = (plan_of(checkpoint, method, name, 0.37) for name in (allocation, "uniform"))
    assert plan.zeroed == uniform.zeroed == sum(int((~mask).sum()) for mask in plan.masks.values())
    assert len(set(layer_ratios(plan))) > 1
    assert "allocation" not in uniform.summary


def test_a_layer_with_outliers_loses_less_by_owl(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = hf(checkpoint.directory)
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight[::7, ::5] *= 40
    model.save_pretrained(tmp_path / "planted")
    plan = plan_of(Checkpoint(tmp_path / "planted"), "wanda", "owl")
    ratios = layer_ratios(plan)
    assert ratios[1] == min(ratios) and max(ratios) - min(ratios) == pytest.approx(0.16, abs=0.01)
    write_pruned(Checkpoint(tmp_path / "planted"), plan, tmp_path)
    assert "- allocation: owl; zeros by layer, in percent: " in (tmp_path / "README.md").read_text()


def test_heavy_tailed_weights_lose_less_by_alpha(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = hf(checkpoint.directory)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers.2." in name and weight.dim() == 2:
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_(u @ torch.diag(s.max() / torch.arange(1, len(s) + 1) ** 1.5) @ v)
    model.save_pretrained(tmp_path / "planted")
    ratios = layer_ratios(plan_of(Checkpoint(tmp_path / "planted"), "wanda", "alpha"))
    assert ratios[2] == min(ratios)
    assert max(ratios) / min(ratios) == pytest.approx(1.3 / 0.7, rel=0.02)


def test_owl_is_its_formula() -> None:
    torch.manual_seed(0)
    parts = [torch.rand(4, 6) ** 8, torch.rand(3, 5)]
    values = [v for part in parts for v in part.flatten().tolist()]
    mean = sum(values) / len(values)
    assert outlier_share(parts) == pytest.approx(100 * sum(v > 5 * mean for v in values) / len(values))
    outliers = [1.0, 4.0, 2.0]
    scaled = [0.0, 0.16, 0.16 / 3]
    densities = [s - sum(scaled) / 3 + 1 - 0.7 for s in scaled]
    assert owl_ratios(outliers, 0.7) == pytest.approx([1 - d for d in densities])
    assert owl_ratios([2.0, 2.0], 0.6) == [0.6, 0.6]


def test_alpha_is_its_formula() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 6)
    eigenvalues = sorted(torch.linalg.eigvalsh((weight.T @ weight).double()).tolist())
    tail = eigenvalues[3:]
    assert hill_exponent(weight) == pytest.approx(1 + 3 / sum(math.log(e / tail[0]) for e in tail), rel=1e-4)
    assert alpha_ratios([2.0, 4.0, 3.0]) == pytest.approx([0.7, 1.3, 1.0])
    fitted, clipped = ratios_for_total([0.7, 1.3, 1.0], [100, 200, 100], 280, "factor")
    factor = 0.7 / ((0.7 * 100 + 1.3 * 200 + 1.0 * 100) / 400)
    assert fitted == pytest.approx([0.7 * factor, 1.3 * factor, factor]) and not clipped
    fitted, clipped = ratios_for_total([0.7, 1.3, 1.0], [100, 200, 100], 360, "factor")
    assert clipped == 1 and fitted[1] == 0.99 and 100 * fitted[0] + 198 + 100 * fitted[2] == pytest.approx(360)


def test_global_is_one_threshold() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(20, 30), "b": 3 * torch.rand(10, 40), "c": torch.zeros(5, 4)}
    every = torch.cat([s.flatten() for s in scores.values()]).sort().values
    zeros = zeros_below_threshold({name: score_histogram(s) for name, s in scores.items()}, 500)
    assert sum(zeros.values()) == 500 and zeros["c"] == 20
    assert all(abs(zeros[n] - int((s <= every[499]).sum())) <= 4 for n, s in scores.items())
    assert round_to_total({"x": 1.5, "y": 1.5, "z": 2.0}, {"x": 3, "y": 3, "z": 2}, 5) == {"x": 2, "y": 1, "z": 2}


@pytest.mark.parametrize("within", ["row", "linear"])
def test_a_selector_prunes_a_number_of_weights(within: str) -> None:
    torch.manual_seed(0)
    scores = torch.rand(7, 10)
    keep = Selector(0, within, zeros=24, width=10)(scores)
    assert int((~keep).sum()) == 24
    if within == "row":
        assert (~keep).sum(dim=1).tolist() == [4, 4, 4, 3, 3, 3, 3]
    blocks = [Selector(0, within, zeros=24, width=10)(scores[:, a : a + 4], slice(a, a + 4)) for a in (0, 4, 8)]
    assert sum(int((~block).sum()) for block in blocks) == 24


def divergence(dense: Tensor, spliced: Tensor) -> float:
    p, q = dense[:, :-1].log_softmax(-1), spliced[:, :-1].log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_spliced_model_diverges_as_hugging_face_says(checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    names = [n for n, p in hf(checkpoint.directory).named_parameters() if ".layers." in n and p.dim() == 2]
    model = hf(checkpoint.directory)
    levels = {f"level.{n}.{k}": torch.rand(model.get_parameter(n).shape) > 0.2 * k for n in names for k in (0, 1)}
    models = SplicedModels(BlockWalk(checkpoint, IDS, batch=3), levels, False, names)
    candidates = [[0] * len(names), [1] * len(names), [i % 2 for i in range(len(names))]]
    divergences = models.divergences(candidates, [1, 2, 5, 7])
    for candidate, value in zip(candidates, divergences, strict=True):
        spliced = hf(checkpoint.directory)
        with torch.no_grad():
            for name, level in zip(names, candidate, strict=True):
                spliced.get_parameter(name).mul_(levels[f"level.{name}.{level}"])
            logits = [m(IDS[[1, 2, 5, 7]]).logits for m in (model, spliced)]
        assert value == pytest.approx(divergence(*logits), rel=1e-4)


def test_evolution_beats_random_search_at_equal_evaluations_on_other_data() -> None:
    """Windows are noisy quadratics in the levels, about an optimum that is far from uniform."""
    count = 12
    optimum = [(-1) ** i * (1 + i % 4) for i in range(count)]
    low, high = (-6,) * count, (6,) * count

    def loss(levels: tuple[int, ...], window: int) -> float:
        noise = random.Random(window)
        return sum(
            (1 + noise.random()) * (a - b - noise.gauss(0, 0.3)) ** 2 for a, b in zip(levels, optimum, strict=True)
        )

    used = 0

    def fitness(candidates: Any, numbers: Any) -> list[float]:
        nonlocal used
        used += len(candidates) * len(numbers)
        return [sum(loss(c, w) for w in numbers) / len(numbers) for c in candidates]

    settings = EvolveSettings()
    best = evolve_levels(low, high, 16, fitness, settings, lambda: None)
    assert sum(best) == 0 and used == settings.evaluations(16)
    rng, budget, guess = random.Random(1), used, []
    for _ in range(budget // 16):
        child: tuple[int, ...] = (0,) * count
        for _ in range(12):
            child = child_of(child, low, high, rng)
        guess.append((sum(loss(child, w) for w in range(16)), child))
    unseen = range(1000, 1064)
    searched, drawn = (sum(loss(levels, w) for w in unseen) for levels in (best, min(guess)[1]))
    assert searched < 0.7 * drawn < sum(loss((0,) * count, w) for w in unseen)


def test_evolve_lowers_the_divergence_and_resumes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = EvolveSettings(generations=6, offspring=6, survivors=2, first=4, last=1)
    monkeypatch.setattr("secateur.pruning.allocation.allocate.EvolveSettings", lambda: small)
    plan, uniform = (plan_of(checkpoint, "wanda", name, 0.5) for name in ("evolve", "uniform"))
    assert plan.zeroed == uniform.zeroed
    assert len(set(plan.summary["sparsity"].values())) > 1
    with killed_behind(monkeypatch, 1), pytest.raises(KeyboardInterrupt):
        plan_of(checkpoint, "wanda", "evolve", workspace=Workspace(tmp_path))
    again = plan_of(checkpoint, "wanda", "evolve", workspace=Workspace(tmp_path))
    assert all(torch.equal(mask, again.masks[name]) for name, mask in plan.masks.items())


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("wanda", {"pattern": "2:4", "allocation": "owl"}, "`allocation` owl: `pattern` 2:4 fixes the zeros of every"),
        ("sparsegpt", {"ratio": 0.5, "allocation": "global"}, "sparsegpt changes the weights that stay; use owl"),
        ("random-weight", {"ratio": 0.5, "allocation": "global"}, "random-weight draws its scores"),
        (
            "magnitude",
            {"ratio": 0.5, "allocation": "evolve"},
            "evolve: reads text, and magnitude reads none",
        ),
        ("flap", {"ratio": 0.5, "allocation": "owl"}, "`allocation` owl: goes with sparse methods, and flap is none"),
        ("shortgpt", {"ratio": 0.5, "allocation": "alpha"}, "`allocation` alpha: goes with sparse methods"),
    ],
)
def test_allocations_that_do_not_suit_are_refused(method: str, fields: dict[str, Any], message: str) -> None:
    from secateur.methods.registry import get_method

    with pytest.raises(UserError) as caught:
        Target.parse(**fields).check(get_method(method), method)
    assert message in str(caught.value) and caught.value.field == "allocation"


def test_identity_and_cost_name_the_allocation(checkpoint: Checkpoint) -> None:
    from secateur.methods.registry import get_method

    assert Target(ratio=0.5).as_dict()["allocation"] == "uniform"
    target = Target(ratio=0.5, allocation="evolve")
    assert Target.from_dict(target.as_dict()) == target
    shape, wanda = checkpoint.shape, get_method("wanda")
    once = 128 * shape.forward_flops(16)
    assert [allocation_flops(shape, wanda, 128, 16, a) / once for a in ("uniform", "alpha", "owl")] == [0, 0, 1]
    assert allocation_flops(shape, wanda, 128, 16, "evolve") == once * (2 + EvolveSettings().evaluations(8) / 8)


def test_ratios_by_layer(tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    def prune(ratios: str, *more: str) -> int:
        (tmp_path / "ratios.json").write_text(ratios)
        line = [str(checkpoint.directory), str(tmp_path / "out"), "--method", "magnitude"]
        return main(["prune", *line, "--ratios-by-layer", str(tmp_path / "ratios.json"), *more])

    for ratios, more, message in (
        ("[0.2, 0.5]", (), "--ratios-by-layer: has 2 ratios, and the model has 3 layers"),
        ("[0.2, 0.5, 1.5]", (), "--ratios-by-layer: 1.5 is not a share"),
        ("{a: 1}", (), "--ratios-by-layer: should be a list with a share for each layer"),
        ("[0.2, 0.5, 0.6]", ("--ratio", "0.5"), "--ratios-by-layer and --ratio both say how much to remove"),
        ("[0.2, 0.5, 0.6]", ("--allocation", "alpha"), "--ratios-by-layer allocates the zeros"),
    ):
        assert prune(ratios, *more) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert prune("[0.0, 0.25, 0.6]") == 0
    model = hf(tmp_path / "out")
    for layer, ratio in enumerate((0.0, 0.25, 0.6)):
        zeros = [
            float((parameter == 0).float().mean())
            for name, parameter in model.named_parameters()
            if f"layers.{layer}." in name and parameter.dim() == 2
        ]
        assert zeros == pytest.approx([ratio] * 7, abs=0.01)
    assert Target.from_dict(Target(layer_ratios=(0.1, 0.2)).as_dict()).layer_ratios == (0.1, 0.2)
