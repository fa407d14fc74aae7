"""What a mixture gets where a request leaves it open, and what is printed of it: axes, cards, tables, costs, plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import secateur
from expert_configs import MIXTURES
from expert_models import tiny_mixture
from helpers import tiny_family, token_corpus, windows
from secateur.cli import main
from secateur.errors import UserError
from secateur.formatting import count
from secateur.methods.registry import get_method
from secateur.model.shapes import Shape
from secateur.progress import notify_once
from secateur.pruning.cost import scoring_flops
from secateur.pruning.default_axes import with_default_axes
from secateur.pruning.target import Target

IDS = windows(16, 16)


def shape_of(name: str, **config: Any) -> Shape:
    return Shape.of_config(AutoConfig.for_model(**{**MIXTURES[name], **config}), where=name)


@pytest.mark.parametrize(
    ("name", "method", "axes"),
    [
        ("mixtral", "minitron-width", ("hidden", "expert_ffn")),
        ("granitemoe", "random-width", ("hidden", "expert_ffn")),
        ("gpt_oss", "wanda-sp", ("kv",)),
        ("gpt_oss", "flap", ("kv",)),
        ("mixtral", "llm-pruner", ("kv",)),
        ("olmoe", "minitron-width", ("expert_ffn",)),  # neither hidden channels nor KV heads go without the other
        ("olmoe", "flap", ()),
        ("qwen3_moe", "minitron-width", ()),  # one layer is dense
        ("mixtral", "reap", ()),
    ],
)
def test_default_axes(name: str, method: str, axes: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    notify_once.cache_clear()
    target = with_default_axes(Target(ratio=0.2), shape_of(name), get_method(method), method)
    assert target.axes == axes
    line = f"so {method} narrows {' and '.join(axes)} instead of"
    assert capsys.readouterr().err.count(line) == (1 if axes else 0)
    for named in (Target(ratio=0.2, axes=("hidden",)), Target(sizes={"hidden": 40})):
        assert with_default_axes(named, shape_of(name), get_method(method), method) is named


@pytest.mark.parametrize("method", ["minitron-width", "wanda-sp"])
def test_a_ratio_prunes_a_model_whose_every_layer_has_experts(method: str, tmp_path: Path) -> None:
    source, ratio = (
        tiny_mixture(tmp_path, "mixtral", num_key_value_heads=6),
        0.3 if method == "minitron-width" else 0.04,
    )
    out = secateur.prune(source, tmp_path / "out", method=method, ratio=ratio, calibration=IDS)
    before, after = Shape.of_config(AutoConfig.from_pretrained(source), where="source"), out.shape
    axes = ("hidden", "expert_ffn") if method == "minitron-width" else ("kv_heads",)
    changes = {f.name for f in dataclasses.fields(Shape) if getattr(before, f.name) != getattr(after, f.name)}
    assert changes <= {*axes, "heads"} and changes
    named = ("hidden", "expert_ffn") if method == "minitron-width" else ("kv",)
    plan = json.loads((out.path / "plan.json").read_text())
    assert plan["asked"]["axes"] == list(named)


def test_no_axis_is_left(tmp_path: Path) -> None:
    source = tiny_mixture(tmp_path, "olmoe")
    with pytest.raises(UserError, match=r"flap cuts ffn, but of olmoe only .* can be cut: every layer has experts"):
        secateur.prune(source, tmp_path / "out", method="flap", ratio=0.1, calibration=IDS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "ratio", "fits"),
    [("shortgpt", 0.25, False), ("minitron-depth", 0.25, False), ("minitron-depth", 0.5, True)],
)
def test_an_interval_of_experts_is_checked_before_scores(method: str, ratio: float, fits: bool) -> None:
    shape, target = shape_of("ernie4_5_moe-interval"), Target(ratio=ratio)
    if fits:
        assert target.shape(shape, get_method(method), method).layers == 2
        return
    with pytest.raises(UserError, match=rf"`method`: {method} may remove layers 0 to 0: layers 0, 2 of 3 would"):
        target.shape(shape, get_method(method), method)
    assert target.shape(shape_of("ernie4_5_moe"), get_method(method), method).layers == 3


def test_propagation_counts_its_second_pass() -> None:
    shape, reap = shape_of("mixtral"), get_method("reap")
    after = Target(ratio=0.5).shape(shape, reap, "reap")
    once = scoring_flops(shape, after, reap, 1000, 16)
    assert once == 1000 * shape.forward_flops(16)
    twice = scoring_flops(shape, after, reap, 1000, 16, propagate="pruned")
    assert twice == pytest.approx((2 - 1 / shape.layers) * once)  # nothing reads what the last block puts out


def test_the_card_says_how_the_text_was_routed(tmp_path: Path) -> None:
    source = tiny_mixture(tmp_path, "qwen3_moe")
    out = secateur.prune(source, tmp_path / "out", method="reap", ratio=0.5, calibration=IDS)
    routing, card = out.plan.summary["routing"], (out.path / "README.md").read_text()
    counts = [tokens for layer in routing["tokens"].values() for tokens in layer]
    few = sum(tokens < 100 for tokens in counts)
    assert f"{min(counts)} to {max(counts)} tokens routed to each; {few} of 24 experts saw fewer than 100" in card
    ranks = routing["rank_agreement"].values()
    assert f"two halves of the text: {min(ranks):.2f} to {max(ranks):.2f}" in card
    assert f"a token uses {count(out.shape.active_parameters)} parameters instead of" in card  # routers are smaller
    wanda = secateur.prune(source, tmp_path / "sparse", method="wanda", ratio=0.5, calibration=IDS)
    card = (wanda.path / "README.md").read_text()
    assert "tokens routed to each" in card and "rank agreement" not in card and "parameters, as many as before" in card
    dense = secateur.prune(tiny_family(tmp_path, "llama"), tmp_path / "dense", method="magnitude", ratio=0.5)
    card = (dense.path / "README.md").read_text()
    assert "a token uses" not in card and "routed" not in card


def test_tables_of_mixtures_have_no_row_of_a_dense_ffn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("mixtral", 0), ("qwen3_moe", 1)):
        AutoConfig.for_model(**MIXTURES[name]).save_pretrained(tmp_path / name)
        assert main(["shapes", str(tmp_path / name), "--ratio", "0.25"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("FFN  ") for line in lines) == rows
        assert any(line.startswith("experts, of a token") for line in lines)
        assert any(line.startswith("FFN of an expert") for line in lines)


def test_a_plan_says_where_two_dense_controls_are_one(tmp_path: Path) -> None:
    study: dict[str, Any] = {
        "name": "mixture",
        "corpus": {"source": f"shards:{token_corpus(tmp_path / 'corpus', tokens=5000, vocabulary=61)}"},
        "parent": {
            "tokens": 1024,
            "hidden": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "tied": True,
            "experts": 8,
            "active": 2,
            "expert_ffn": 16,
        },
        "methods": [{"method": "reap", "controls": ["dense-total", "dense-active"]}],
        "ratios": [0.5, 0.75],
        "retrain": {"tokens": 512},
        "calibration": {"windows": 4},
        "recipe": {"sequence": 32, "tokens_per_step": 128, "micro_batch": 4},
    }
    notes = {}
    for ratios in ([0.5, 0.75], [0.5]):
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({**study, "ratios": ratios}))
        notes[len(ratios)] = str(secateur.Study.load(path, out=tmp_path / "out").plan())
    line = "reap at 0.75: every expert that stays is active for every token, so dense-active and dense-total are the"
    assert line in notes[2] and "are the same model" not in notes[1]
