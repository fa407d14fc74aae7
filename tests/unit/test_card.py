"""Model cards: what the Hub reads of an output, and what a person reads first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import secateur
from helpers import edit_config, tiny_family, token_corpus, windows
from secateur.cli import main
from secateur.model.card import Ancestry, model_card, pruning_method, short_source

CARD = """---
license: other
license_name: house-licence
license_link: LICENSE
language: [de, no]
base_model: house/tree-1B
tags: [garden]
datasets: [house/leaves]
---
# Tree

A model of trees.
"""
RECIPE = {"sequence": 16, "tokens_per_step": 64}


def card_of(result: Any) -> tuple[dict[str, Any], str]:
    card = ModelCard.load(Path(result) / "README.md")
    return card.data.to_dict(), card.text


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_family(tmp_path, "llama")
    (folder / "README.md").write_text(CARD)
    return folder


def test_the_card_of_a_pruned_model(source: Path, tmp_path: Path) -> None:
    pruned = secateur.prune(source, tmp_path / "p", method="wanda", pattern="2:4", calibration=windows())
    data, text = card_of(pruned)
    assert data == {
        "base_model": "house/tree-1B",
        "language": ["de", "no"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "house-licence",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["secateur", "pruning", "wanda"],
    }
    assert text.lstrip().startswith("# tree-1B, pruned with wanda\n")
    assert "**wanda** (sparse; arXiv:2306.11695" in text and "pattern 2:4" in text
    assert "sparsity: 50.0% of the weights of the blocks' linears" in text
    assert "the file is as large as before" in text and "60 tokens of token ids" in text


def test_the_card_of_a_trained_model(source: Path, tmp_path: Path) -> None:
    data = f"shards:{token_corpus(tmp_path / 'corpus', tokens=600, vocabulary=61)}"
    fields: dict[str, Any] = {"tokens": 512, "data": data, "recipe": RECIPE, "points": 1}
    pruned = secateur.prune(source, tmp_path / "p", method="magnitude", ratio=0.5)
    first = secateur.train(tmp_path / "t", init=pruned, **fields)
    again = secateur.train(tmp_path / "again", init=first, teacher=source, **fields)
    for result in (first, again):
        metadata, text = card_of(result)
        assert metadata["base_model"] == "house/tree-1B" and metadata["license_name"] == "house-licence"
        assert metadata["tags"][:3] == ["secateur", "pruning", "magnitude"]
        assert text.lstrip().startswith("# tree-1B, pruned with magnitude and trained on 512 tokens\n")
        before, after = result.curve[0]["loss"], result.heldout_loss
        assert f"held-out loss: {before:.4f} before, {after:.4f} after" in text
        assert "sparsity: 50.0% of the weights" in text and "as large as before" in text
    assert "distillation" in card_of(again)[0]["tags"] and "temperature 1" in card_of(again)[1]

    fresh = secateur.train(tmp_path / "f", init="scratch", like=source, **fields)
    metadata, text = card_of(fresh)
    assert not {"base_model", "license", "language"} & metadata.keys()
    assert "beginning with fresh weights" in text and text.lstrip().startswith("# Llama of ")


def test_the_card_of_a_narrower_model_has_its_size(source: Path, tmp_path: Path) -> None:
    pruned = secateur.prune(source, tmp_path / "p", method="random-width", shape={"ffn": 32})
    text = card_of(pruned)[1]
    assert "- size: " in text and "parameters instead of" in text and "as large as before" not in text


def test_a_model_of_the_hub_is_its_own_base(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(source))
    data = f"shards:{token_corpus(tmp_path / 'corpus', tokens=600, vocabulary=61)}"
    results = [
        secateur.prune("garden/oak@main", tmp_path / "p", method="magnitude", ratio=0.5),
        secateur.train(tmp_path / "t", init="hf:garden/oak", tokens=128, data=data, recipe=RECIPE, points=1),
    ]
    for result in results:
        metadata, text = card_of(result)
        assert metadata["base_model"] == "garden/oak" and metadata["license"] == "other"
        assert "# oak, " in text


def test_a_snapshot_of_the_hubs_cache_names_its_model(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--garden--oak" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    pruned = secateur.prune(snapshot, tmp_path / "p", method="magnitude", ratio=0.5)
    assert card_of(pruned)[0]["base_model"] == "garden/oak"


@pytest.mark.parametrize(
    ("name", "base"), [("garden/elm", ("garden/elm",)), ("/home/me/elm", ()), ("./elm", ()), ("elm", ()), ("", ())]
)
def test_a_folder_without_a_card_goes_by_its_configuration(name: str, base: tuple[str, ...], tmp_path: Path) -> None:
    folder = tiny_family(tmp_path, "llama")
    edit_config(folder, _name_or_path=name)
    assert Ancestry.read(folder) == Ancestry(base)


def test_a_path_is_no_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "README.md").write_text("---\nbase_model: [runs/a, garden/elm, garden/ash]\n---\n")
    ancestry = Ancestry.read(tmp_path)
    assert ancestry.base_model == ("garden/elm", "garden/ash") and ancestry.name is None
    card = ModelCard(model_card("T", ancestry, []))
    assert card.data.base_model == ["garden/elm", "garden/ash"]


@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\n- a\n- b\n---\n", "\ufeffno metadata", "---\nlicense: 5\n---\n"]
)
def test_a_damaged_card_ends_nothing(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert Ancestry.read(tmp_path) == Ancestry()
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_a_card_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    assert Ancestry.read(tmp_path) == Ancestry()
    assert "its metadata cannot be read (" in capsys.readouterr().err


def test_paths_of_this_machine_are_not_published() -> None:
    assert short_source("text:/home/me/corpus/c4.jsonl") == "text:c4.jsonl"
    assert short_source("hf:allenai/c4:en") == "hf:allenai/c4:en" and short_source("token ids") == "token ids"


def test_the_method_is_read_through_training() -> None:
    pruned = {"kind": "pruned", "method": "wanda"}
    assert pruning_method({"kind": "trained", "origin": {"kind": "trained", "origin": pruned}}) == "wanda"
    assert pruning_method({"kind": "trained"}) is None and pruning_method(None) is None


def test_the_family_is_printed_where_it_changes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["prune", str(source), str(out), "--method", "random-width", "--shape", "hidden=44"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("family"))
    assert line.startswith("family       written as Mistral instead of Llama") and "6 heads" in line
    assert line.removeprefix("family       ") in (out / "README.md").read_text()


def test_helium_says_why_it_becomes_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny_family(tmp_path, "helium"), tmp_path / "out"
    assert main(["prune", str(source), str(out), "--method", "random-width", "--shape", "hidden=40"]) == 0
    assert "written as Ernie4_5 instead of Helium, the same function: 6 heads of 8 channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "licence"),
    [("license: [mit]", "mit"), ("license:\n- mit\n- apache-2.0", ["mit", "apache-2.0"]), ("license: 3", None)],
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_licences_in_lists_and_behind_a_byte_order_mark(
    start: str, text: str, licence: str | list[str] | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"{start}---\n{text}\n---\n", encoding="utf-8")
    assert Ancestry.read(tmp_path).metadata.get("license") == licence
