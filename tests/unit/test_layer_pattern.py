"""Layer patterns: cuts by depth that a reader with the period as a constant computes as transformers does."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import secateur
from helpers import edit_config, hf, logits, tiny_family, windows
from secateur.cli import main
from secateur.errors import UserError
from secateur.model.families import FAMILIES as TABLE
from secateur.model.layer_pattern import follows_period, layer_kinds, lowest_cut, model_period, run_keeps_period
from secateur.study.sections import MethodEntry

DEPTH = ("shortgpt", "minitron-depth", "shortened-llama", "shortened-llama-ppl", "random-depth")
PERIODIC = [family for family in TABLE if family.pattern]
LAYERS = 14  #: two periods of Gemma 3, and two layers of a third


def derived(layers: int, period: int = 6) -> list[str]:
    """The kinds that a reader derives from the numbers of the layers."""
    return ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(layers)]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with the layer kinds of published ones, and windows shorter than the text."""
    folder = tmp_path_factory.mktemp("gemma")
    return tiny_family(folder, "gemma3", num_hidden_layers=LAYERS, layer_types=derived(LAYERS))


def prune(gemma: Path, out: Path, method: str, **fields: Any) -> Any:
    if method != "random-depth":
        fields["calibration"] = windows(3)
    return secateur.prune(gemma, out, method=method, **fields)


def kinds_in(folder: Any) -> list[str]:
    return json.loads((Path(folder) / "config.json").read_text())["layer_types"]


def constant_reader_agrees(folder: Any) -> bool:
    """Whether a reader that derives the kinds from the family's period gives the same logits."""
    ids = windows(2, 20, seed=4)
    expected = logits(hf(Path(folder)), ids)
    edit_config(Path(folder), layer_types=derived(len(kinds_in(folder))))
    return torch.allclose(logits(hf(Path(folder)), ids), expected, atol=1e-5)


@pytest.mark.parametrize("method", DEPTH)
@pytest.mark.parametrize("layers", [6, 8, 9, 13])
def test_every_depth_method_keeps_the_period(gemma: Path, method: str, layers: int, tmp_path: Path) -> None:
    pruned = prune(gemma, tmp_path / "out", method, shape={"layers": layers})
    assert kinds_in(pruned) == derived(layers)
    assert constant_reader_agrees(pruned)
    assert pruned.plan.summary["layer_pattern"]["period"] == 6
    assert next(support for support in pruned.runs_in if support.runtime == "llama.cpp").runs == "yes"


def test_a_cut_off_the_period_gives_other_logits_to_such_a_reader(gemma: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"shape": {"layers": 9}, "keep_pattern": False}
    pruned = prune(gemma, tmp_path / "out", "random-depth", **fields)
    assert kinds_in(pruned) != derived(9) and "layer_pattern" not in pruned.plan.summary
    supports = {support.runtime: support for support in pruned.runs_in}
    for runtime in ("llama.cpp", "mlx-lm"):
        assert supports[runtime].runs == "no" and supports[runtime].remedy == "`keep_pattern`"
    assert not constant_reader_agrees(pruned)


