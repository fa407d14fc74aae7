"""Adapters in a study: as an objective's key, as a factor, planned with FLOPs of their own, run, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.cli import main
from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.model.plan import load_masks
from secateur.study.planner import stages_of
from secateur.study.resolve import ResolvedParent, ResolvedStudy
from secateur.study.spec import StudySpec, load_study
from secateur.study.stage import Stage, unique
from secateur.training.adapter import Adapter, adapter_flops


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "name": "adapters",
        "corpus": {"vocabulary": 280, "holdout": 0.2},
        "parent": {"tokens": 4096, "hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2},
        "methods": ["wanda", "minitron-depth"],
        "ratios": 0.5,
        "retrain": {"tokens": 1024, "peak_rate": 2e-3},
        "settings": [],
        "calibration": {"windows": 8},
        "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1},
        "evaluation": {"windows": 8, "points": 1},
    } | changes


def study(folder: Path, **changes: Any) -> StudySpec:
    path = folder / "adapters.yaml"
    path.write_text(dump_yaml(raw(**changes)), encoding="utf-8")
    return load_study(path)


def planned(spec: StudySpec) -> dict[str, Stage]:
    parents = {name: ResolvedParent(p.shape(280)) for name, p in spec.all_parents.items()}  # type: ignore[arg-type]
    stages = unique(stages_of(spec, ResolvedStudy("text", parents)))
    return {stage.name: stage for stage in stages if stage.kind == "train"}


ADAPTER = {"rank": 2, "alpha": 4, "peak_rate": 1e-2}


def test_the_factor_multiplies_the_objectives(tmp_path: Path) -> None:
    objectives = ["language-model", {"kind": "distill", "name": "kd"}]
    plain = planned(study(tmp_path, retrain={"tokens": 1024, "objective": objectives}))
    runs = planned(study(tmp_path, retrain={"tokens": 1024, "objective": objectives, "adapter": ["none", ADAPTER]}))
    tags = ("", "+kd", "+lora-2", "+kd-lora-2")
    assert {name for name in runs if name.startswith("wanda")} == {f"wanda-0.5/P-R{tag}" for tag in tags}
    assert {name: stage.fingerprint for name, stage in plain.items()}.items() <= {
        name: stage.fingerprint for name, stage in runs.items()
    }.items()
    adapted = runs["wanda-0.5/P-R+lora-2"]
    assert adapted.identity["adapter"] == {"rank": 2, "alpha": 4.0, "targets": ["all"]}
    assert (adapted.identity["recipe"]["peak_rate"], adapted.identity["recipe"]["seed"]) == (1e-2, 0)
    assert "seed" not in runs["wanda-0.5/P-R"].identity["recipe"]
    assert adapted.identity["slice"] == runs["wanda-0.5/P-R"].identity["slice"]
    teaching = runs["wanda-0.5/P-R+kd"].flops - runs["wanda-0.5/P-R"].flops
    assert runs["wanda-0.5/P-R+kd-lora-2"].flops - adapted.flops == pytest.approx(teaching)
    for name, sparse in (("wanda-0.5", True), ("minitron-depth-0.5", False)):
        stage = runs[f"{name}/P-R+lora-2"]
        flops = adapter_flops(Adapter(rank=2), stage.facts["shape"], 1024, 32, sparse=sparse, batch=8 * 32)
        assert stage.flops == flops
        assert flops < runs[f"{name}/P-R"].flops  # also of a sparse model, whose head is frozen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"retrain": {"tokens": 64, "adapter": {"rank": 9}}},
            "rank 9 is more than the smaller side of model.layers.0.",
        ),
        ({"retrain": {"tokens": 64, "adapter": {"rank": 2, "targets": "layers.3.mlp.up_proj"}}}, "layers 0 to 1"),
        (
            {"retrain": {"tokens": 64, "adapter": [{"rank": 2}, {"rank": 2, "alpha": 2}]}},
            "two adapters are called lora-2",
        ),
        ({"retrain": {"tokens": 64, "adapter": "non"}}, "adapter"),
        (
            {
                "retrain": {
                    "tokens": 64,
                    "adapter": {"rank": 2},
                    "objective": {"kind": "distill", "adapter": {"rank": 2}},
                }
            },
            "an objective has an adapter already",
        ),
        (
            {"retrain": {"tokens": 64, "objective": {"kind": "distill", "equal": "flops", "adapter": {"rank": 2}}}},
            "runs with an adapter share tokens alone",
        ),
        (
            {"retrain": {"tokens": 64, "adapter": {"peak_rate": 1e-2}}, "sweep": {"rates": [1e-3, 2e-3]}},
            "the sweep chooses the rate",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_adapters(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        planned(study(tmp_path, **changes))


def test_a_shared_trunk_takes_no_adapter(tmp_path: Path) -> None:
    recipe = {"sequence": 32, "tokens_per_step": 64, "schedule": "wsd"}
    with pytest.raises(UserError, match="a shared trunk needs full training"):
        study(tmp_path, recipe=recipe, retrain={"tokens": [64, 128], "trunk": "shared", "adapter": {"rank": 2}})


def test_cells_with_adapters_are_run_and_compared(text: Path, tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    retrain = {
        "tokens": 1024,
        "peak_rate": 2e-3,
        "objective": ["language-model", "distill"],
        "adapter": ["none", ADAPTER],
    }
    corpus = {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280}
    exclude = [{"objective": "distill"}, {"objective": "distill-lora-2", "method": "minitron-depth"}]
    path.write_text(dump_yaml(raw(corpus=corpus, retrain=retrain, exclude=exclude)), encoding="utf-8")
    assert main(["study", "run", str(path), "--out", str(out), "--jobs", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["failed"]
    compared = {(row["first"]["objective"], row["second"]["objective"]) for row in answer["objectives"]}
    assert {("", "lora-2"), ("distill-lora-2", "lora-2")} <= compared
    (pruned,) = out.glob("stages/prune-wanda-*/model")
    masks = load_masks(pruned)
    for tag in ("+lora-2-", "+distill-lora-2-"):
        (folder,) = out.glob(f"stages/train-wanda-0.5-P-R{tag}*")
        record = json.loads((folder / "record.json").read_text())
        curve = record["result"]["curve"]
        assert record["stage"]["identity"]["adapter"]["rank"] == 2 and curve[-1]["loss"] < curve[0]["loss"]
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
        weights, before = model.state_dict(), AutoModelForCausalLM.from_pretrained(pruned).state_dict()
        assert not any(weights[name][~mask].any() for name, mask in masks.items())
        assert torch.equal(weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert not any(torch.equal(weights[name], before[name]) for name in masks)
        (evaluated,) = out.glob(f"stages/evaluate-wanda-0.5-P-R{tag}*")
        loss = json.loads((evaluated / "record.json").read_text())["result"]["loss"]
        assert loss == pytest.approx(curve[-1]["loss"], abs=1e-4)
