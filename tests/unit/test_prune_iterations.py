"""Pruning in several steps with one command: against prunings by hand, after a kill, with recovery, with bad inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur
from expert_models import tiny_mixture
from helpers import calibration, files, hf, tiny_llama, windows
from secateur.calibration.journal import Journal
from secateur.cli import main
from secateur.errors import UserError
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.cut import CutCheckpoint
from secateur.model.live import cut_model
from secateur.model.plan import Plan, load_masks
from secateur.pruning.block_reconstruction import reconstruct
from secateur.pruning.cost import reconstruction_flops, scoring_flops
from secateur.pruning.iterations import pruning_steps
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.reconstruction import Reconstruction
from secateur.pruning.target import Target

IDS = windows(8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.startswith("model") or name == "config.json"}


def test_two_steps_are_two_prunings_by_hand(model: Path, tmp_path: Path) -> None:
    common: Any = {"method": "sparsegpt", "calibration": IDS}  # which updates weights, so each step sees new ones
    secateur.prune(model, tmp_path / "half", ratio=0.3, **common)
    by_hand = secateur.prune(tmp_path / "half", tmp_path / "hand", ratio=0.6, **common)
    steps = secateur.prune(model, tmp_path / "steps", ratio=0.6, iterations=2, **common)
    once = secateur.prune(model, tmp_path / "once", ratio=0.6, **common)
    assert weights(tmp_path / "steps") == weights(tmp_path / "hand") != weights(tmp_path / "once")
    assert steps.plan.zeroed == by_hand.plan.zeroed == once.plan.zeroed
    assert not (tmp_path / "steps.partial").exists()


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("minitron-width", {"ratio": 0.5}),
        ("minitron-width", {"shape": "hidden=16,ffn=40"}),
        ("shortgpt", {"ratio": 0.5}),
        ("flap", {"ratio": 0.5}),
    ],
)
def test_the_shape_is_that_of_one_step_and_the_plan_cuts_the_first_model(
    method: str, target: Any, tmp_path: Path
) -> None:
    biases: Any = {"attention_bias": True, "mlp_bias": True}
    model = tiny_llama(tmp_path, num_hidden_layers=4, hidden_size=32, intermediate_size=96, **biases)
    common: Any = {"method": method, "calibration": IDS, **target}
    once = secateur.prune(model, tmp_path / "once", **common)
    steps = secateur.prune(model, tmp_path / "steps", iterations=2, **common)
    assert steps.shape == once.shape and steps.removed == once.removed
    expected, result = cut_model(Checkpoint(model), steps.plan).state_dict(), hf(tmp_path / "steps").state_dict()
    assert expected.keys() == result.keys()
    for name, weight in expected.items():  # no method here changes a kept weight but for biases
        torch.testing.assert_close(result[name], weight, rtol=1e-6, atol=1e-7, msg=name)
    selection = Plan.load_selection(tmp_path / "steps", once.plan.before, once.shape)
    again = cut_model(Checkpoint(model), selection).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in expected.items())


def test_experts_in_steps(tmp_path: Path) -> None:
    mixture = tiny_mixture(tmp_path, "mixtral")
    for method, target in (
        ("random-expert", {"shape": "experts=2"}),
        ("minitron-width", {"ratio": 0.7, "axes": "expert_ffn"}),
    ):
        fields: dict[str, Any] = {"method": method, "calibration": windows(4), **target}
        steps = secateur.prune(mixture, tmp_path / method, iterations=2, **fields)
        at_once = tmp_path / f"{method}-at-once"
        at_once.mkdir()
        write_pruned(Checkpoint(mixture), steps.plan, at_once)
        assert weights(tmp_path / method) == weights(at_once)
        assert steps.shape == secateur.prune(mixture, tmp_path / f"{method}-once", **fields).shape


@pytest.mark.parametrize(("method", "target"), [("wanda", {"pattern": "2:4"}), ("minitron-width", {"ratio": 0.5})])
def test_recovery_between_steps_goes_on_in_the_windows_towards_the_first_model(
    method: str, target: Any, model: Path, tmp_path: Path
) -> None:
    out = secateur.prune(
        model, tmp_path / "out", method=method, calibration=IDS, iterations=2, reconstruct=5, batch=2, **target
    )
    dense, prototype = Checkpoint(model), get_method(method)
    parts = pruning_steps(Target.parse(**target), prototype, method, dense.shape, 2)
    checkpoint: Any = dense
    channels, skip, flops, saved = torch.arange(dense.shape.hidden), 0, [], tmp_path
    for part, count in zip(parts, (2, 3), strict=True):
        plan = make_plan(checkpoint, method, part.target, calibration(IDS), batch=2)
        channels = channels[plan.keep_hidden]
        pruned = CutCheckpoint(checkpoint, plan)
        options: Any = {"channels": channels, "held_out": 1, "skip": skip, "batch": 2}
        tuned, record = reconstruct(dense, pruned, IDS, Reconstruction(steps=count), **options)
        flops.append(
            scoring_flops(part.before, part.after, prototype, IDS.numel(), 16)
            + reconstruction_flops(dense.shape, part.after, record["tokens"], IDS.numel(), 16)
        )
        saved = tmp_path / f"hand-{count}"
        saved.mkdir()
        write_pruned(checkpoint, dataclasses.replace(plan, tuned=tuned), saved)
        checkpoint, skip = Checkpoint(saved), skip + count
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    records = Checkpoint(tmp_path / "out").provenance["iterations"]  # type: ignore[index]
    assert [entry["reconstruction"]["steps"] for entry in records] == [2, 3]
    assert [entry["flops"] for entry in records] == flops
    assert out.plan.summary["reconstruction"] == records[-1]["reconstruction"]
    assert "steps: 2 (linear)" in (tmp_path / "out" / "README.md").read_text()


def test_a_killed_run_goes_on_behind_its_last_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", IDS.numpy())

    def run(out: str, *more: str) -> int:
        line = ["prune", str(model), str(tmp_path / out), "--method", "wanda", "--ratio", "0.6", "--reconstruct", "4"]
        steps = ["--iterations", "2", "--iteration-schedule", "cubic"]
        return main([*line, *steps, "--calibration", f"tokens:{tmp_path / 'ids.npy'}", *more])

    assert run("whole") == 0
    assert "steps        2 (cubic), with 52.5%, 60.0% gone after each; 2 + 2 steps" in capsys.readouterr().out
    finish = Journal.finish

    def killed_in(folder: str) -> None:
        def interrupted(self: Journal, step: int) -> None:
            finish(self, step)
            if folder in str(self.directory) and step == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "finish", interrupted)
            assert run("killed", "--resume") != 0

    killed_in("step-1/reconstruct")
    killed_in("step-2/weights")
    work = tmp_path / "killed.partial" / "work"
    assert [path.name for path in work.iterdir()] == ["step-2"] or (work / "step-1" / "finished").exists()
    capsys.readouterr()
    assert run("killed", "--resume", "--iteration-schedule", "linear") == 2
    assert "another request: --iterations or --iteration-schedule" in capsys.readouterr().err
    assert run("killed", "--resume") == 0
    assert "step 1 of 2" not in capsys.readouterr().err
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert not (tmp_path / "killed.partial").exists()


def test_several_ratios_and_a_sparse_model(model: Path, tmp_path: Path) -> None:
    common: Any = {"method": "magnitude", "iterations": 2}
    outputs = secateur.prune(model, tmp_path / "out", ratio=(0.5, 0.7), **common)
    again = secateur.prune(outputs[0], tmp_path / "again", ratio=0.7, **common)  # half is gone before the first step
    for output, ratio in zip([*outputs, again], (0.5, 0.7, 0.7), strict=True):
        masks = load_masks(output.path)
        zeros = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        assert zeros == pytest.approx(ratio, abs=0.01) and output.plan.request["ratio"] == ratio


BAD = [
    ({"iterations": 0}, "`iterations`"),
    ({"iteration_schedule": "cubic"}, "`iteration_schedule`: goes with `iterations` of 2 or more"),
    ({"iterations": 3, "reconstruct": 2}, "`reconstruct`: 2 steps, too few for 3 `iterations`"),
    ({"iterations": 2, "out": None}, "`iterations`: the models between steps need a directory"),
    ({"iterations": 3, "ratio": None, "pattern": "2:4"}, "`iterations`: step 1 of 3 would remove nothing"),
    ({"iterations": 4, "method": "shortgpt"}, "`iterations`: step 2 of 4 would remove nothing"),
    ({"iterations": 2, "method": "sheared"}, "`iterations`: sheared learns what to cut"),
    ({"iterations": 2, "method": "flap", "allocation": "global"}, "`iterations`: layers of different width"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_requests(fields: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    fields = {"method": "wanda", "out": tmp_path / "out", "ratio": 0.5, "calibration": IDS, **fields}
    with pytest.raises(UserError, match=message) as caught:
        secateur.prune(model, **fields)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_steps_without_recovery_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", str(model), str(tmp_path / "out"), "--method", "magnitude", "--ratio", "0.5", "--iterations", "2"]
    assert main(line) == 0
    assert capsys.readouterr().err.count("--iterations: no recovery between the steps") == 1
