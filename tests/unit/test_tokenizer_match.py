"""Shards know whose ids they have: another tokenizer of the same size is refused wherever a model reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers import tiny_llama, token_corpus
from secateur.api import build_corpus
from secateur.cli import main
from secateur.data.tokenizer import load_tokenizer, train_tokenizer
from secateur.data.tokenizer_match import tokenizer_difference, tokenizer_hash

TEXTS = [f"the {a} of the {b} and so on" for a in ("hedge", "rose", "pear") for b in ("garden", "wall", "yard")]
VOCABULARY = 280
RECIPE = ["--set", "sequence=16", "--set", "tokens_per_step=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with that tokenizer."""
    directory = tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY, max_position_embeddings=32)
    shutil.copytree(folder, directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in the ids of the model."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n".join(json.dumps({"text": f"{text} {number}"}) for number in range(40) for text in TEXTS)
    (folder / "a.jsonl").write_text(text)
    build_corpus(f"text:{folder / 'a.jsonl'}", folder / "shards", tokenizer=model, holdout=0.2)
    return folder / "shards"


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a directory with an edited tokenizer.json."""
    shutil.copytree(folder, out)
    path = out / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return out


def reverse_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    words = sorted(vocabulary, key=lambda token: vocabulary[token])
    first = VOCABULARY - 20
    content["model"]["vocab"] = dict(zip(words, [*range(first), *range(VOCABULARY - 1, first - 1, -1)], strict=True))


def reverse_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def leave_out_bos(content: dict[str, Any]) -> None:
    content["post_processor"]["single"] = [{"Sequence": {"id": "A", "type_id": 0}}]


def join_merges(content: dict[str, Any]) -> None:
    """Write merges as older versions of tokenizers do."""
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]


def add_padding(content: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": VOCABULARY, "content": "<pad>", "special": True, **flags})


def set_truncation(content: dict[str, Any]) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("edit", "difference"),
    [
        (reverse_ids, "id 260 is"),
        (reverse_merges, "their merges differ"),
        (lower_case, "is from token 1 on ["),
        (leave_out_bos, "in the first and"),
    ],
)
def test_tokenizers_differ_in_ids_merges_normalisers_and_special_tokens(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], difference: str
) -> None:
    changed = edited(folder, tmp_path / "changed", edit)
    clause = tokenizer_difference(load_tokenizer(folder), load_tokenizer(changed))
    assert clause and difference in clause and "\n" not in clause
    assert tokenizer_hash(changed) != tokenizer_hash(folder)


@pytest.mark.parametrize("edit", [join_merges, add_padding, set_truncation])
def test_tokenizers_match_whatever_their_files_look_like(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    changed = edited(folder, tmp_path / "changed", edit)
    AutoTokenizer.from_pretrained(changed).save_pretrained(tmp_path / "saved")
    for directory in (changed, tmp_path / "saved"):
        assert tokenizer_difference(load_tokenizer(folder), load_tokenizer(directory)) is None
        assert tokenizer_difference(load_tokenizer(directory), load_tokenizer(folder)) is None
        assert tokenizer_hash(directory) == tokenizer_hash(folder)


def commands(model: Path, shards: Path, out: Path) -> dict[str, list[str]]:
    data = f"shards:{shards}"
    sheared = ["--method", "sheared", "--ratio", "0.5", "--option", "steps=2", "--seqlen", "16"]
    return {
        "train": ["train", str(out), "--init", str(model), "--tokens", "64", "--data", data, *RECIPE],
        "eval": ["eval", str(model), "--data", data, "--windows", "2", "--seqlen", "16"],
        "prune": ["prune", str(model), str(out), *sheared, "--calibration", data],
    }


@pytest.mark.parametrize(("verb", "option"), [("train", "--data"), ("eval", "--data"), ("prune", "--calibration")])
def test_every_verb_refuses_shards_of_another_tokenizer(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, option: str
) -> None:
    changed = edited(model, tmp_path / "changed", reverse_ids)
    assert main(commands(changed, shards, tmp_path / "out")[verb]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"secateur: error: {option}: shards:{shards} has the ids of another tokenizer than {changed}"
    )
    assert line.endswith("build the data with the model's tokenizer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_saved_tokenizer_passes_without_a_word(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    changed = edited(model, tmp_path / "changed", join_merges)
    AutoTokenizer.from_pretrained(changed).save_pretrained(changed)
    assert main(commands(changed, shards, tmp_path / "out")[verb]) == 0
    assert "tokenizer" not in capsys.readouterr().err


def test_shards_or_models_without_a_tokenizer_give_one_notice(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_shards = token_corpus(tmp_path / "bare", tokens=2000, vocabulary=VOCABULARY)
    bare_model = tiny_llama(tmp_path, vocab_size=VOCABULARY)
    for checkpoint, corpus, subject in (
        (model, bare_shards, f"shards:{bare_shards}"),
        (bare_model, shards, str(bare_model)),
    ):
        assert main(commands(checkpoint, corpus, tmp_path / "out")["eval"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "tokenizer" in line]
        assert lines == [
            f"{subject} has no tokenizer: whether shards:{corpus} has the ids of {checkpoint} is not checked"
        ]


def test_compare_refuses_losses_on_ids_of_different_tokenizers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = edited(model, tmp_path / "changed", reverse_ids)
    shards = token_corpus(tmp_path / "bare", tokens=2000, vocabulary=VOCABULARY)
    for directory in (model, changed):
        assert main([*commands(directory, shards, tmp_path)["eval"], "--out", str(tmp_path / "results")]) == 0
    files = [str(tmp_path / "results" / f"{directory.name}.json") for directory in (model, changed)]
    capsys.readouterr()
    assert main(["compare", *files]) == 2
    assert "have different tokenizers" in capsys.readouterr().err
    assert main(["compare", files[0], files[0]]) == 0


def test_positions_that_shorten_windows_are_named_for_shards_too(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(model), "--data", f"shards:{shards}", "--seqlen", "64"]) == 0
    assert "windows of 32 tokens instead of 64" in capsys.readouterr().err
