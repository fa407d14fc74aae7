"""The documents of a study's held-out text: recorded, read from older results, or looked up in the corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_study import run, study_file

from secateur.comparison.records import Evaluation
from secateur.evaluation.results import EvaluationResults
from secateur.study.session import Study
from secateur.study.stages import execute
from secateur.study.stages.evaluate import RESULTS
from secateur.study.stages.inputs import corpus_tokens, holdout_protocol

PARENT = {"tokens": "2k", "hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose parent is trained and measured."""
    folder = tmp_path_factory.mktemp("documents")
    corpus = {"source": f"text:{text}", "vocabulary": 300, "holdout": 0.5}
    file = study_file(folder, text, corpus=corpus, parent=PARENT, evaluation={"windows": 40, "points": 2})
    run("study", "run", file, "--out", folder / "out", "--only", "parent")
    return Study.load(file, folder / "out")


@pytest.fixture
def study(finished: Study, tmp_path: Path) -> Study:
    """A copy of it, to be changed."""
    shutil.copytree(finished.out, tmp_path / "out")
    return Study.load(finished.file, tmp_path / "out")


def parent(study: Study) -> Evaluation:
    evaluation = study.results().parents[0].evaluation
    assert evaluation is not None
    return evaluation


def folder(study: Study, kind: str) -> Path:
    return next(study.store.stages.glob(f"{kind}-*"))


def forget_documents(study: Study, *, items: bool) -> None:
    """Make the evaluation one of an older version; with ``items``, also one without items by document."""
    path = folder(study, "evaluate") / "record.json"
    record = json.loads(path.read_text())
    del record["result"]["documents"]
    path.write_text(json.dumps(record))
    if items:
        EvaluationResults("parent").save(folder(study, "evaluate") / RESULTS)


def clusters_by_hand(study: Study) -> list[int]:
    """Join windows until no two clusters have a document in common."""
    stage = next(s for s in study.stages if s.kind == "evaluate")
    protocol = holdout_protocol(corpus_tokens(stage, study.store), stage.identity["windows"], stage.identity["seqlen"])
    sets = [set(row[1:].tolist()) for part in protocol.documents for row in part]
    number = list(range(len(sets)))
    for _ in sets:
        for i, first in enumerate(sets):
            for j, second in enumerate(sets):
                if first & second:
                    number[i] = number[j] = min(number[i], number[j])
    return number


def test_a_record_has_the_loss_of_each_document(finished: Study) -> None:
    evaluation = parent(finished)
    assert len(evaluation.documents) > 20 and evaluation.window_documents == ()
    assert sum(document.tokens for document in evaluation.documents) == evaluation.tokens
    total = sum(document.loss_sum for document in evaluation.documents)
    assert total / evaluation.tokens == pytest.approx(evaluation.loss, rel=1e-12)
    units = evaluation.units()
    assert units.unit == "documents" and len(np.unique(units.documents)) == len(units.values)
    assert np.average(units.values, weights=units.weights) == pytest.approx(evaluation.loss, rel=1e-12)


def test_documents_of_an_older_record_are_those_of_its_items(study: Study) -> None:
    recorded = parent(study)
    forget_documents(study, items=False)
    older = parent(study)
    assert [d.tokens for d in older.documents] == [d.tokens for d in recorded.documents]
    assert [d.loss_sum for d in older.documents] == pytest.approx([d.loss_sum for d in recorded.documents], rel=1e-12)


def test_windows_of_an_older_record_are_clustered_by_the_corpus(study: Study) -> None:
    forget_documents(study, items=True)
    evaluation = parent(study)
    assert evaluation.documents == ()
    by_hand = clusters_by_hand(study)
    assert len(by_hand) == len(evaluation.windows)
    assert np.unique(evaluation.window_documents, return_inverse=True)[1].tolist() == [
        sorted(set(by_hand)).index(n) for n in by_hand
    ]
    assert 20 < len(set(by_hand)) < len(by_hand)  # some windows share documents
    units = evaluation.units()
    assert units.unit == "windows of known documents"
    assert np.average(units.values, weights=units.weights) == pytest.approx(evaluation.loss, rel=1e-6)


def test_a_lost_corpus_is_built_again_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_documents(study, items=True)
    expected = parent(study).window_documents
    (study.out / "window-documents.json").unlink()
    before = sorted(study.out.iterdir())
    for path in folder(study, "corpus").glob("*.npy"):
        path.unlink()
    assert parent(study).window_documents == expected
    monkeypatch.setattr(execute, "run_stage", None)
    assert parent(study).window_documents == expected
    assert sorted(study.out.iterdir()) == sorted([*before, study.out / "window-documents.json"])


def test_windows_are_documents_where_the_corpus_has_others(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    forget_documents(study, items=True)
    path = folder(study, "evaluate") / "record.json"
    record: dict[str, Any] = json.loads(path.read_text())
    record["result"]["protocol"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(record))
    evaluation = parent(study)
    assert evaluation.window_documents == () and evaluation.units().unit == "windows"
    assert "each window counts as a document" in capsys.readouterr().err
