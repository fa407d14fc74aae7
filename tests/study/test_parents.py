"""A study knows its checkpoints: windows within their positions, ids of their tokenizer; and its runs have steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.cli import main
from secateur.config import dump_yaml
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import RunError, UserError
from secateur.hub import local_checkpoint
from secateur.study import resolve
from secateur.study.session import Study
from secateur.study.stages import execute

POSITIONS = 96
RECIPE = {"sequence": 32, "tokens_per_step": 64}
SIZES = {"hidden": 16, "ffn": 32, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 280}


@pytest.fixture(scope="module")
def parent(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 96 positions with a tokenizer."""
    directory = tmp_path_factory.mktemp("parent")
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=POSITIONS,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    train_tokenizer((path.read_text() for path in sorted(text.iterdir())), 280).save_pretrained(directory)
    return directory


def write(folder: Path, text: Path, checkpoint: Any, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "name": "micro",
        "corpus": {"source": f"text:{text}", "holdout": 0.2},
        "parent": {"checkpoint": str(checkpoint)},
        "methods": ["magnitude"],
        "ratios": 0.5,
        "retrain": {"tokens": 4096},
        "settings": "equal_training_tokens",
        "calibration": {"windows": 8},
        "recipe": RECIPE,
    }
    path = folder / "micro.yaml"
    path.write_text(dump_yaml({k: v for k, v in (raw | changes).items() if v is not None}), encoding="utf-8")
    return path


def error_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["study", "plan", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"secateur: error: {path}: ")


@pytest.mark.parametrize(
    ("changes", "key", "length"),
    [
        ({"recipe": {"sequence": 128, "tokens_per_step": 128}}, "recipe.sequence", 128),
        ({"recipe": {"sequence": 8192}}, "recipe.sequence", 8192),
        ({"calibration": {"seqlen": 100}}, "calibration.seqlen", 100),
        ({"methods": [{"method": "wanda", "calibration": {"seqlen": 97}}]}, "methods[0].calibration.seqlen", 97),
    ],
)
def test_plan_refuses_windows_beyond_the_positions(
    text: Path,
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    key: str,
    length: int,
) -> None:
    line = error_of(write(tmp_path, text, parent, **changes), capsys)
    assert line == f"{key}: is {length}, but {parent} has {POSITIONS} positions; set {key}: {POSITIONS}"


def test_the_default_sequence_is_clipped_and_named(
    text: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text, parent, recipe={}, retrain={"tokens": "1M"})
    assert main(["study", "plan", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    note = f"recipe.sequence: 64 instead of the default 8192, since {parent} has {POSITIONS} positions"
    assert lines.count(note) == 1
    explicit = tmp_path / "explicit"
    explicit.mkdir()
    same = Study.load(write(explicit, text, parent, recipe={"sequence": 64}, retrain={"tokens": "1M"}))
    study = Study.load(path)
    assert not same.notes
    assert [stage.fingerprint for stage in same.stages] == [stage.fingerprint for stage in study.stages]


def test_a_checkpoint_of_the_hub_is_checked_in_the_cache_or_before_it_is_used(
    text: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "hf:org/model"
    corpus = {"source": f"text:{text}", "holdout": 0.2, "tokenizer": str(parent)}
    path = write(
        tmp_path, text, name, parent={"checkpoint": name, **SIZES}, corpus=corpus, recipe={"tokens_per_step": 8192}
    )
    with monkeypatch.context() as patch:
        patch.setattr(resolve, "cached_positions", lambda _: POSITIONS)
        assert error_of(path, capsys) == (
            f"recipe.sequence: is 8192, but {name} has {POSITIONS} positions; set recipe.sequence: {POSITIONS}"
        )

    def local(directory: Any, **options: Any) -> Path:
        return parent if str(directory) == name else local_checkpoint(directory, **options)

    monkeypatch.setattr(execute, "local_checkpoint", local)
    study = Study.load(path, tmp_path / "out")
    for stage in study.stages:
        work = study.store.folder(stage)
        work.mkdir(parents=True, exist_ok=True)
        if stage.kind in ("corpus", "fetch"):
            execute.run_stage(stage, study.store, work)
        elif stage.inputs.get("model", stage).kind == "fetch":
            with pytest.raises(UserError, match=f"recipe.sequence: is 8192, but {name} has {POSITIONS} positions"):
                execute.run_stage(stage, study.store, work)


def change_tokenizer(parent: Path, out: Path) -> Path:
    """A copy of the parent whose last two ids have changed places."""
    shutil.copytree(parent, out)
    content = json.loads((out / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda token: vocabulary[token])[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (out / "tokenizer.json").write_text(json.dumps(content))
    return out


def test_plan_refuses_a_corpus_of_another_tokenizer(
    text: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = change_tokenizer(parent, tmp_path / "changed")
    shards = tmp_path / "shards"
    assert main(["data", f"text:{text}", str(shards), "--tokenizer", str(parent)]) == 0
    capsys.readouterr()
    for corpus, key in (
        ({"source": f"shards:{shards}"}, "corpus.source"),
        ({"source": f"text:{text}", "tokenizer": str(parent)}, "corpus.tokenizer"),
    ):
        line = error_of(write(tmp_path, text, changed, corpus=corpus), capsys)
        assert line.startswith(f"{key}: ") and f"has the ids of another tokenizer than {changed}: id 278 is" in line
        assert main(["study", "plan", str(write(tmp_path, text, parent, corpus=corpus))]) == 0
        assert "tokenizer" not in capsys.readouterr().err
    own = {"tokens": "16k", **{key: size for key, size in SIZES.items() if key != "vocabulary"}}
    corpus = {"source": f"text:{text}", "vocabulary": 280}
    parents = {"own": own, "public": {"checkpoint": str(parent)}}
    path = write(tmp_path, text, parent, parent=None, parents=parents, corpus=corpus)
    assert "gets a tokenizer of its own, but parents.public.checkpoint" in error_of(path, capsys)


def test_plan_and_run_warn_of_few_steps_by_purpose(
    text: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"sequence": 32, "tokens_per_step": 1024}
    path = write(tmp_path, text, parent, recipe=recipe, retrain={"tokens": [8192, 16384, 102400]})
    warnings = [
        "Few steps (retraining): 2 runs of 8 to 16 optimizer steps, fewer than 50; "
        "recipe.tokens_per_step: 32 would give magnitude-0.5/P-R@8.192k 256.",
        "Few steps (from scratch): 2 runs of 8 to 16 optimizer steps, fewer than 50; "
        "recipe.tokens_per_step: 32 would give magnitude-0.5/S_R@8.192k 256.",
    ]
    assert main(["study", "plan", str(path)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "Few steps" in line] == warnings
    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.study.session.notify", messages.append)
        patch.setattr(Study, "_launch", lambda *_: (_ for _ in ()).throw(RunError("stop")))
        with pytest.raises(RunError):
            Study.load(path, tmp_path / "out").run()
    assert [message for message in messages if "Few steps" in message] == warnings
