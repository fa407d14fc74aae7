"""``push_to_hub``: what is checked before the work, and what is uploaded after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

import secateur
from helpers import tiny_family, token_corpus
from secateur.cli import main

CALLS: list[tuple[str, Any]] = []


class FakeHub:
    """In place of ``HfApi``: records what it is asked for."""

    failure: str = ""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        CALLS.append(("create", (repo_id, private, exist_ok)))
        if self.failure == "create":
            raise OSError("403 Forbidden\nno rights")
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: Any, commit_message: str) -> None:
        if self.failure == "upload":
            raise OSError("connection lost")
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        files = {
            name: (folder_path / name).read_bytes()
            for name in filter_repo_objects(names, ignore_patterns=ignore_patterns)
        }
        CALLS.append(("upload", (repo_id, files)))


@pytest.fixture(autouse=True)
def _hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    yield
    CALLS.clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_family(tmp_path, "llama")
    (folder / "LICENSE").write_text("terms")
    return folder


def training(folder: Path) -> dict[str, Any]:
    data = f"shards:{token_corpus(folder / 'corpus', tokens=600, vocabulary=61)}"
    return {"tokens": 128, "data": data, "recipe": {"sequence": 16, "tokens_per_step": 64}, "points": 1}


def test_a_pruned_model_is_uploaded_as_it_was_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["prune", str(source), str(out), "--method", "magnitude", "--ratio", "0.5", "--push-to-hub", "garden/oak"]
    assert main(line) == 0
    (create, created), (upload, (repository, files)) = CALLS
    assert (create, created) == ("create", ("garden/oak", True, True))
    assert (upload, repository) == ("upload", "garden/oak")
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "plan.safetensors", "LICENSE"} <= files.keys()
    assert b'path = "garden/oak"' in files["README.md"]


def test_a_trained_model_is_uploaded_without_its_trackers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_trackers(names: tuple[str, ...], work: Path, *_: str) -> tuple[()]:
        (work / names[0]).mkdir(exist_ok=True)
        (work / names[0] / "events").write_text("host")
        return ()

    monkeypatch.setattr("secateur.training.job.check_trackers", lambda _: None)
    monkeypatch.setattr("secateur.training.job.open_trackers", open_trackers)
    out = tmp_path / "t"
    secateur.train(out, init=source, push_to_hub="garden/elm", track=("tensorboard",), **training(tmp_path))
    _, (_, (repository, files)) = CALLS
    assert repository == "garden/elm" and (out / "tensorboard" / "events").is_file()
    assert files.keys() == {path.name for path in out.iterdir() if path.is_file()}
    assert b"garden/elm" in files["README.md"]


def test_a_learned_cut_is_uploaded(source: Path, tmp_path: Path) -> None:
    options = {"steps": 60, "windows": 2, "phi": 1000.0, "multiplier_rate": 300.0}
    fields: dict[str, Any] = {"calibration": training(tmp_path)["data"], "seqlen": 16, "options": options}
    secateur.prune(source, tmp_path / "out", method="sheared", ratio=0.3, push_to_hub="garden/ash", **fields)
    assert [call for call, _ in CALLS] == ["create", "upload"]


@pytest.mark.parametrize(
    "name", ["oak", "hf:garden/oak", "a/b/c", "garden/", "/oak", "garden/oak.git", "gar den/oak", ""]
)
def test_a_name_that_is_no_repository(name: str, source: Path, tmp_path: Path) -> None:
    for call in (
        lambda: secateur.prune(source, tmp_path / "o", method="magnitude", ratio=0.5, push_to_hub=name),
        lambda: secateur.train(tmp_path / "o", init=source, push_to_hub=name, **training(tmp_path)),
    ):
        with pytest.raises(secateur.UserError, match="write ORG/NAME") as error:
            call()
        assert error.value.field == "push_to_hub" and not CALLS


def test_without_a_token_nothing_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    out = tmp_path / "out"
    data = training(tmp_path)["data"]
    for line in (
        ["prune", str(source), str(out), "--method", "magnitude", "--ratio", "0.5"],
        ["train", str(out), "--init", str(source), "--tokens", "128", "--data", data],
    ):
        assert main([*line, "--push-to-hub", "garden/oak"]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(
            "secateur: error: --push-to-hub: no token of the Hugging Face Hub; run `hf auth login`"
        )
        assert not CALLS and not out.exists()


def test_a_hub_that_refuses_ends_it_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHub, "failure", "create")
    with pytest.raises(secateur.UserError, match="garden/oak cannot be created: 403 Forbidden; check") as error:
        secateur.prune(source, tmp_path / "o", method="magnitude", ratio=0.5, push_to_hub="garden/oak")
    assert error.value.field == "push_to_hub" and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


def test_an_upload_that_fails_leaves_the_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeHub, "failure", "upload")
    out = tmp_path / "out"
    line = ["prune", str(source), str(out), "--method", "magnitude", "--ratio", "0.5", "--push-to-hub", "garden/oak"]
    assert main(line) == 1
    assert f"connection lost; {out} is complete: upload it by `hf upload garden/oak {out}`" in capsys.readouterr().err
    assert (out / "model.safetensors").is_file()


def test_an_input_error_creates_no_repository(source: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "file").touch()
    with pytest.raises(secateur.UserError, match="already exists"):
        secateur.prune(source, tmp_path / "o", method="magnitude", ratio=0.5, push_to_hub="garden/oak")
    for fields in ({"out": None}, {"out": tmp_path / "p", "ratio": [0.3, 0.5]}):
        request: dict[str, Any] = {"method": "magnitude", "ratio": 0.5, "push_to_hub": "garden/oak", **fields}
        with pytest.raises(secateur.UserError) as error:
            secateur.prune(source, **request)
        assert error.value.field == "push_to_hub"
    assert not CALLS
