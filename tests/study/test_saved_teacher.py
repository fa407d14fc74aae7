"""Runs of a study that learn from what their parent has saved, beside runs with the parent in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.cli import main
from secateur.comparison.index import Index
from secateur.comparison.ledger import own_cost, pieces
from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.formatting import byte_size
from secateur.model.shapes import Shape, teacher_flops, train_flops
from secateur.study.session import Study

PARENT = {"tokens": 4096, "hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2}
SAVED = {"kind": "distill", "name": "saved", "teacher": "saved", "top_k": 32}


def study(text: Path, *objectives: Any, **changes: Any) -> dict[str, Any]:
    return {
        "name": "saved",
        "corpus": {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280},
        "parent": PARENT,
        "ratios": 0.5,
        "methods": "magnitude",
        "retrain": {"tokens": 1000, "peak_rate": 2e-3, "objective": list(objectives)},
        "settings": [],
        "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1},
        "evaluation": {"windows": 16, "points": 1},
        **changes,
    }


def write(folder: Path, raw: dict[str, Any]) -> Path:
    file = folder / "study.yaml"
    file.write_text(dump_yaml(raw), encoding="utf-8")
    return file


def test_a_saved_teacher_teaches_as_a_live_one_does_and_is_charged_once(
    text: Path, tmp_path: Path, capsys: Any
) -> None:
    live = {"kind": "distill", "name": "live", "top_k": 32}
    seeds = {"values": [0, 1], "vary": "training"}
    file = write(tmp_path, study(text, live, SAVED, seeds=seeds))
    assert main(["study", "plan", str(file)]) == 0
    size = byte_size(968 * (64 + 62 + 8))  # ids, deltas, the first and the rest of 31 windows of 31 rows, and one of 7
    note = f"Saved teachers: log-probabilities of 1 slice take {size} of disk; runs share them."
    assert note in capsys.readouterr().out
    assert main(["study", "run", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    results = Study.load(file, tmp_path / "out").results()
    cells = {(cell.objective, cell.seed): cell for cell in results.cells}
    parent, student = (Shape(**model.shape) for model in (results.parents[0], results.pruned[0]))
    stages = [stage for stage in results.stages if stage.kind == "teach"]
    assert len(stages) == 1
    for seed in (0, 1):
        one, two = cells["live", seed], cells["saved", seed]
        assert one.evaluation and two.evaluation
        assert two.evaluation.loss == pytest.approx(one.evaluation.loss, abs=1e-3)
        assert one.teaching is None and two.teaching and two.teaching.stage == stages[0].fingerprint
        totals = own_cost(one), own_cost(two)
        assert totals[0] and totals[1] and totals[1].flops == pytest.approx(totals[0].flops)
        assert two.training.flops == train_flops(student, 1000, 32) and two.training.tokens == 1000
    rows = [row for row in pieces(Index(results)) if "predictions" in row["what"]]
    assert [row["cost"].tokens for row in rows] == [1000]
    assert rows[0]["cost"].flops == teacher_flops(parent, 1000, 32) and "shared by 2 runs" in rows[0]["of"]


def test_runs_on_one_slice_share_what_a_parent_has_saved(text: Path, tmp_path: Path) -> None:
    raw = study(text, SAVED, {**SAVED, "name": "mixed", "alpha": 0.5}, {**SAVED, "name": "softer", "temperature": 2.0})
    raw["methods"] = ["magnitude", "minitron-depth"]
    plan = Study.load(write(tmp_path, raw)).plan()
    taught = [stage for stage in plan.stages if stage.kind == "teach"]
    assert [stage.tokens for stage in taught] == [1000, 1000]  # two temperatures
    assert plan.flops_by["saved teachers"] == sum(stage.flops for stage in taught)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({**SAVED, "top_k": 281}, "retrain.objective.top_k: 281 is more than the parent's vocabulary of 280"),
        ({"kind": "language-model", "teacher": "saved"}, "retrain.objective.teacher: saved goes with kind: distill"),
    ],
)
def test_what_cannot_be_saved_is_refused(objective: Any, message: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        Study.load(write(tmp_path, study(text, objective))).plan()
    assert message in str(refusal.value)
