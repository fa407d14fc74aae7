"""The study as a user runs it: whole, killed, resumed, misconfigured."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur import progress
from secateur.cli import main
from secateur.config import dump_yaml
from secateur.data.shards import TokenStore
from secateur.model.plan import load_masks
from secateur.study.explain import explain_stage
from secateur.study.planner import stages_of
from secateur.study.resolve import resolve
from secateur.study.runner.lease import Lease
from secateur.study.runner.worker import ProgressRecorder, record_progress
from secateur.study.spec import load_study
from secateur.study.stage import Stage
from secateur.study.status import state_of
from secateur.study.store import Store, key_of


def study_file(folder: Path, text: Path, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "name": "micro",
        "corpus": {"source": f"text:{text}", "holdout": 0.2, "vocabulary": 280},
        "parent": {"tokens": "26k", "hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2},
        "methods": ["minitron-depth", "minitron-width", "wanda"],
        "ratios": [0.5],
        "retrain": {"tokens": 4100, "peak_rate": 2e-3},  # no multiple of anything: the last window and step are short
        "calibration": {"windows": 8},
        "recipe": {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1},
        "evaluation": {"windows": 24, "points": 2},
    }
    raw.update(changes)
    path = folder / "micro.yaml"
    path.write_text(dump_yaml(raw), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "secateur", *map(str, arguments)]


def run(*arguments: object) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(said.getvalue())


def records(out: Path) -> dict[str, str]:
    """Every file that must not depend on how the study was run."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("stages/**/*"))
        if path.is_file() and path.name != "runtime.json"
    }


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    file = study_file(folder, text)
    return file, folder / "out", run("study", "run", file, "--out", folder / "out", "--jobs", 2)


def record(out: Path, pattern: str) -> dict[str, Any]:
    return json.loads(next(out.glob(f"stages/{pattern}/record.json")).read_text())


