"""What a study file says of the authors' recipe: the parent's configuration, first weights, slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cells import RECIPE, SMALL, common, ran, weights
from test_plan import named, planned, study

from secateur.errors import UserError
from secateur.files import read_json
from secateur.model.plan import load_masks
from secateur.study.stages.controls import redrawn_linears

ROPE = {"rope_theta": 500_000, "rms_norm_eps": 1e-5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}


def with_config(**config: Any) -> dict[str, Any]:
    return {**SMALL, "tokens": "16k", **config}


def test_keys_of_the_configuration_are_of_the_parent_and_of_what_is_drawn_anew(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "methods": ["minitron-depth", "wanda"],
        "controls": "dense-twin",
        "sweep": {"rates": [1e-3, 2e-3], "tokens": 2048},
    }
    plain = planned(study(tmp_path, parent=with_config(), **changes))
    stages = planned(study(tmp_path, parent=with_config(**ROPE), **changes))
    assert [stage.name for stage in stages] == [stage.name for stage in plain]
    for stage, before in zip(stages, plain, strict=True):
        if stage.kind != "corpus":
            assert stage.fingerprint != before.fingerprint, stage.name  # of the parent's descendants too
        drawn = stage.kind == "train" and stage.identity["init"] == "scratch"
        assert stage.identity.get("config") == (ROPE if drawn else None), stage.name
        assert "config" not in before.identity
    assert "config" in named(stages, "minitron-depth-0.5/S_R/rate-0.001").identity
    assert "config" in named(stages, "wanda-0.5/dense-twin").identity
    shared = {"tokens": [2048, 4096], "trunk": "shared"}
    trunks = planned(study(tmp_path, parent=with_config(**ROPE), retrain=shared, recipe=RECIPE | {"schedule": "wsd"}))
    first = [s for s in trunks if s.facts.get("path") == "trunk" and s.identity["init"] == "scratch"]
    assert first and all(stage.identity["config"] == ROPE for stage in first)


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ({"checkpoint": "x", "rope_theta": 1e6}, "parent.rope_theta: parent.checkpoint has its own"),
        (with_config(rms_norm_eps=0), "parent.rms_norm_eps: "),
        (with_config(rope_scaling={"factor": 2.0}), "parent.rope_scaling: needs a rope_type"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, parent: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        study(tmp_path, parent=parent)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_models_of_a_study_have_the_parents_configuration(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    parent = with_config(**ROPE, tokens=2048)
    methods = ["minitron-depth", {"method": "wanda", "controls": "dense-twin"}]
    answer = ran(tmp_path / "a.yaml", out, capsys, **common(text, parent=parent, methods=methods))
    assert not answer["failed"]
    configs = {path.parts[-3]: read_json(path) for path in out.glob("stages/*/model/config.json")}
    assert len(configs) == 8  # the parent, two pruned, two retrained, two twins, a control
    for name, config in configs.items():
        assert config["rms_norm_eps"] == 1e-5, name
        assert config["rope_parameters"] == {"rope_theta": 500_000, "rope_type": "linear", "factor": 2.0}, name
        old = (config["rope_theta"], config["rope_scaling"])  # which readers of the old spelling look for
        assert old == (500_000, {"rope_type": "linear", "factor": 2.0}), name


# --- sparse twins


def test_the_first_weights_of_sparse_twins_are_chosen(tmp_path: Path) -> None:
    controls = ["redrawn", "redrawn-linears"]
    methods = ["minitron-depth", "wanda", {"method": "magnitude", "twin_init": "redrawn-linears"}]
    stages = planned(study(tmp_path, methods=methods, controls=controls, settings="equal_training_tokens"))
    inits = {
        stage.name: stage.identity["init"] for stage in stages if stage.facts.get("path") in ("scratch", "control")
    }
    assert inits == {
        "minitron-depth-0.5/S_R": "scratch",
        "wanda-0.5/S_R": "redrawn",
        "wanda-0.5/redrawn-linears": "redrawn-linears",
        "magnitude-0.5/S_R": "redrawn-linears",
        "magnitude-0.5/redrawn": "redrawn",
    }
    assert named(stages, "magnitude-0.5/S_R").facts["init"] == "redrawn-linears"
    changed = planned(study(tmp_path, methods="wanda", twin_init="redrawn-linears"))
    assert named(changed, "wanda-0.5/S_{P+R}").identity["init"] == "redrawn-linears"


@pytest.mark.parametrize("tied", [False, True])
def test_redrawn_linears_keep_embeddings_and_norms_to_the_bit(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    out, rate = tmp_path / "out", 1e-30  # which moves no float32 weight: the trained model is the first one
    parent = with_config(tokens=2048, tied=tied)
    changes: dict[str, Any] = {"methods": "wanda", "controls": "redrawn-linears", "parent": parent, "seeds": 1}
    recipe = RECIPE | {"peak_rate": rate, "weight_decay": 0}
    answer = ran(tmp_path / "a.yaml", out, capsys, **common(text, recipe=recipe, **changes))
    assert not answer["failed"]
    pruned, twin, control = (
        weights(out, folder)
        for folder in ("prune-wanda-0.5-*", "train-wanda-0.5-S_R-*", "train-wanda-0.5-redrawn-linears-*")
    )
    (folder,) = out.glob("stages/prune-wanda-0.5-*/model")
    masks = load_masks(folder)
    linears = {name for name in pruned if "_proj" in name or (name.startswith("lm_head") and not tied)}
    assert set(masks) <= linears
    for name, value in control.items():
        equal = torch.equal(value, pruned[name])
        assert equal == (name not in linears), name
        if name in linears:
            assert torch.equal(value, twin[name])  # drawn from the same seed
        if name in masks:
            assert torch.equal(value != 0, masks[name])
    assert not torch.equal(twin["model.embed_tokens.weight"], pruned["model.embed_tokens.weight"])


def test_biases_of_redrawn_linears_are_drawn_too() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    weight = redrawn_linears(model, lambda _: torch.zeros(1), lambda _: torch.ones(1))
    assert {name: int(weight(name)) for name, _ in model.named_parameters()} == {
        "0.weight": 1,
        "1.weight": 0,
        "1.bias": 0,
        "2.weight": 1,
        "2.bias": 1,
    }


# --- slices


def test_a_twin_may_start_at_the_first_token(tmp_path: Path) -> None:
    methods = ["minitron-depth", {"method": "wanda", "data": {"twin": "same"}}]
    settings = ["equal_training_tokens", "equal_total_tokens", "equal_training_flops"]
    changes: dict[str, Any] = {"methods": methods, "settings": settings, "controls": "shuffled-weights"}
    stages = planned(study(tmp_path, data={"twin": "own-start"}, **changes))
    same = planned(study(tmp_path, **changes))
    slices = {stage.name: stage.identity["slice"] for stage in stages if stage.kind == "train"}
    before = {stage.name: stage.identity["slice"] for stage in same if stage.kind == "train"}
    assert slices["minitron-depth-0.5/P-R"] == [16_000, 20_096]
    assert slices["minitron-depth-0.5/S_R"] == [0, 4096]
    assert slices["minitron-depth-0.5/S_F"] == [0, before["minitron-depth-0.5/S_F"][1] - 16_000]
    changed = {name for name in slices if slices[name] != before[name]}
    assert changed == {"minitron-depth-0.5/S_R", "minitron-depth-0.5/S_F"}
    wanda = [[s.fingerprint for s in plan if s.name.startswith("wanda")] for plan in (stages, same)]
    assert wanda[0] == wanda[1]


def test_twins_of_parents_of_several_sizes_start_at_the_first_token(tmp_path: Path) -> None:
    parents = {"long": with_config(), "short": with_config(tokens="8k")}
    methods = [{"method": "minitron-depth", "parent": "short"}, {"method": "shortgpt", "parent": "long"}]
    changes: dict[str, Any] = {"parents": parents, "methods": methods}
    for start, first in (("same", 8000), ("own-start", 0)):
        file = study(tmp_path, **{"parent": None, **changes}, data={"twin": start})
        assert named(planned(file), "minitron-depth-0.5/S_{P+R}").identity["slice"] == [first, first + 12_096]
