"""Depth methods against loops over plain models."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from formulas import NAMES, Subject, agrees, bypass, fits
from helpers import calibration, hf, logits, naive_loss, tiny_family, tiny_llama, windows
from secateur.errors import UserError
from secateur.methods.minitron_depth import MinitronDepth
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

DEPTH = ("shortgpt", "minitron-depth", "shortened-llama", "shortened-llama-ppl", "random-depth")


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("model"), request.param)


def plan_of(subject: Subject, method: str, gone: int = 2, **options: object) -> Plan:
    target = Target(sizes={"layers": subject.layers - gone})
    return make_plan(subject.checkpoint, method, target, calibration(subject.ids), options=options, batch=2)


def fits_layers(plan: Plan, scores: list[float]) -> None:
    assert len(plan.keep_layers) == plan.after.layers == plan.before.layers - 2
    fits(plan.keep_layers.tolist(), scores)


def test_shortgpt_against_the_formula(subject: Subject) -> None:
    plan, wanted = plan_of(subject, "shortgpt"), []
    for layer in range(subject.layers):
        before, after = (states.flatten(0, 1) for states in subject.seen[f"model.layers.{layer}"])
        cosines = [float(h @ g) / math.sqrt(float(h @ h) * float(g @ g)) for h, g in zip(before, after, strict=True)]
        wanted.append(1 - sum(cosines) / len(cosines))
    agrees(plan.scores["layers"], wanted)
    fits_layers(plan, wanted)
    assert [c["score"] for c in plan.summary["candidates"]] == plan.scores["layers"].tolist()


def test_minitron_depth_takes_the_run_that_costs_least(subject: Subject) -> None:
    plan = plan_of(subject, "minitron-depth")
    runs = [(first, first + 1) for first in range(subject.layers - 1)]
    losses = [naive_loss(bypass(subject.model(), run), subject.ids) for run in runs]
    assert [c["loss"] for c in plan.summary["candidates"]] == pytest.approx(losses, rel=1e-5)
    agrees(
        plan.scores["layers"], [loss - naive_loss(subject.dense, subject.ids) for loss in losses], spread=max(losses)
    )
    gone = tuple(sorted(set(range(subject.layers)) - set(plan.keep_layers.tolist())))
    assert losses[runs.index(gone)] <= min(losses) * (1 + 1e-5)


def test_shortened_llama_against_the_formula(subject: Subject) -> None:
    plan, (gradient, _) = plan_of(subject, "shortened-llama"), subject.gradients
    wanted = [0.0] * subject.layers
    for name, parameter in subject.dense.named_parameters():
        if ".layers." in name and name.endswith(".weight"):
            wanted[int(name.split(".")[2])] += float((gradient[name] * parameter.detach().double()).abs().sum())
    agrees(plan.scores["layers"], wanted)
    fits_layers(plan, wanted)


def test_shortened_llama_can_spare_the_first_and_the_last(tmp_path: Path) -> None:
    subject = Subject.make(tmp_path, "qwen3")
    scores = plan_of(subject, "shortened-llama").scores["layers"].tolist()
    plan = plan_of(subject, "shortened-llama", keep_first=1, keep_last=2)
    spared = [0, subject.layers - 2, subject.layers - 1]
    assert set(spared) <= set(plan.keep_layers.tolist())
    fits_layers(plan, [math.inf if n in spared else score for n, score in enumerate(scores)])
    assert [c["score"] is None for c in plan.summary["candidates"]] == [n in spared for n in range(subject.layers)]
    with pytest.raises(UserError, match=r"2 layers to remove, but all but 1 are spared"):
        plan_of(subject, "shortened-llama", keep_first=subject.layers - 1)


def test_shortened_llama_by_perplexity(subject: Subject) -> None:
    plan = plan_of(subject, "shortened-llama-ppl")
    losses = [naive_loss(bypass(subject.model(), [n]), subject.ids) for n in range(subject.layers)]
    agrees(plan.scores["layers"].log(), losses)
    fits_layers(plan, losses)


@pytest.mark.parametrize("method", ["minitron-depth", "random-depth"])
def test_cutting_equals_bypassing(subject: Subject, method: str, tmp_path: Path) -> None:
    plan = plan_of(subject, method)
    write_pruned(subject.checkpoint, plan, tmp_path)
    gone = set(range(subject.layers)) - set(plan.keep_layers.tolist())
    torch.testing.assert_close(
        logits(hf(tmp_path), subject.ids), logits(bypass(subject.model(), gone), subject.ids), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("method", [name for name in DEPTH if name != "minitron-depth"])
def test_the_layers_that_go_are_the_first_of_a_longer_list(method: str, tmp_path: Path) -> None:
    """Scores that do not depend on how many go make nested choices; runs need not be nested."""
    subject = Subject.make(tmp_path, "gemma3")
    kept = [set(plan_of(subject, method, gone).keep_layers.tolist()) for gone in range(1, subject.layers)]
    assert all(more > fewer for more, fewer in pairwise(kept))


@pytest.mark.parametrize(("ratio", "length"), [(0.2, 1), (0.4, 2), (0.6, 3)])
def test_runs_of_every_length(ratio: float, length: int, tmp_path: Path) -> None:
    best = set()
    for seed in range(3):
        directory, ids = tiny_llama(tmp_path, seed=seed), windows(3)
        plan = make_plan(Checkpoint(directory), "minitron-depth", Target(ratio=ratio), calibration(ids), batch=2)
        runs = [range(first, first + length) for first in range(5 - length + 1)]
        losses = [naive_loss(bypass(hf(directory), run), ids) for run in runs]
        best.add(min(range(len(runs)), key=lambda i: losses[i]))
        assert plan.keep_layers.tolist() == [i for i in range(5) if i not in runs[losses.index(min(losses))]]
        assert plan.summary["detail"].startswith(f"layer{'s' * (length > 1)} {losses.index(min(losses))}")
    assert len(best) > 1  # the choice is not always the same


def test_depth_score_is_the_loss_that_is_added_or_the_accuracy_that_is_lost() -> None:
    assert MinitronDepth().score(2.0, torch.tensor([2.5, 1.5])).tolist() == [0.5, -0.5]
    assert MinitronDepth(task="any").score(0.75, torch.tensor([0.5, 1.0])).tolist() == [0.25, -0.25]


def test_scattered_layers_are_named(tmp_path: Path) -> None:
    subject = Subject.make(tmp_path, "llama")
    details = {plan_of(subject, "random-depth", 3, seed=seed).summary["detail"] for seed in range(6)}
    assert any("," in detail for detail in details) and len(details) > 1


def test_a_blank_model_loses_its_first_layers(tmp_path: Path) -> None:
    """All scores are equal, so ties decide."""
    model = hf(directory := tiny_family(tmp_path, "llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if "layers" in name and "norm" not in name else 1.0)
    model.save_pretrained(directory)
    for method in DEPTH[:-1]:
        plan = make_plan(Checkpoint(directory), method, Target(ratio=0.4), calibration(windows()))
        assert plan.keep_layers.tolist() == [2, 3, 4], method
