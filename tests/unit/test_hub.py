"""Names of checkpoints: directories, models of the Hub, and what is said where neither can be had."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from secateur.errors import UserError
from secateur.hub import is_hub_name, local_checkpoint

REVISION = "0123456789abcdef0123456789abcdef01234567"

ASK = """
import sys
from secateur.errors import UserError
from secateur.hub import local_checkpoint
assert "huggingface_hub" not in sys.modules
try:
    print(local_checkpoint(sys.argv[1], weights=sys.argv[2] == "weights"))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def ask(home: Path, name: str, *, weights: bool = True, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines on standard error of a process with its own Hub cache."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, name, "weights" if weights else "no"],
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(home), **environment},
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip().splitlines()


def cache(home: Path, model: str) -> Path:
    """A model in the Hub's cache, as its client lays it out; returns the snapshot."""
    folder = home / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize("name", ["org/name", "hf:org/name", "org/name@main", f"hf:org/name@{REVISION}"])
def test_a_cached_model_needs_no_network(tmp_path: Path, name: str):
    snapshot = cache(tmp_path, "org/name")
    code, out, lines = ask(tmp_path, name, weights=False, HF_HUB_OFFLINE="1")
    assert code == 0 and out == str(snapshot), lines


def test_a_model_that_cannot_be_had_is_one_line(tmp_path: Path):
    cache(tmp_path, "org/name")
    offline = "it is not in the cache, and HF_HUB_OFFLINE is set; unset it, or name a checkpoint directory"
    for name, line in {
        "org/other": f"org/other: no such directory, and it cannot be downloaded: {offline}",
        "hf:org/name@v2": f"hf:org/name@v2: cannot be downloaded: {offline}",
    }.items():
        code, out, lines = ask(tmp_path, name, HF_HUB_OFFLINE="1")
        assert code == 1 and not out and lines[-1] == f"error: {line}"
        assert len(lines) == 2 and "fetching from the Hugging Face Hub" in lines[0]
    code, out, lines = ask(tmp_path, "hf:org/other", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and len(lines) == 2
    assert "the Hub cannot be reached (" in lines[1] and lines[1].endswith("name a checkpoint directory")


def test_a_directory_comes_before_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "file").touch()
    assert local_checkpoint("org/name") == Path("org/name")
    assert local_checkpoint(str(tmp_path)) == tmp_path
    assert is_hub_name("hf:org/name") and is_hub_name("org/name@main") and not is_hub_name("org/name")
    with pytest.raises(UserError, match="org/file: not a directory; name a checkpoint directory or a Hub model"):
        local_checkpoint("org/file")


@pytest.mark.parametrize(
    "name", ["nowhere", "/no/where", "./no/where", "../where", "no/such/place", "no/where/", "~/where", "a/b@", "hf:"]
)
def test_a_name_that_is_neither(name: str):
    with pytest.raises(UserError) as raised:
        local_checkpoint(name)
    assert str(raised.value) == f"{name}: no such directory; name a checkpoint directory or a Hub model as org/name"


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B@refs/pr/1", "hf:gpt2", "a/b.c_d-e"])
def test_names_of_the_hub(name: str):
    assert is_hub_name(name)


def test_what_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "original/params.json",
        "modeling.py", "README.md", "LICENSE", "spiece.model", "vocab.txt", "additional_chat_templates/rag.jinja",
    ]  # fmt: skip

    def download(model: str, *, revision: str | None, **patterns: list[str]) -> str:
        if names := list(filter_repo_objects(files, **patterns)):
            requests.append((model, revision, names))
        return str(tmp_path)

    requests: list[tuple[str, str | None, list[str]]] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_checkpoint("org/name@v1") == local_checkpoint("hf:org/name", weights=False) == tmp_path
    small = ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
    small += ["README.md", "LICENSE", "spiece.model", "vocab.txt"]
    assert [(model, revision) for model, revision, _ in requests] == [("org/name", "v1")] * 2 + [("org/name", None)]
    assert requests[0][2] == ["additional_chat_templates/rag.jinja"]
    assert set(requests[1][2]) == {*small, files[1]} and set(requests[2][2]) == set(small)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("RepositoryNotFoundError", "the Hub has no such model, or it is private; check the name, or run"),
        ("GatedRepoError", "access is restricted; accept the terms at https://huggingface.co/org/name and run"),
        ("RevisionNotFoundError", "it has no revision 'v1'; name a branch, a tag or a commit"),
        ("DisabledRepoError", "Client error '404 Not Found'; try again, or name a checkpoint directory"),
    ],
)
def test_reasons_of_a_failure(monkeypatch: pytest.MonkeyPatch, kind: str, reason: str):
    error = getattr(errors, kind).__new__(getattr(errors, kind))  # its own arguments are an answer of the server
    error.args = ("Client error '404 Not Found'\nmore",)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    with pytest.raises(UserError) as raised:
        local_checkpoint("hf:org/name@v1")
    assert str(raised.value).startswith(f"hf:org/name@v1: cannot be downloaded: {reason}")


def test_a_full_disk_is_not_the_hubs_fault(monkeypatch: pytest.MonkeyPatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        local_checkpoint("org/name")
