"""The suite of a study: tasks, perplexities and cost of its models, item by item, and again after a kill."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import study_file

from secateur.errors import UserError
from secateur.evaluation.results import EvaluationResults
from secateur.report.judgement import judge
from secateur.study.collect import collect
from secateur.study.planner import stages_of
from secateur.study.resolve import resolve
from secateur.study.runner import local
from secateur.study.runner.worker import run_stage_attempt
from secateur.study.spec import load_study
from secateur.study.stage import Stage
from secateur.study.stages.evaluate import RESULTS
from secateur.study.store import Store

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, of the extra tasks")


def documents(folder: Path, name: str, count: int) -> None:
    """Questions about the words of the study's text, in the fields of ARC."""
    rows = []
    for number in range(count):
        texts = [f"ban{number}", f"dell {number % 3}", "gost"]
        choices = {"text": texts, "label": ["A", "B", "C"]}
        question = f"What follows lurk {number}?"
        rows.append({"id": str(number), "question": question, "choices": choices, "answerKey": "ABC"[number % 3]})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def suited(folder: Path, text: Path, suite: list[str], **fields: Any) -> Path:
    evaluation = {"windows": 24, "points": 2, "suite": suite, **fields}
    shape = {"hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    changes = {"methods": ["minitron-depth", "wanda"], "parent": {"tokens": "2k", **shape}}
    changes |= {"retrain": {"tokens": 600, "peak_rate": 2e-3}, "settings": ["equal_training_tokens"]}
    return study_file(folder, text, evaluation=evaluation, **changes)


def stages(file: Path) -> list[Stage]:
    study = load_study(file)
    return stages_of(study, resolve(study))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def do(stage: Stage, out: Path) -> None:
    ended = run_stage_attempt(stage, Store(out))
    assert ended.state == "done", ended.text


def test_what_is_timed_is_planned_once_for_each_shape(text: Path, tmp_path: Path) -> None:
    planned = stages(suited(tmp_path, text, ["cost"]))
    assert [s.name for s in planned if s.kind == "cost"] == ["parent", "minitron-depth-0.5/pruned", "wanda-0.5/pruned"]
    assert not any("suite" in s.identity for s in planned)


@pytest.mark.parametrize(
    ("suite", "fields", "says"),
    [
        (["cost"], {"few_shot": 0}, "evaluation.few_shot: nothing in evaluation.suite uses it"),
        (["zero-shott"], {}, "evaluation.suite zero-shott: is not known; did you mean 'zero-shot'?"),
        (["cost", "cost"], {}, "evaluation.suite cost,cost: has an empty or repeated name"),
        (["cost"], {"tasks_data": "x"}, "evaluation.tasks_data: nothing in evaluation.suite uses it"),
        (["cost"], {"task_limit": 3}, "evaluation.task_limit: nothing in evaluation.suite uses it"),
        ([], {"text_data": "x"}, "evaluation.text_data: nothing in evaluation.suite uses it"),
        (["perplexity"], {"protocol": "held"}, "evaluation.protocol held: is not known; did you mean 'heldout'?"),
        (["arc_easy"], {"tasks_data": "nowhere"}, "evaluation.tasks_data: nowhere/arc_easy.jsonl is missing"),
    ],
)
def test_an_impossible_evaluation_is_a_one_line_error(
    text: Path, tmp_path: Path, suite: list[str], fields: dict[str, Any], says: str
) -> None:
    file = suited(tmp_path, text, suite, **fields)
    with pytest.raises(UserError) as error:
        stages(file)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_content_is_identity_and_its_place_is_not(text: Path, tmp_path: Path) -> None:
    def fingerprints(folder: Path) -> set[str]:
        return {s.fingerprint for s in stages(suited(tmp_path, text, ["arc_easy"], tasks_data=str(folder)))}

    original, copy = tmp_path / "here", tmp_path / "there"
    original.mkdir()
    documents(original, "arc_easy", 4)
    shutil.copytree(original, copy)
    same = fingerprints(original)
    assert fingerprints(copy) == same
    documents(copy, "arc_easy", 5)
    changed = fingerprints(copy) ^ same
    kinds = {
        s.kind for s in stages(suited(tmp_path, text, ["arc_easy"], tasks_data=str(copy))) if s.fingerprint in changed
    }
    assert kinds == {"evaluate"}


@needs_lm_eval
def test_a_name_that_lm_eval_does_not_know_is_told_before_the_study_runs(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.suite arc_eazy: lm-eval has no task, .* did you mean 'arc_easy'?"):
        stages(suited(tmp_path, text, ["arc_eazy"]))


@needs_lm_eval
def test_a_group_and_examples_are_part_of_a_study(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "wmdp"
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(
        "secateur.evaluation.lm_eval.groups.index", lambda: manager.task_index
    )  # that of all takes many seconds
    for number, name in enumerate(("wmdp_bio", "wmdp_chem", "wmdp_cyber"), start=5):
        rows = [
            {"question": f"lurk {n}?", "choices": ["ban", "dell", "gost", "ji"], "answer": n % 4} for n in range(number)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("arc_easy", "arc_easy.examples"):
        documents(tmp_path, name, 6)

    def planned(**fields: Any) -> Stage:
        results = stages(suited(tmp_path, text, ["wmdp", "arc_easy"], tasks_data=str(tmp_path), **fields))
        return next(s for s in results if s.kind == "evaluate" and s.name == "parent")

    with_example = planned(few_shot=1)
    assert [group["name"] for group in with_example.identity["suite"]["groups"]] == ["wmdp"]
    assert len({planned().fingerprint, planned(few_shot=2).fingerprint, with_example.fingerprint}) == 3
    assert list(with_example.identity["suite"]["examples"]) == ["arc_easy"]
    out = tmp_path / "out"
    for stage in stages(suited(tmp_path, text, ["wmdp", "arc_easy"], tasks_data=str(tmp_path), few_shot=1)):
        if stage.kind in ("corpus", "train", "evaluate") and stage.name in (
            "corpus",
            "text",
            "parent",
            with_example.name,
        ):
            do(stage, out)
    results = EvaluationResults.load(Store(out).folder(with_example) / RESULTS)
    assert [m.name for m in results.measurements] == ["loss", "wmdp_bio", "wmdp_chem", "wmdp_cyber", "arc_easy", "wmdp"]
    assert [m.protocol["few_shot"] for m in results.measurements[1:5]] == [0, 0, 0, 1]  # wmdp says 0 itself
    *parts, _, whole = (m.value for m in results.measurements[1:])
    assert whole == pytest.approx(sum(p * n for p, n in zip(parts, (5, 6, 7), strict=True)) / 18)


@needs_lm_eval
def test_a_study_measures_its_models_item_by_item_and_goes_on_after_a_kill(text: Path, tmp_path: Path) -> None:
    data = tmp_path / "tasks"
    data.mkdir()
    documents(data, "arc_easy", 12)
    documents(data, "arc_challenge", 9)
    file = suited(tmp_path, text, ["arc_easy", "arc_challenge", "cost"], tasks_data=str(data))
    study, every, out = load_study(file), stages(file), tmp_path / "out"
    for stage in every:
        do(stage, out)
    store = Store(out)

    judgement = judge(collect(study, every, store, ""))
    names = [row.comparison.name for row in judgement.quality]
    assert names == ["arc_easy", "arc_challenge", "average of tasks"] * 2
    assert all(row.comparison.items in (12, 9, 21) for row in judgement.quality)
    (pruned, *_) = judgement.results.pruned
    assert pruned.running
    assert pruned.running.figure("decode")
    assert judgement.results.parents[0].running

    # a second attempt measures what is missing, and ends at the same bytes
    stage = next(s for s in every if s.kind == "evaluate" and s.name == "wanda-0.5/P-R")
    before = store.folder(stage)
    expected = {p.name: p.read_bytes() for p in before.iterdir() if p.name != "runtime.json"}
    whole = EvaluationResults.load(before / RESULTS)
    assert [m.name for m in whole.measurements] == ["loss", "arc_easy", "arc_challenge"]
    items = gzip.decompress(before.joinpath("results.jsonl.gz").read_bytes()).splitlines()
    assert sum(json.loads(line)["measurement"] == "arc_easy" for line in items) == 12
    shutil.rmtree(before)
    half = store.stages / f"{stage.folder}.partial-0"
    half.mkdir()
    EvaluationResults(whole.model, whole.measurements[:2]).save(half / RESULTS)
    evaluated: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        from secateur.evaluation import measure

        measure_task = measure.measure_task
        patch.setattr(measure, "measure_task", lambda *a, **k: (evaluated.append(a[1].name), measure_task(*a, **k))[1])
        do(stage, out)
    assert evaluated == ["arc_challenge"]
    rebuilt = store.folder(stage)
    assert {p.name: p.read_bytes() for p in rebuilt.iterdir() if p.name != "runtime.json"} == expected


def test_nothing_runs_beside_what_is_timed(text: Path, tmp_path: Path) -> None:
    planned = stages(suited(tmp_path, text, ["cost"]))
    timed = next(s for s in planned if s.kind == "cost")
    training = next(s for s in planned if s.kind == "train")
    launcher = local.LocalLauncher(tmp_path, jobs=2, device="cpu")
    assert launcher.room(timed)
    assert launcher.room(training)
    launcher.workers = [busy := _Busy(training)]  # type: ignore[list-item]
    launcher.free.pop()
    assert launcher.room(training)
    assert not launcher.room(timed)
    busy.stage = timed
    assert not launcher.room(training)
    launcher.device = "cuda"  # a GPU is the stage's own
    assert launcher.room(training)


class _Busy:
    def __init__(self, stage: Stage) -> None:
        self.stage: Stage | None = stage
