"""What a study file says of the authors' recipe: the parent's configuration, first weights, slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cells import RECIPE, SMALL, common, ran
from test_plan import named, planned, study

from secateur.errors import UserError
from secateur.files import read_json

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
    ("parent", "told"),
    [
        ({"checkpoint": "x", "rope_theta": 1e6}, "parent.rope_theta: parent.checkpoint has its own"),
        (with_config(rms_norm_eps=0), "parent.rms_norm_eps: "),
        (with_config(rope_scaling={"factor": 2.0}), "parent.rope_scaling: needs a rope_type"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, parent: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        study(tmp_path, parent=parent)
    assert told in str(caught.value) and "\n" not in str(caught.value)


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
