"""The parts of training beside the loop: what is read, schedules, metrics, watchdogs, checkpoints in the background."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from family_configs import FAMILY_CONFIGS
from helpers import hf, tiny_family, tiny_llama, token_corpus
from secateur.cli import main
from secateur.errors import RunError, UserError
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.training.batches import Batch, Slice, micro_batches
from secateur.training.checkpoints import Saver
from secateur.training.init import fresh_weights, stored_weights
from secateur.training.loop import RunOptions, train_loop
from secateur.training.metrics import Metrics, check_trackers
from secateur.training.origin import Origin
from secateur.training.parallel import Execution, TrainModule, place_model
from secateur.training.recipe import InitSpec, Recipe, learning_rate, make_optimizer
from secateur.training.throughput import Meter, peak_of
from secateur.training.watchdog import StopSignal, Watchdog, stop_on_signals

# --- what is read


@given(windows=st.integers(0, 20), rest=st.integers(0, 7), size=st.integers(1, 5), world=st.integers(1, 6))
def test_processes_share_every_window_once(windows: int, rest: int, size: int, world: int) -> None:
    spans = [(8 * i, 8 * i + 8) for i in range(windows)] + ([(8 * windows, 8 * windows + rest)] if rest else [])
    shares = [micro_batches(spans, size, rank=rank, world=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # all take part in as many passes
    groups = [group for share in shares for group in share]
    assert [span for group in groups for span in group] == [s for s in spans if s[1] - s[0] > 1]
    assert all(len(group) <= size and len({b - a for a, b in group}) <= 1 for group in groups)
    if spans and world == 1:
        assert all(groups)


class Documents:
    """Random ids in documents of some lengths."""

    def __init__(self, *lengths: int) -> None:
        self.starts = np.cumsum([0, *lengths])[:-1]
        self.ids = np.random.default_rng(1).integers(2, 61, sum(lengths))

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def targets(self, split: str, start: int, stop: int) -> None:
        return None

    def positions(self, split: str, start: int, stop: int) -> np.ndarray:
        at = np.arange(start, stop)
        return at - np.maximum(self.starts[np.searchsorted(self.starts, at, side="right") - 1], start)

    def documents_in(self, split: str, start: int, stop: int) -> range:
        raise NotImplementedError

    def document_name(self, split: str, index: int) -> str:
        raise NotImplementedError


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_attention_stays_within_documents(family: str, tmp_path: Path) -> None:
    """In one window three documents lose as much as each does alone."""
    directory = tiny_family(tmp_path, family)
    if (checkpoint := Checkpoint(directory)).shape.carries_state:
        config = checkpoint.raw_config, checkpoint.config, checkpoint.shape
        origin = Origin(directory, *config, checkpoint, {}, directory, torch.float32)
        with pytest.raises(UserError, match="carry a state from one document to the next"):
            origin.start(Recipe(sequence=24, tokens_per_step=24, attention="document"))
        return
    model = hf(directory)
    store, recipe = Documents(9, 5, 10), Recipe(sequence=24, tokens_per_step=24, attention="document")
    batch = Slice(store, 0, 24, recipe).batch([(0, 24)])
    module = TrainModule(model)
    with torch.no_grad():
        together = module(batch.ids, batch.positions)[1][0]
        across = module(batch.ids)[1][0]
        for start, stop in ((0, 9), (9, 14), (14, 24)):
            alone = module(batch.ids[:, start:stop])[1][0]
            torch.testing.assert_close(together[start : stop - 1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:8], across[:8], rtol=1e-4, atol=1e-5)
    assert float((together[9:] - across[9:]).abs().max()) > 1e-3


def test_the_empty_batch_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    batch = Batch.empty()
    loss, each, _ = TrainModule(model)(batch.ids, batch.positions, batch.targets)
    loss.backward()
    assert loss.item() == 0 and not each.any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# --- the schedule


@pytest.mark.parametrize("steps", [1, 2, 10, 400])
def test_wsd(steps: int) -> None:
    recipe = Recipe(schedule="wsd", peak_rate=1.0, warmup=0.1, decay_share=0.25, final_share=0.1)
    rates = [learning_rate(recipe, step, steps) for step in range(steps)]
    assert max(rates) == 1.0
    if steps == 400:
        assert rates[39:300] == [1.0] * 261  # so that a longer run shares them
        assert rates[-1] == pytest.approx(0.1)
        assert [a - b for a, b in pairwise(rates[300:])] == pytest.approx([0.9 / 100] * 99)


# --- weights


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_models_are_placed_as_they_are_stored(family: str, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, family)
    checkpoint = Checkpoint(directory)
    placed = place_model(skeleton(checkpoint.config, directory), stored_weights(checkpoint), Execution(recompute=True))
    plain, ids = hf(directory), torch.arange(24).reshape(2, 12)
    loss, _, _ = placed.train()(ids)
    loss.backward()
    logits = plain(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert [n for n, _ in placed.model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(placed.model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=5e-4)


def test_dropout_is_off_in_training_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(tiny_family(tmp_path, "seed_oss", residual_dropout=0.25))  # which drops by default
    place_model(skeleton(checkpoint.config, checkpoint.directory), stored_weights(checkpoint), Execution())
    line = "training sets dropout to 0 (config.json has attention_dropout 0.1, residual_dropout 0.25)"
    assert line in capsys.readouterr().err
    llama = Checkpoint(tiny_family(tmp_path, "llama"))
    place_model(skeleton(llama.config, llama.directory), stored_weights(llama), Execution())
    assert "dropout" not in capsys.readouterr().err


def test_fresh_weights_follow_from_seed_and_name(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    draw, again, other = (fresh_weights(model, InitSpec(std=0.5), seed=seed) for seed in (1, 1, 2))
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    wanted = draw(up)
    assert not torch.equal(draw(gate), wanted) and not torch.equal(other(up), wanted)
    assert torch.equal(again(up), wanted)  # whatever was drawn before
    norm = fresh_weights(hf(tiny_family(tmp_path, "gemma3")), InitSpec(std=0.5), seed=1)("model.norm.weight")
    assert not norm.any()  # Gemma's norms multiply by one plus their weight


# --- metrics


def test_metrics_go_on_where_the_run_does(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(6):
        metrics.write({"step": step, "loss": step / 2})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    again = Metrics(path)
    again.resume(3)
    again.write({"step": 4, "loss": -1.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": s, "loss": s / 2} for s in range(4)),
        {"step": 4, "loss": -1.0},
    ]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.seen.append((step, values))

    def close(self) -> None:
        self.seen.append("closed")


def test_trackers_get_the_numbers() -> None:
    tracker = Recorder()
    metrics = Metrics(None, [tracker])
    metrics.write({"step": 3, "loss": 1.5, "event": "spike", "heldout_loss": None})
    metrics.close()
    assert tracker.seen == [(3, {"loss": 1.5}), "closed"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"`track` {name}: the package is missing; .*python.* -m pip install {name}$"):
        check_trackers([name])


def test_the_meter() -> None:
    meter = Meter(flops_per_token=10.0, peak=1000.0, memory=2)
    for tokens, seconds in ((100, 100.0), (30, 1.0), (90, 2.0)):
        meter.step(tokens, seconds)
    assert meter.rate == pytest.approx(40) and meter.utilization == pytest.approx(0.4)
    assert (meter.tokens, meter.seconds) == (220, 103.0)
    assert Meter().utilization is None and Meter().rate == 0
    peak = peak_of("cpu", "float32")
    assert peak.flops > 1e8 and peak.source == "measured, float32"


# --- watchdogs


def test_a_leap_of_the_loss_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[dict[str, Any]] = []
    watch = Watchdog("run", report=told.append)
    losses = [3 - 0.01 * i + 0.005 * (i % 3) for i in range(40)] + [4.0, 4.1, 2.6]
    for step, loss in enumerate(losses):
        watch.step(step, loss)
    assert [(t["event"], t["step"], t["loss"]) for t in told] == [("spike", 40, 4.0)]
    assert "run: step 40: the loss leapt to 4.000, from 2." in capsys.readouterr().err


def test_a_stalled_step_is_told_while_it_lasts() -> None:
    told: list[dict[str, Any]] = []
    with Watchdog("run", least=0.2, report=told.append) as watch:
        for step in range(5):
            watch.step(step, 1.0)
        over = time.monotonic() + 20
        while not told and time.monotonic() < over:
            time.sleep(0.02)
        time.sleep(0.3)
    assert [(t["event"], t["step"]) for t in told] == [("stall", 5)]
    assert told[0]["seconds"] >= 0.2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_ask_the_run_to_stop(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), number)
        assert stop.is_set
    assert signal.getsignal(number) is before


def run(folder: Path, model: Any, **settings: Any) -> dict[str, Any]:
    store, recipe = Documents(*[20] * 20), Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-2)
    data = Slice(store, 0, 320, recipe)
    settings = {"save_every": 3, **settings}
    options: dict[str, Any] = {"masks": {}, "measure": lambda _: None, "points": 2}
    return train_loop(TrainModule(model), data, options=RunOptions(folder, "run", **settings), **options)


def test_a_run_without_held_out_text_has_no_held_out_loss(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    result = run(tmp_path, hf(tiny_llama(tmp_path)), metrics=metrics)
    assert [p["loss"] for p in result["curve"]] == [None] * 3
    assert all("heldout_loss" not in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("background", [False, True])
def test_a_stopped_run_saves_first(background: bool, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    whole, cut = hf(directory), hf(directory)
    wanted = run(tmp_path / "whole", whole)
    stop = StopSignal()

    class Early(Meter):
        def step(self, tokens: int, seconds: float) -> None:
            super().step(tokens, seconds)
            stop.is_set = self.tokens >= 4 * 32

    with pytest.raises(RunError, match="run the same command to resume") as told:
        run(tmp_path / "cut", cut, stop=stop, meter=Early(), background=background)
    assert told.value.code == 75
    assert max((tmp_path / "cut").glob("step-*")).name == "step-00000005"
    again = hf(tiny_llama(tmp_path, seed=5))
    assert run(tmp_path / "cut", again, background=background) == wanted
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_what_is_saved_behind_the_run_is_what_was_there(tmp_path: Path) -> None:
    """The run goes on changing weights while they are written; the last checkpoint counts when it is complete."""
    model = hf(tiny_llama(tmp_path))
    optimizer = make_optimizer(model.parameters(), Recipe())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saver = Saver(tmp_path / "steps", dict(model.named_parameters()), optimizer, background=True)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    saver.save({"step": 1})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saver.finish()
    assert saver.last == tmp_path / "steps" / "step-00000001"
    assert saver.load() == {"step": 1, "curve": []}
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_moments_of_pruned_weights_stay_zero(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    names = [n for n, _ in model.named_parameters() if n.endswith("_proj.weight")]
    masks = {
        n: torch.rand(model.get_parameter(n).shape, generator=torch.Generator().manual_seed(1)) > 0.5 for n in names
    }
    store, recipe = Documents(*[20] * 20), Recipe(sequence=8, tokens_per_step=32, peak_rate=1e-2)
    settings = RunOptions(tmp_path / "steps", "run")
    options: dict[str, Any] = {"masks": masks, "measure": lambda _: None, "points": 1}
    train_loop(TrainModule(model), Slice(store, 0, 320, recipe), options=settings, **options)
    optimizer = make_optimizer(model.parameters(), recipe)
    assert Saver(tmp_path / "steps", dict(model.named_parameters()), optimizer).load()
    for name, mask in masks.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments = optimizer.state[model.get_parameter(name)][key]
            assert not moments[~mask].any() and (moments[mask] != 0).float().mean() > 0.9, (name, key)


# --- the verb


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "corpus").mkdir()
    return tiny_llama(tmp_path), token_corpus(tmp_path / "corpus", tokens=3000, vocabulary=61)


def command(world: tuple[Path, Path], out: Path, *options: str) -> list[str]:
    recipe = ["--set", "sequence=16", "--set", "tokens_per_step=256", "--points", "1", "--heldout-windows", "3"]
    start = [] if "--init" in options else ["--init", str(world[0])]
    tokens = [] if "--tokens" in options else ["--tokens", "2000"]
    return ["train", str(out), *start, *tokens, "--data", f"shards:{world[1]}", *recipe, *options]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tokens", "1"], "one token predicts nothing"),
        (["--tokens", "5M"], "lower --tokens by"),
        (["--skip", "2900"], "lower --tokens by"),
        (["--set", "sequence=1"], "sequence: should be greater than or equal to 2"),
        (["--set", "sequence=128"], "the model has 64 positions; set sequence=64"),
        (["--set", "seed=99999999999999999999"], "recipe: seed"),
        (["--set", "peak_rat=1"], "did you mean 'peak_rate'"),
        (["--set", "lr=1"], "lr: unknown key; did you mean 'peak_rate'?"),
        (["--set", "warmup=100"], "warmup: should be a share between 0 and 1, such as 0.5 or 50% (got 100)"),
        (["--lr", "1e-3"], "--lr is not an option; did you mean --set peak_rate=VALUE?"),
        (["--weight-decay=0"], "--weight-decay is not an option; did you mean --set weight_decay=VALUE?"),
        (["--output-dir", "x"], "--output-dir is not an option: name OUT without it"),
        (["--set", "peak_rate"], "should be KEY=VALUE"),
        (["--set", "=3"], "should be KEY=VALUE"),
        (["--replicas", "2"], "do not divide into so many groups"),
        (["--like", "DIR"], "leave it out, or train from scratch"),
        (["--init", "scratch"], "name a checkpoint or config.json of that shape with --like"),
        (["--init", "scratch", "--like", "nowhere"], "no such directory"),
        (["--data", "text:x"], "is not shards:DIR"),
        (["--data", "shards:nowhere"], "holds no token shards; write them with `secateur data"),
        (["--recipe", "EMPTY"], "expected a mapping"),
        (["--recipe", "LIST"], "expected a mapping"),
        (["--track", "tensorbored"], "did you mean 'tensorboard'"),
    ],
)
def test_bad_input_of_train(
    options: list[str], told: str, world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("EMPTY", ""), ("LIST", "- a\n- b\n")):
        (tmp_path / name).write_text(text)
        options = [str(tmp_path / name) if option == name else option for option in options]
    before = sorted(tmp_path.iterdir())
    assert main(command(world, tmp_path / "out", *options)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("secateur: error: ") and told in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("where", ["corpus/out", "llama-0/out"])
def test_train_writes_nowhere_that_it_reads(
    where: str, world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(world, tmp_path / where)) == 2
    assert "which is read; name a directory outside it" in capsys.readouterr().err


def test_nothing_that_is_asked_for_loses_what_a_run_has_done(
    world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, every = tmp_path / "out", ["--save-every", "2"]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.training.job._write", killed)
        assert main(command(world, out, *every)) == 130
    kept = sorted((tmp_path / "out.partial").rglob("*"))
    capsys.readouterr()
    assert main(command(world, out, "--set", "peak_rate=1e-2")) == 2
    assert "--recipe or --set (peak_rate was 0.0003, is now 0.01); repeat that request" in capsys.readouterr().err
    for late in ("place_model", "train_loop"):  # before and after the run is taken up again
        with monkeypatch.context() as patch:

            def refused(*_: object, **__: object) -> None:
                raise UserError("what is found late")

            patch.setattr(f"secateur.training.job.{late}", refused)
            assert main(command(world, out, *every)) == 2
    assert sorted((tmp_path / "out.partial").rglob("*")) == kept
    assert main(command(world, out)) == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 61


def test_damaged_shards_are_told(world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = world[1] / "train-00000.npy"
    data = bytearray(shard.read_bytes())
    data[200:240] = b"\xff" * 40
    shard.write_bytes(bytes(data))
    assert main(command(world, tmp_path / "out")) == 2
    assert "the files are damaged; build the data again" in capsys.readouterr().err.splitlines()[-1]
