"""Methods that prune in several steps: what is planned, what runs, and how it is compared with one step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from secateur.cli import main
from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.model.plan import load_masks
from secateur.study.plan import plan_study
from secateur.study.planner import stages_of, trunk_savings
from secateur.study.resolve import ResolvedParent, ResolvedStudy
from secateur.study.spec import StudySpec, load_study
from secateur.study.stage import Stage, unique

WANDA = {"method": "wanda", "ratios": 0.7}
WIDTH = {"method": "minitron-width", "ratios": 0.5}


def file_of(folder: Path, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "name": "steps",
        "corpus": {"vocabulary": 280},
        "parent": {"tokens": 4096, "hidden": 32, "ffn": 96, "layers": 4, "heads": 2, "kv_heads": 2},
        "methods": [WANDA, {**WANDA, "name": "wanda-steps", "iterations": 3}],
        "retrain": {"tokens": 1100},
        "settings": ["equal_training_tokens"],
        "calibration": {"windows": 8},
        "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1},
        "evaluation": {"windows": 8, "points": 1},
    }
    path = folder / "steps.yaml"
    path.write_text(dump_yaml(raw | changes), encoding="utf-8")
    return path


def planned(of: StudySpec) -> list[Stage]:
    parents = {name: ResolvedParent(p.shape(of.corpus.vocabulary)) for name, p in of.all_parents.items()}  # type: ignore[arg-type]
    return unique(stages_of(of, ResolvedStudy("text", parents)))


def stages_named(stages: list[Stage], kind: str, prefix: str) -> list[Stage]:
    return [stage for stage in stages if stage.kind == kind and stage.name.startswith(prefix)]


def test_steps_take_turns_and_read_what_one_step_reads(tmp_path: Path) -> None:
    settings = ["equal_training_tokens", "equal_total_tokens", "equal_training_flops"]
    width = {**WIDTH, "name": "width-steps", "iterations": 3, "iteration_schedule": "cubic"}
    stages = planned(load_study(file_of(tmp_path, methods=[WIDTH, width], settings=settings)))
    prunings, runs = (stages_named(stages, kind, "width-steps-0.5/") for kind in ("prune", "train"))
    runs = [run for run in runs if run.facts["path"] in ("recovery", "P-R")]
    (once,) = stages_named(stages, "train", "minitron-width-0.5/P-R")
    assert [run.identity["slice"] for run in runs] == [[4096, 4416], [4416, 4736], [4736, 5196]]  # 5 of 64 tokens, rest
    assert once.identity["slice"] == [4096, 5196] and runs[-1].facts["cost"][0] == once.facts["cost"][0] == 1100
    for number, (pruned, run) in enumerate(zip(prunings, runs, strict=True)):
        assert run.inputs["model"] is pruned and run.identity["init"] == "pruned"
        if number:
            assert pruned.inputs["model"] is runs[number - 1] and pruned.inputs["masks"] is prunings[number - 1]
    assert {p.identity["slice"][1] for p in prunings} == {4096}  # calibrated as the one-step model is
    shapes = [pruned.facts["shape"] for pruned in prunings]
    assert shapes[-1] == once.facts["shape"]
    assert all(
        a.non_embedding > b.non_embedding and a.hidden >= b.hidden and a.ffn >= b.ffn
        for a, b in itertools.pairwise(shapes)
    )
    twins = {stage.facts["name"]: stage for stage in stages if stage.facts.get("path") == "scratch"}  # the last S_F
    assert twins["S_R"].identity["slice"] == [4096, 5196] and twins["S_{P+R}"].identity["slice"] == [0, 5196]
    spent = sum(stage.flops for stage in (*prunings, *runs))
    window = twins["S_F"].flops / twins["S_F"].tokens * 32
    assert twins["S_F"].flops == pytest.approx(spent, abs=window) and spent > once.flops
    assert trunk_savings(stages)[0] == trunk_savings(stages)[1]
    text = str(plan_study("steps", stages))
    assert "width-steps at 0.5 prunes in 3 steps, each followed by a recovery on 320, in the end 460 tokens." in text


def test_one_iteration_is_the_plain_run_to_the_fingerprint(tmp_path: Path) -> None:
    plain = planned(load_study(file_of(tmp_path, methods=[WANDA])))
    assert [s.fingerprint for s in planned(load_study(file_of(tmp_path, methods=[{**WANDA, "iterations": 1}])))] == [
        s.fingerprint for s in plain
    ]


def test_a_teacher_goes_with_every_recovery(tmp_path: Path) -> None:
    objective = [{"kind": "distill"}, {"kind": "distill", "name": "short", "equal": "flops"}]
    steps = {**WIDTH, "name": "steps", "iterations": 2}
    retrain = {"tokens": 1280, "objective": ["language-model", *objective]}
    stages = planned(load_study(file_of(tmp_path, methods=[steps], retrain=retrain, settings=[])))
    taught = [s for s in stages if s.kind == "train" and "+distill" in s.name]
    (parent,) = stages_named(stages, "train", "parent")
    assert len(taught) == 2 and all(run.inputs["teacher"] is parent for run in taught)
    plain, short = (stages_named(stages, "train", f"steps-0.5/P-R{tag}")[0].facts["cost"] for tag in ("", "+short"))
    assert short[0] < plain[0] and short[1] == pytest.approx(plain[1], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [{**WANDA, "iterations": 0}]}, "iterations"),
        ({"methods": [{**WANDA, "iteration_schedule": "cubic"}]}, "goes with iterations of 2 or more"),
        ({"methods": [{"method": "shortgpt", "ratios": 0.5, "iterations": 3}]}, "would remove nothing"),
        ({"methods": [{"method": "sheared", "ratios": 0.5, "iterations": 2}]}, "learns what to cut"),
        ({"methods": [{**WANDA, "iterations": 20}]}, "17 whole optimizer steps of 64, too few for 20 recoveries"),
        ({"methods": [{**WANDA, "iterations": 2}], "sweep": {"rates": [1e-3, 2e-3]}}, "no rates to sweep"),
        (
            {
                "methods": [{**WANDA, "iterations": 2}],
                "retrain": {"tokens": [640, 1280], "trunk": "shared"},
                "recipe": {"sequence": 32, "tokens_per_step": 64, "schedule": "wsd"},
            },
            "shared trunk",
        ),
    ],
)
def test_what_cannot_be_in_steps_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(load_study(file_of(tmp_path, **changes)))
    assert message in str(caught.value) and "iterations" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_cell_in_steps_runs_and_is_compared_with_one_step(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    corpus = {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280}
    depth = {"method": "shortgpt", "ratios": 0.5, "iterations": 2, "settings": []}
    path = file_of(tmp_path, corpus=corpus, methods=[WANDA, {**WANDA, "name": "wanda-steps", "iterations": 3}, depth])
    assert main(["study", "run", str(path), "--out", str(out), "--jobs", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["failed"]
    masks = [load_masks(next(out.glob(f"stages/prune-wanda-steps-0.7-step-{n}-*")) / "model") for n in (1, 2, 3)]
    for early, late in itertools.pairwise(masks):
        assert all(not (late[name] & ~early[name]).any() for name in early)  # what is pruned stays pruned
    (plain,) = (load_masks(folder / "model") for folder in out.glob("stages/prune-wanda-0.7-*"))
    assert {name: int(mask.sum()) for name, mask in masks[-1].items()} == {n: int(m.sum()) for n, m in plain.items()}
    assert any(not (masks[-1][name] == plain[name]).all() for name in plain)  # scored anew on what was recovered
    (row,) = answer["steps"]
    assert (row["first"]["steps"], row["second"]["steps"]) == ("1 step", "3 steps (linear)")
    assert row["first"]["method"] == "wanda" and row["second"]["method"] == "wanda-steps"
    page = (out / "report.html").read_text()
    assert "Pruning in steps" in page and "in 3 steps with recovery between" in page
    rows = [line for line in (out / "curves.csv").read_text().splitlines() if line.startswith("P-R,wanda-steps")]
    assert [int(line.split(",")[4]) for line in rows] == [0, 320, 640, 1100]
