"""A study that measures its models as they would be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.study.session import Study
from secateur.study.stage import unique

STUDY: dict[str, Any] = {
    "name": "served",
    "parent": {"tokens": 4096, "hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2},
    "methods": "magnitude",
    "ratios": 0.5,
    "retrain": {"tokens": 1000},
    "settings": "equal_training_tokens",
    "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1},
}


def load(text: Path, folder: Path, **evaluation: Any) -> Study:
    corpus = {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280}
    raw = {**STUDY, "corpus": corpus, "evaluation": {"windows": 16, "points": 1, **evaluation}}
    file = folder / "study.yaml"
    file.write_text(dump_yaml(raw), encoding="utf-8")
    return Study.load(file, folder / "out")


@pytest.mark.slow
def test_models_are_measured_in_each_form_and_nothing_else_changes(text: Path, tmp_path: Path) -> None:
    prints = {stage.fingerprint for stage in unique(load(text, tmp_path).stages)}
    study = load(text, tmp_path, weights="bf16")
    extra = [stage for stage in unique(study.stages) if stage.fingerprint not in prints]
    assert [(stage.kind, stage.name.rpartition("/")[2]) for stage in extra] == [("evaluate", "bf16")] * 2
    assert len(unique(study.stages)) == len(prints) + 2  # of the retrained model and its twin
    study.run(jobs=1)
    cells = {cell.name: cell for cell in study.results().cells}
    for cell in cells.values():
        stored, served = cell.evaluation, cell.served["bf16"]
        assert stored and served and served.loss == pytest.approx(stored.loss, abs=1e-2)
        assert served.loss != stored.loss and served.protocol != stored.protocol
        assert served.bytes == 2 * cell.parameters
    rows = study.judgement().served
    assert [row.weights for row in rows] == ["stored", "bf16"]
    assert rows[1].verdict.pruned_loss == cells["P-R"].served["bf16"].loss  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [["int3"], ["int8", "int8"]])
def test_bad_forms_are_refused(weights: list[str], text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.weights"):
        load(text, tmp_path, weights=weights)