def test_the_price_is_the_loss_beside_the_best_run(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = prune(gemma, tmp_path / "out", "minitron-depth", shape={"layers": 9})
    record, losses = pruned.plan.summary["layer_pattern"], [c["loss"] for c in pruned.plan.summary["candidates"]]
    first = min(set(range(LAYERS)) - set(pruned.plan.keep_layers.tolist()))
    legal = [i for i in range(10) if [k for n, k in enumerate(derived(LAYERS)) if not i <= n < i + 5] == derived(9)]
    assert losses[first] == record["value"] == min(losses[i] for i in legal)
    assert record["without"] == min(losses) and losses[record["best"][0]] == min(losses)
    free = prune(gemma, tmp_path / "free", "minitron-depth", shape={"layers": 9}, keep_pattern=False)
    assert sorted(set(range(LAYERS)) - set(free.plan.keep_layers.tolist())) == record["best"]
    messages = capsys.readouterr().err
    assert "5 layers in one run keep the period 6 only near the end of the model; 6 layers can go anywhere" in messages
    if record["best"][0] != first:
        assert f"loss {record['value']:.4f} instead of {record['without']:.4f}" in messages


def test_runs_of_a_whole_period_can_go_anywhere() -> None:
    kinds = [name == "full_attention" for name in derived(26)]
    assert [i for i in range(21) if run_keeps_period(kinds, 6, i, 6)] == list(range(21))
    assert [i for i in range(15) if run_keeps_period(kinds, 6, i, 12)] == list(range(15))
    assert all(i > 16 for i in range(20) if run_keeps_period(kinds, 6, i, 7))


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_cut_against_every_choice(seed: int) -> None:
    rng = random.Random(seed)
    layers, period = rng.randint(5, 10), rng.choice([2, 3, 4])
    kinds = [(i + 1) % period == 0 for i in range(layers)]
    scores = [math.inf if rng.random() < 0.15 else float(rng.randint(0, 6)) for _ in range(layers)]
    for count in range(1, layers):
        legal = {
            keep: sum(score for i, score in enumerate(scores) if i not in keep)
            for keep in itertools.combinations(range(layers), count)
            if [kinds[i] for i in keep] == [(new + 1) % period == 0 for new in range(count)]
        }
        best = min(legal.values(), default=math.inf)
        keep = lowest_cut(scores, kinds, period, count)
        if math.isinf(best):
            assert keep is None
        else:
            assert keep == list(max(choice for choice, total in legal.items() if total == best))  # the lower index goes


def test_a_number_of_layers_without_a_whole_period(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"`keep_pattern`: no choice of 5 layers keeps the period 6 .*; 6 layers can"):
        prune(gemma, tmp_path / "out", "random-depth", shape={"layers": 5}, keep_pattern=True)
    pruned = prune(gemma, tmp_path / "out", "random-depth", shape={"layers": 5})
    assert "6 layers can. The layers are chosen without it" in capsys.readouterr().err
    free = prune(gemma, tmp_path / "free", "random-depth", shape={"layers": 5}, keep_pattern=False)
    assert pruned.plan.keep_layers.tolist() == free.plan.keep_layers.tolist()


def test_spared_layers_limit_the_counts(gemma: Path, tmp_path: Path) -> None:
    """With the first and the last layer spared, only whole periods can go."""
    fields: dict[str, Any] = {"options": {"keep_first": 1, "keep_last": 9}, "keep_pattern": True}
    with pytest.raises(UserError, match="no choice of 12 layers keeps the period 6 of the layer kinds; another number"):
        prune(gemma, tmp_path / "out", "shortened-llama", shape={"layers": 12}, **fields)


def test_models_that_the_option_does_not_concern(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = tiny_family(tmp_path, "llama")
    prune(llama, tmp_path / "a", "random-depth", shape={"layers": 3}, keep_pattern=True)
    assert "`keep_pattern`: without effect" in capsys.readouterr().err
    irregular = tiny_family(tmp_path, "gemma3")  # its own period is 3
    with pytest.raises(UserError, match=r"`keep_pattern`: the layers of .* do not follow the period 6 of gemma3"):
        prune(irregular, tmp_path / "b", "random-depth", shape={"layers": 3}, keep_pattern=True)
    with pytest.raises(UserError, match="`keep_pattern`: goes with depth methods, and random-width is none"):
        prune(gemma, tmp_path / "c", "random-width", ratio=0.3, keep_pattern=True)


def test_the_command_line_has_both_spellings(gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--method", "random-depth", "--shape", "layers=9")
    assert main(["prune", str(gemma), str(tmp_path / "a"), *common, "--no-keep-pattern"]) == 0
    assert "(layer kinds are derived from layer numbers" in (text := capsys.readouterr().out)
    assert "instead: --keep-pattern)" in text and "keep_pattern off" in text
    assert main(["prune", str(gemma), str(tmp_path / "b"), *common, "--keep-pattern"]) == 0
    assert kinds_in(tmp_path / "b") == derived(9)
    assert main(["prune", str(gemma), str(tmp_path / "c"), *common[:3], "layers=2", "--keep-pattern"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("secateur: error: --keep-pattern: no choice of 2")


def test_a_study_takes_the_fields_of_pruning() -> None:
    from secateur.config import identity, parse

    entry = parse(MethodEntry, {"method": "shortgpt", "keep_pattern": False}, origin="study")
    (target,) = entry.targets((0.5,)).values()
    assert target.keep_pattern is False
    (target,) = parse(MethodEntry, {"method": "flap", "step": 256}, origin="study").targets((0.5,)).values()
    assert target.step == 256
    assert not {"step", "keep_pattern"} & set(identity(parse(MethodEntry, {"method": "flap"}, origin="study")))


@pytest.mark.parametrize("family", PERIODIC, ids=lambda family: family.name)
def test_published_models_follow_the_period_of_their_row(family: Any) -> None:
    """The defaults of transformers are those of published models."""
    config = AutoConfig.for_model(family.model_types[0], num_hidden_layers=2 * family.pattern + 1)
    assert len(layer_kinds(config)) == 2 * family.pattern + 1
    assert model_period(family, layer_kinds(config)) == family.pattern
    one_more = [False, *layer_kinds(config)]
    assert not follows_period(one_more, family.pattern)


def test_layers_that_are_all_alike_have_no_pattern() -> None:
    config = AutoConfig.for_model(
        "exaone4", num_hidden_layers=4, sliding_window=None, layer_types=["full_attention"] * 4
    )
    assert layer_kinds(config) == ()
    assert layer_kinds(AutoConfig.for_model("llama")) == ()


def test_scores_of_different_requests_share_a_journal(gemma: Path, tmp_path: Path) -> None:
    """The constraint decides after the scores, so that they do not change."""
    plans = [
        prune(gemma, tmp_path / str(flag), "shortgpt", shape={"layers": 9}, keep_pattern=flag).plan
        for flag in (True, False)
    ]
    assert np.array_equal(plans[0].scores["layers"].numpy(), plans[1].scores["layers"].numpy())
    assert plans[0].request["keep_pattern"] is True and plans[1].request["keep_pattern"] is False
