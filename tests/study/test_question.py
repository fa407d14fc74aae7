"""The question of a study: what it may name, what it leaves alone, when it is recorded, and the seeds that it needs."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from secateur.cli import main
from secateur.comparison.power import seeds_needed
from secateur.comparison.records import StudyResults
from secateur.config import dump_yaml
from secateur.errors import UserError
from secateur.study import collect
from secateur.study.declarations import read_declarations, record_question
from secateur.study.runner.scheduler import StudyOutcome
from secateur.study.session import Study
from secateur.study.stage import unique
from secateur.study.store import Store

TOTAL = {"comparisons": "equal_total_tokens"}


def study(folder: Path, question: dict[str, Any] | None, **changes: Any) -> Study:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("a text", encoding="utf-8")
    raw: dict[str, Any] = {
        "name": "micro",
        "corpus": {"source": f"text:{folder / 'text.txt'}", "vocabulary": 280},
        "parent": {"tokens": "16k", "hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2},
        "methods": ["minitron-depth", {"method": "wanda", "name": "sparse"}],
        "ratios": [0.5],
        "retrain": {"tokens": [4096, 8192], "peak_rate": 2e-3, "objective": ["language-model", "distill"]},
        "exclude": [{"objective": "distill", "method": "sparse"}],
        "seeds": [0, 1],
        "calibration": {"windows": 8},
        "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3},
        **({"question": question} if question else {}),
    }
    path = folder / "micro.yaml"
    path.write_text(dump_yaml(raw | changes), encoding="utf-8")
    return Study.load(path, folder / "out")


def finish(planned: Study, number: int) -> None:
    """Make the record of the first stages, and of one of an earlier version of the study."""
    folders = [planned.store.folder(stage) for stage in unique(planned.stages)[:number]]
    for folder in [*folders, planned.store.stages / "train-x-000000000000"]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_text("{}")


@pytest.mark.parametrize(
    ("selector", "number"),
    [
        ("equal_total_tokens", 6),
        ({"method": "sparse"}, 4),
        ({"target": 0.5, "setting": ["equal_total_tokens", "equal_training_tokens"]}, 12),
        ({"tokens": "8192", "objective": "language-model", "setting": "equal_total_tokens"}, 2),
        ({"objective": "distill", "tokens": 4096}, 2),
        ([{"method": "sparse", "tokens": 4096}, {"method": "sparse", "setting": "equal_total_tokens"}], 3),
    ],
)
def test_selectors_name_planned_comparisons_all_seeds_together(selector: Any, number: int, tmp_path: Path) -> None:
    question = study(tmp_path, {"comparisons": selector}).question
    assert question and len(question.comparisons) == len(set(question.comparisons)) == number
    assert all(entry["seeds"] == [0, 1] for entry in question.content["comparisons"])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"comparisons": {"method": "spars"}}, "question.comparisons[0].method: .* 'spars'; did you mean 'sparse'?"),
        ({"comparisons": ["equal_total_tokens", {"target": 0.4}]}, "question.comparisons[1].target: .*'0.5'"),
        ({"comparisons": {"tokens": 5000}}, "question.comparisons[0].tokens: "),
        ({"comparisons": {"method": "sparse", "objective": "distill"}}, "question.comparisons[0]: no comparison"),
        ({"comparisons": "equal_total_token"}, "did you mean 'equal_total_tokens'"),
        ({"comparisons": [{}]}, "question.comparisons: an entry needs at least one key"),
        ({"comparisons": []}, "question.comparisons: "),
        ({**TOTAL, "metric": "los"}, "question.metric: 'los' is not known; did you mean 'loss'?"),
        ({**TOTAL, "margin": -0.1}, "question.margin: "),
        ({**TOTAL, "yes": " "}, "question.yes: is empty"),
        ({**TOTAL, "asks": "?"}, "question.asks: unknown key; did you mean 'ask'?"),
    ],
)
def test_a_question_about_nothing_is_refused(question: dict[str, Any], message: str, tmp_path: Path) -> None:
    pattern = message.replace("[", r"\[").replace("]", r"\]").replace("?", r"\?")
    with pytest.raises(UserError, match=pattern):
        study(tmp_path, question)


def test_a_question_changes_no_stage(tmp_path: Path) -> None:
    fingerprints = [
        [stage.fingerprint for stage in study(tmp_path, question).stages]
        for question in (None, TOTAL, {**TOTAL, "margin": 0.1, "ask": "Which path?"})
    ]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


def test_the_hash_is_of_what_decides(tmp_path: Path) -> None:
    def hash_of(question: dict[str, Any], **changes: Any) -> str:
        declared = study(tmp_path, question, **changes).question
        assert declared
        return declared.hash

    first = hash_of(TOTAL)
    assert hash_of({"comparisons": {"setting": ["equal_total_tokens"]}, "margin": 0.02}) == first
    assert hash_of(TOTAL, title="Another title") == first
    others = [
        hash_of({**TOTAL, "margin": 0.05}),
        hash_of({**TOTAL, "yes": "a lower loss"}),
        hash_of(TOTAL, seeds=[0, 1, 2]),
        hash_of(TOTAL, methods=["minitron-depth"], exclude=[]),
    ]
    assert len({first, *others}) == 5


def test_a_run_records_the_question_before_its_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[list[tuple[str | None, int]]] = []

    def launch(self: Study, *_: Any) -> StudyOutcome:
        lists.append([(entry.hash, entry.stages_done) for entry in read_declarations(self.store)])
        return StudyOutcome()

    monkeypatch.setattr(Study, "_launch", launch)
    plain = study(tmp_path, None)
    plain.run()
    assert lists.pop() == [] and not (plain.out / "question.json").exists()
    first, second = study(tmp_path, TOTAL), study(tmp_path / "b", {**TOTAL, "margin": 0.1})
    assert first.question and second.question
    first.run()
    first.run()
    assert lists[-1] == [(first.question.hash, 0)]
    finish(first, 3)
    changed = Study(second.file, second.spec, second.stages, first.store, second.question)
    changed.run(only=["parent*"])
    assert lists[-1] == [(first.question.hash, 0), (second.question.hash, 3)]
    content = (first.out / "question.json").read_text()
    assert [entry["question"]["margin"] for entry in json.loads(content)] == [0.02, 0.1]
    assert str(tmp_path) not in content
    finish(first, 5)
    Study(plain.file, plain.spec, plain.stages, first.store).run()
    assert lists[-1][2:] == [(None, 5)]


def test_of_several_processes_one_records(tmp_path: Path) -> None:
    declared = study(tmp_path, TOTAL)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: record_question(Store(declared.out), declared.question, declared.stages), range(6)))
    assert len(read_declarations(declared.store)) == 1
    (declared.out / "question.json").write_text('[{"hash": 1, "extra": 2}]')
    with pytest.raises(UserError, match="is damaged"):
        read_declarations(declared.store)


def test_results_have_the_question_of_the_file_and_those_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = StudyResults("micro", "", "", (), (), (), {}, {}, {}, ())
    monkeypatch.setattr(collect, "collect", lambda *_: empty)
    declared, changed = study(tmp_path, TOTAL), study(tmp_path, {**TOTAL, "margin": 0.1})
    record_question(declared.store, declared.question, declared.stages)
    finish(changed, 4)
    results = changed.results()
    assert results.stages_done == 4
    assert results.question == changed.question
    assert [entry.hash for entry in results.declarations] == [declared.question and declared.question.hash]


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize(
    "verb", [["run"], ["run", "--launcher", "slurm"], ["status"], ["report"], ["explain", "corpus"]]
)
def test_a_file_is_no_folder_of_a_study(
    verb: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(tmp_path, TOTAL).file
    (tmp_path / "file").write_text("")
    assert main(["study", verb[0], str(path), *verb[1:], "--out", str(tmp_path / place)]) == 2
    assert capsys.readouterr().err == f"secateur: error: --out: {tmp_path / 'file'} is a file; name a folder\n"


def test_power_finds_seeds_and_prices_the_study_with_them(tmp_path: Path) -> None:
    asking = study(tmp_path, {"comparisons": {"method": "sparse", "tokens": 4096, "setting": "equal_total_tokens"}})
    power = asking.power(seed_sd=0.014, document_sd=0.0, documents=200)
    assert (power.comparisons, power.difference) == (1, 0.02)
    assert power.needed == (7, 7, 7, 7)  # a t-test of 0.02 at a standard deviation of 0.014
    by_seeds = {row.seeds: row for row in power.rows}
    assert by_seeds[7].power[0] == pytest.approx(0.88, abs=0.005)
    for seeds in (2, 3, 5):
        planned = study(tmp_path / "more", None, seeds=list(range(seeds))).plan()
        assert by_seeds[seeds].flops == pytest.approx(planned.flops)
    assert "7 seeds and 200 documents tell a difference of 0.02 nats" in str(power)
    several = study(tmp_path, None).power(seed_sd=0.014, document_sd=0.0)
    assert several.comparisons == 6 and several.needed[0] and several.needed[0] > 7
    assert asking.power(seed_sd=0.014, document_sd=0.05, documents=50, margin=0.1).needed[0] == 3
    with pytest.raises(UserError, match="`seed_std`: no such field; did you mean 'seed_sd'"):
        asking.power(seed_std=0.1)


def test_a_study_with_one_seed_is_priced_with_more(tmp_path: Path) -> None:
    single = study(tmp_path, TOTAL, seeds=[3])
    rows = {row.seeds: row.flops for row in single.power(seed_sd=0.01, document_sd=0.0).rows}
    assert rows[2] == pytest.approx(study(tmp_path, TOTAL, seeds=[3, 4]).plan().flops)


def test_a_pilot_gives_the_spread_of_the_decisive_comparisons(tmp_path: Path) -> None:
    asking = study(tmp_path, {"comparisons": {"method": "sparse", "tokens": 4096, "setting": "equal_total_tokens"}})
    pilot = tmp_path / "pilot"
    pilot.mkdir()

    def write(*rows: tuple[Any, ...]) -> None:
        keys = ("setting", "method", "target", "retrain_tokens", "objective", "seeds", "seed_sd", "document_sd")
        with (pilot / "comparisons.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((*keys, "effective_documents"))
            writer.writerows(rows)

    elsewhere = ("training", "minitron-depth", "0.5", 8192, "")
    decisive = ("total", "sparse", "0.5", 4096, "")
    write((*elsewhere, 3, 0.01, 0.3, 60), (*elsewhere, 2, 0.04, 0.9, 60), (*elsewhere, 1, "", 0.2, 60))
    power = asking.power(pilot=pilot, margin=1)
    assert power.spread.seeds == pytest.approx(((2 * 0.01**2 + 0.04**2) / 3) ** 0.5)
    assert (power.spread.documents, power.documents[0]) == (pytest.approx(0.3), 60)
    write((*elsewhere, 3, 0.01, 0.3, 60), (*decisive, 2, 0.02, 0.4, 50))
    power = asking.power(pilot=pilot, margin=1)
    assert (power.spread.seeds, power.spread.documents, power.documents[0]) == (0.02, 0.4, 50)
    assert asking.power(pilot=pilot, seed_sd=0.5, margin=2).spread.seeds == 0.5
    write((*decisive, 1, "", 0.4, 50))
    with pytest.raises(UserError, match="`seed_sd`: no comparison of the pilot has two seeds"):
        asking.power(pilot=pilot)
    (pilot / "comparisons.csv").write_text("setting,method\n")
    with pytest.raises(UserError, match="older version"):
        asking.power(pilot=pilot)


def test_documents_are_searched_as_far_as_it_takes(tmp_path: Path) -> None:
    asking = study(tmp_path, {"comparisons": {"method": "sparse", "tokens": 4096, "setting": "equal_total_tokens"}})
    far = asking.power(seed_sd=0.01, document_sd=1.0, documents=95)
    assert far.documents[0] == 95 and far.documents[1] > 8 * 95
    assert far.needed[0] is None and None not in far.needed[1:]
    assert seeds_needed(far.spread, far.documents[1] / 2) is None
    assert "95 documents are too few for any number of seeds up to 100. " in far.answer
    near = asking.power(seed_sd=0.01, document_sd=0.05, documents=100)
    assert near.documents == (100, 200, 400, 800)
    for spread, obstacle in {(0.5, 0.01): "between seeds, 0.5", (0.001, 1e9): "between documents, 1e\\+09"}.items():
        with pytest.raises(UserError, match=f"^a difference of 0.02 nats is out of reach: the spread {obstacle} nats"):
            asking.power(seed_sd=spread[0], document_sd=spread[1], documents=95)


@pytest.mark.parametrize(
    ("pilot", "vary", "note"),
    [
        (
            "training",
            "all",
            "share one parent, this study's each have their own: the spread between them",
        ),
        ("all", "training", "each have their own parent, this study's share one"),
        (None, "all", "does not say; this study's each have their own."),
        ("all", "all", ""),
    ],
)
def test_a_pilot_whose_seeds_vary_something_else_is_named(
    pilot: str | None, vary: str, note: str, tmp_path: Path
) -> None:
    row = {"setting": "total", "method": "sparse", "target": "0.5", "retrain_tokens": 4096, "objective": ""}
    row |= {"seeds": 3, "seed_sd": 0.01, "document_sd": 0.1, "effective_documents": 60}
    row |= {"seeds_vary": pilot} if pilot else {}
    (tmp_path / "comparisons.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    asking = study(tmp_path, TOTAL, seeds={"values": [0, 1], "vary": vary})
    power = asking.power(pilot=tmp_path, margin=0.1)
    assert power.note in str(power) and note in power.note and bool(power.note) is bool(note)
    assert not asking.power(pilot=tmp_path, margin=0.1, seed_sd=0.01).note


def test_power_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study(tmp_path, {**TOTAL, "margin": 0}).file

    def call(*options: object) -> tuple[int, str]:
        code = main(["study", "plan", str(file), *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    spread = ("--seed-sd", 0.02, "--document-sd", 0.1)
    code, text = call("--power", *spread, "--margin", 0.1, "--json")
    answer = json.loads(text)
    assert code == 0 and answer["power"] == 0.8 and answer["comparisons"] == 6
    assert answer["needed"][0]["seeds"] == min(r["seeds"] for r in answer["rows"] if r["power"][0]["power"] >= 0.8)
    refusals = {
        ("--power", *spread): "--margin: the question has none",
        ("--power", "--seed-sd", 0.02, "--margin", 0.1): "--document-sd: is missing",
        ("--power", "--seed-sd", 9, "--document-sd", 0.1, "--margin", 0.1): "error: a difference of 0.1 nats is out of",
        ("--power", "--pilot", tmp_path / "none", "--margin", 0.1): "no such file; --pilot takes",
        ("--margin", 0.1): "--margin: goes with --power",
    }
    for options, message in refusals.items():
        code, text = call(*options)
        assert code == 2 and message in text and text.count("\n") == 1, options