def model(out: Path, pattern: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(next(out.glob(f"stages/{pattern}")) / "model")


def test_everything_ran_and_is_reported(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, answer = whole
    assert answer["ran"] == 27 and not answer["failed"] and not answer["skipped"]
    assert len(answer["verdicts"]) == 6
    assert all(v["winner"] in ("pruned", "scratch", "equal within margin", "undecided") for v in answer["verdicts"])
    assert (out / "report.html").stat().st_size > 10_000


def test_compare_agrees_with_the_report_on_the_same_models(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    """``secateur compare`` reads the files of two models, the report all records; both go by one rule."""
    _, out, answer = whole
    twins = {"training": "S_R", "total": "S_P+R"}
    for verdict in answer["verdicts"]:
        names = (f"{verdict['method']}-0.5-{path}" for path in ("P-R", twins[verdict["setting"]]))
        files = [next(out.glob(f"stages/evaluate-{name}-*/results.json")) for name in names]
        (row,) = run("compare", *files)["comparisons"]
        for key in ("difference", "interval", "p", "documents", "effective_documents"):
            assert row[key] == pytest.approx(verdict[key], abs=1e-9), key
        winner = {"A": "pruned", "B": "scratch"}.get(row["verdict"], row["verdict"])
        assert winner == verdict["winner"] or "Holm" in verdict["reason"]


def test_token_slices_are_exact(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = whole
    for name, want in {
        "train-parent-*": [0, 26_000],
        "train-wanda-0.5-P-R-*": [26_000, 30_100],
        "train-wanda-0.5-S_R-*": [26_000, 30_100],
        "train-wanda-0.5-S_P+R-*": [0, 30_100],
    }.items():
        found = record(out, name)
        assert found["stage"]["identity"]["slice"] == want
        assert found["result"]["tokens"] == want[1] - want[0]
        assert found["result"]["curve"][-1]["tokens"] == want[1] - want[0]


def test_masks_hold_and_the_twin_has_the_same_mask(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = whole
    masks = load_masks(next(out.glob("stages/prune-wanda-*")) / "model")
    assert len(masks) == 4 * 7
    for cell in ("P-R", "S_R", "S_P+R"):
        parameters = dict(model(out, f"train-wanda-0.5-{cell}-*").named_parameters())
        for name, mask in masks.items():
            assert torch.equal(parameters[name] != 0, mask), f"{cell}: {name}"


def test_depth_and_width_have_the_planned_shape(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = whole
    for method in ("minitron-depth", "minitron-width"):
        sizes = {
            cell: {n: p.shape for n, p in model(out, f"train-{method}-0.5-{cell}-*").named_parameters()}
            for cell in ("P-R", "S_R", "S_P+R")
        }
        assert sizes["P-R"] == sizes["S_R"] == sizes["S_P+R"]


def test_evaluation_is_the_loss_of_the_saved_model(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = whole
    store = TokenStore(next(out.glob("stages/corpus-*")))
    windows = store.tokens("heldout") // 32
    starts = [32 * (number * windows // 24) for number in range(24)]  # spread over the split
    ids = torch.stack([torch.from_numpy(store.read("heldout", at, at + 32)) for at in starts])
    found = record(out, "evaluate-minitron-width-0.5-P-R-*")["result"]
    with torch.no_grad():
        logits = model(out, "train-minitron-width-0.5-P-R-*")(ids).logits
    naive = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 280), ids[:, 1:].reshape(-1))
    assert found["loss"] == pytest.approx(float(naive), abs=1e-5)
    assert found["tokens"] == 24 * 31
    assert record(out, "train-minitron-width-0.5-P-R-*")["result"]["curve"][-1]["loss"] == found["loss"]


def test_second_run_redoes_nothing(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    file, out, first = whole
    before, page = records(out), (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    again = run("study", "run", file, "--out", out)
    assert again["ran"] == 0 and again["already_done"] == 27
    assert again["verdicts"] == first["verdicts"]
    assert records(out) == before
    assert (out / "report.html").read_bytes() == page


def test_a_failed_stage_is_told_and_never_zero(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"tokens": 1000, "hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    retrain = {"tokens": "900k"}  # more than there is
    file = study_file(tmp_path, text, methods=["minitron-depth"], parent=small, retrain=retrain)
    arguments = ["study", "run", str(file), "--out", str(tmp_path / "out"), "--jobs", "1", "--json"]
    assert main(arguments) == 1
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["failed"]) == 1 and answer["not_started"], "nothing is started after a failure"
    assert main([*arguments, "--keep-going"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert "give more text, or lower parent.tokens" in answer["failed"]["minitron-depth-0.5/P-R"]
    assert not answer["not_started"] and "minitron-depth-0.5/P-R" in answer["skipped"], "its evaluation"
    assert all(v["winner"] == "not measured" and v["difference"] is None for v in answer["verdicts"])
    assert "not measured" in (tmp_path / "out" / "report.html").read_text()
    (log,) = (tmp_path / "out" / "logs").glob("train-minitron-depth-0.5-P-R-*.log")
    assert "give more text" in log.read_text()


def stages_by_name(file: Path) -> dict[str, Stage]:
    """The stages of a study that are the first of their name."""
    study, found = load_study(file), {}
    for stage in stages_of(study, resolve(study)):
        found.setdefault(stage.name, stage)
    return found


def test_status_tells_where_each_stage_stands(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = study_file(tmp_path, text), Store(tmp_path / "out")

    def states() -> dict[str, str]:
        assert main(["study", "status", str(file), "--out", str(store.out), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["stages"]
        return {row["name"]: row["state"] for row in reversed(rows)}

    found = states()
    assert found.pop("corpus") == "to do" and set(found.values()) == {"waiting"} and not store.out.exists()
    stages = stages_by_name(file)
    begun, failed, running = (stages[name] for name in ("parent", "wanda-0.5/S_R", "corpus"))

    def claim(stage: Stage) -> Lease:
        claim = store.leases.acquire(key_of(stage), store.leases.state(key_of(stage)).number)
        assert claim is not None
        return claim

    for stage in (begun, failed):
        with claim(stage) as held:
            store.begin(stage, held)
            if stage is failed:
                store.note(store.work_folder(stage, held.number), error="no")
    told = {begun.name: "interrupted", failed.name: "failed"}
    with claim(running):
        assert states() == found | told | {"corpus": "running"}
    with claim(failed):  # once more
        assert states()[failed.name] == "running"
    assert states() == found | told | {"corpus": "to do"}


def test_a_running_stage_tells_other_processes_how_far_it_is(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Stage("train", "x", {})
    claim = store.leases.acquire(key_of(stage), 0)
    assert claim is not None
    with claim:
        store.begin(stage, claim)
        with record_progress(stage, store, store.work_folder(stage, claim.number)), progress.track("x", 200) as task:
            task.advance(50, "loss 3.200")
            assert state_of(stage, Store(tmp_path))[0] == "running"
        note = json.loads((store.work_folder(stage, claim.number) / "progress.json").read_text())
        assert note == {"task": "x", "share": 0.0, "note": "", "seconds_left": None}
        listener = ProgressRecorder(
            progress.SilentListener(),
            store.work_folder(stage, claim.number) / "progress.json",
            progress.SilentListener(),
        )
        listener.first["x"] = (time.monotonic() - 10, 0.0)
        listener.update("x", 50, 200, "loss 3.200")
        assert state_of(stage, Store(tmp_path)) == ("running", "25%  loss 3.200  ETA 0:30")


def test_only_some_stages_and_what_would_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--json"]

    def dry(file: Path, *arguments: str) -> dict[str, str]:
        assert main(["study", "run", str(file), *out, "--dry-run", *arguments]) == 0
        rows = json.loads(capsys.readouterr().out)["would_run"]
        return {f"{row['kind']} {row['name']}": row["reason"] for row in rows}

    file = study_file(tmp_path, text)
    some = dry(file, "--only", "minitron-*/S_R")
    assert list(some) == [
        "corpus corpus",
        "train minitron-depth-0.5/S_R",
        "evaluate minitron-depth-0.5/S_R",
        "train minitron-width-0.5/S_R",
        "evaluate minitron-width-0.5/S_R",
    ]
    assert set(some.values()) == {"no similar stage is finished"} and not (tmp_path / "out").exists()
    assert main(["study", "run", str(file), *out, "--only", "minitron-depth-.5/P-R"]) == 2
    assert "did you mean 'minitron-depth-0.5/P-R'?" in capsys.readouterr().err
    assert main(["study", "run", str(file), *out, "--only", "corpus"]) == 0
    capsys.readouterr()
    assert "corpus corpus" not in dry(file)
    file = study_file(tmp_path, text, corpus={"source": f"text:{text}", "holdout": 0.3, "vocabulary": 280})
    assert dry(file)["corpus corpus"] == "holdout: 0.2 -> 0.3"
    assert main(["study", "explain", str(file), "corpus", *out]) == 0
    (told,) = json.loads(capsys.readouterr().out)["stages"]
    assert told["state"] == "to do" and told["changes"] == [{"field": "holdout", "old": 0.2, "new": 0.3}]
    assert main(["study", "explain", str(file), "corpse", *out]) == 2
    assert "did you mean 'corpus'?" in capsys.readouterr().err


def test_explain_names_the_input_that_changed(tmp_path: Path) -> None:
    """A record of an earlier study file, whose corpus was another."""
    store = Store(tmp_path)

    def pair(holdout: float, rate: float) -> tuple[Stage, Stage]:
        corpus = Stage("corpus", "corpus", {"holdout": holdout})
        return corpus, Stage("train", "parent", {"recipe": {"rate": rate}}, {"corpus": corpus})

    for stage in pair(0.1, 1e-3):
        claim = store.leases.acquire(key_of(stage), 0)
        assert claim is not None
        with claim:
            store.begin(stage, claim)
            store.finish(stage, store.work_folder(stage, claim.number), claim, {}, {})
    corpus, parent = pair(0.2, 2e-3)
    found = explain_stage(parent, [corpus, parent], store)
    assert [str(change) for change in found.changes] == [
        "recipe.rate: 0.001 -> 0.002",
        "input corpus (corpus corpus): holdout: 0.1 -> 0.2",
    ]
    assert found.state == "waiting" and found.nearest == pair(0.1, 1e-3)[1].folder


@pytest.mark.slow
def test_a_stage_of_several_processes(text: Path, tmp_path: Path) -> None:
    """Under torchrun the first process alone claims and publishes."""
    shape = {"hidden": 16, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    small = {"parent": {"tokens": 1000, **shape}, "methods": ["shortgpt"], "retrain": {"tokens": 300}}
    file = study_file(tmp_path, text, **small, calibration={"windows": 4}, compute={"processes": 2})
    answer = run("study", "run", file, "--out", tmp_path / "out", "--only", "parent", "--device", "cpu")
    assert answer["ran"] == 3 and not answer["failed"]
    (runtime,) = (tmp_path / "out").glob("stages/train-parent-*/runtime.json")
    assert json.loads(runtime.read_text())["processes"] == 2
    assert record(tmp_path / "out", "train-parent-*")["result"]["tokens"] == 1000
    assert (tmp_path / "out").joinpath("logs", f"{runtime.parent.name}.log").read_text().count("attempt 1") == 1


def test_plan_is_pure(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    file = study_file(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["study", "plan", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.iterdir()) == before
    assert plan["training_tokens"] == 26_000 + 3 * (2 * 4100 + 30_100)
    assert len({stage["fingerprint"] for stage in plan["stages"]}) == 27


def test_identity_and_runtime(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stages(**changes: Any) -> dict[str, str]:
        main(["study", "plan", str(study_file(tmp_path, text, **changes)), "--json"])
        rows = json.loads(capsys.readouterr().out)["stages"]
        return {f"{r['kind']} {r['name']}": r["fingerprint"] for r in rows}

    base = stages()
    recipe = {"sequence": 32, "tokens_per_step": 64, "peak_rate": 3e-3, "init_std": 0.1}
    assert stages(recipe={**recipe, "micro_batch": 2}) == base
    assert stages(name="other", title="Other") == base
    longer = stages(retrain={"tokens": 5000, "peak_rate": 2e-3})
    same = {name for name in base if base[name] == longer[name]}
    assert "train parent" in same and "prune wanda-0.5" in same and "train wanda-0.5/S_R" not in same
    (text / "extra.txt").write_text("more text " * 50, encoding="utf-8")
    try:
        assert not set(stages().values()) & set(base.values()), "another text is another corpus"
    finally:
        (text / "extra.txt").unlink()


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"metods": ["wanda"]}, "metods: unknown key; did you mean 'methods'?"),
        ({"parent": {"tokns": 1}}, "parent.tokns: unknown key; did you mean 'tokens'?"),
        ({"methods": ["wnda"]}, "methods[0].method: 'wnda' is not a known method; did you mean 'wanda'?"),
        ({"ratios": [1.0]}, "ratios[0]: should be less than 1"),
        ({"ratios": [50]}, "ratios[0]: should be a share between 0 and 1, such as 0.5 or 50% (got 50)"),
        ({"recipe": {"lr": 1e-3}}, "recipe.lr: unknown key; did you mean 'peak_rate'?"),
        ({"ratios": [0.01]}, "ratio 0.01"),
        ({"ratios": "half"}, "ratios[0]: should be"),
        ({"retrain": {"tokens": "much"}}, "retrain.tokens[0]: 'much' is not a whole count"),
        ({"settings": ["equal_tokens"]}, "settings[0].kind: 'equal_tokens' is not known"),
        ({"corpus": {"source": "stdlb"}}, "did you mean 'stdlib'?"),
        ({"corpus": {"source": "text:/no/such/file"}}, "no such file"),
        ({"recipe": {"sequence": 32, "tokens_per_step": 65}}, "recipe.tokens_per_step: 65 is no multiple"),
        ({"calibration": {"windows": 100_000}}, "calibration.windows"),
    ],
)
def test_bad_study_files(
    changes: dict[str, Any], want: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file(tmp_path, text, **changes)
    assert main(["study", "run", str(file), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("secateur: error: ") and captured.err.count("\n") == 1
    assert str(file) in captured.err and want in captured.err
    assert not (tmp_path / "out").exists()
