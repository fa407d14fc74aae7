from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from secateur.config import identity, parse
from secateur.data import external_sort as runs
from secateur.data.corpus import CorpusSpec, build_corpus
from secateur.data.encode import encode_texts
from secateur.data.shards import TokenStore
from secateur.data.tokenizer import load_tokenizer, token_hash
from secateur.errors import UserError
from secateur.files import sha256_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """120 documents, of which the last twenty repeat earlier ones."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [{"text": f"document {n % 100}: " + "né\r\n " * (n % 100 % 7)} for n in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def build(out: Path, folder: Path, *, exist_ok: bool = False, **options: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=exist_ok)
    spec = {"source": f"text:{folder}", "vocabulary": 270, "holdout": 0.2, **options}
    return build_corpus(parse(CorpusSpec, spec, origin="test"), out)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens."""
    store, tokenizer = TokenStore(folder), load_tokenizer(folder / "tokenizer")
    bounds = [*store.offsets(split).tolist(), store.tokens(split)]
    ids = store.read(split, 0, store.tokens(split)).tolist()
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(bounds)]


def test_the_record_says_what_was_written(folder: Path, tmp_path: Path):
    record = build(tmp_path / "out", folder)
    store = TokenStore(tmp_path / "out")
    store.verify()
    assert json.loads(json.dumps(record)) == record
    assert str(tmp_path) not in json.dumps(record)
    assert record["source"] == "text:source"
    assert record["duplicates"] == 20
    assert sum(record["documents"].values()) == 100
    assert record["vocabulary"] == store.vocabulary == 270
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    for split in ("train", "heldout"):
        texts = documents(tmp_path / "out", split)
        assert record["documents"][split] == len(texts)
        assert record["bytes"][split] == sum(len(text.encode()) for text in texts)
        ids = store.read(split, 0, store.tokens(split))
        assert record["tokens"][split] == len(ids) == sum(map(len, encode_texts(tokenizer, texts)))
        assert record["bytes_per_token"][split] == record["bytes"][split] / len(ids)
        assert record["sha256"][split] == token_hash(ids)
    assert record["tokenizer_sha256"] == store.manifest.tokenizer_sha256 == sha256_tree(tmp_path / "out" / "tokenizer")


def test_no_document_is_on_both_sides_and_none_is_lost(folder: Path, tmp_path: Path):
    build(tmp_path / "out", folder)
    train, heldout = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "heldout")
    rows = [json.loads(line)["text"] for line in (folder / "a.jsonl").read_text().splitlines()]
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(set(rows))
    for text in rows:
        share = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        assert (text in heldout) == (share < 0.2)


def test_two_builds_are_the_same_whatever_the_order_of_files(folder: Path, tmp_path: Path):
    first = build(tmp_path / "1", folder)
    assert build(tmp_path / "2", folder) == first
    assert files(tmp_path / "1") == files(tmp_path / "2")
    rows = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(reversed(rows)))
    other = build(tmp_path / "3", folder)
    assert files(tmp_path / "3") == files(tmp_path / "1")
    assert other.pop("source_sha256") != first.pop("source_sha256")
    assert other == first


def test_the_seed_changes_the_order_and_nothing_else(folder: Path, tmp_path: Path):
    records = [build(tmp_path / str(seed), folder, seed=seed) for seed in (0, 1)]
    for split in ("train", "heldout"):
        first, second = documents(tmp_path / "0", split), documents(tmp_path / "1", split)
        assert first != second and sorted(first) == sorted(second)
    assert records[0].pop("sha256") != records[1].pop("sha256")
    assert records[0] == records[1]


def test_the_tokenizer_learns_from_train_only(folder: Path, tmp_path: Path):
    record = build(tmp_path / "1", folder)
    held = documents(tmp_path / "1", "heldout")
    rows = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["text"] not in held[1:]]
    (folder / "a.jsonl").write_text("".join(kept))
    assert build(tmp_path / "2", folder)["tokenizer_sha256"] == record["tokenizer_sha256"]


def test_at_most_so_many_documents_are_read(folder: Path, tmp_path: Path):
    record = build(tmp_path / "out", folder, documents=60)
    assert sum(record["documents"].values()) == 60 and record["duplicates"] == 0


def test_the_standard_library(tmp_path: Path):
    record = build(tmp_path / "out", tmp_path, source="stdlib", documents=40, vocabulary=512)
    assert record["source"] == "stdlib"
    assert record["bytes_per_token"]["train"] > 2


def test_a_build_that_was_killed_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = build(tmp_path / "1", folder)
    monkeypatch.setattr(runs, "BYTES", 2000)
    monkeypatch.setattr("secateur.data.build._BATCH_DOCUMENTS", 10)
    real, left = runs._save, [7]

    def dying(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(runs, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "2", folder)
    assert len(list((tmp_path / "2" / "checkpoints" / "runs").glob("run-*/finished"))) == 2
    monkeypatch.setattr(runs, "_save", real)
    assert build(tmp_path / "2", folder, exist_ok=True) == wanted
    assert files(tmp_path / "2") == files(tmp_path / "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1e-9}, "corpus.holdout: 1e-09 of 100 documents leaves no heldout document; raise"),
        ({"holdout": 0.999999}, "corpus.holdout: 0.999999 of 100 documents leaves no train document; lower"),
        ({"vocabulary": 100}, "make it 257 or more"),
        ({"vocabulary": 9999}, "lower the vocabulary to"),
        ({"source": "stdlb"}, "did you mean 'stdlib'"),
        ({"field": "body"}, "no field 'body'; the fields are text"),
        ({"holdout": 0}, "holdout: should be greater than 0"),
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'"),
    ],
)
def test_bad_specs(folder: Path, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", folder, **options)


def test_an_excerpt_is_a_stretch_of_each_document_at_a_place_that_its_hash_decides(folder: Path, tmp_path: Path):
    text = "".join(chr(97 + n % 26) * (1 + n % 7) for n in range(400))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(60)))
    record = build(tmp_path / "out", folder, excerpt=50)
    excerpts = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "heldout")
    places = {f"{n} {text}".find(part) for n in range(60) for part in excerpts}
    assert {len(part) for part in excerpts} == {50} and len(places - {-1}) > 20
    assert sum(record["bytes"].values()) == 50 * len(excerpts)
    again = build(tmp_path / "again", folder, excerpt=50)
    assert again["sha256"] == record["sha256"]
    whole = build(tmp_path / "whole", folder, excerpt=10_000)
    assert whole["bytes"]["train"] == build(tmp_path / "all", folder)["bytes"]["train"] > record["bytes"]["train"]


def test_a_corpus_without_an_excerpt_has_the_identity_of_before():
    assert "excerpt" not in identity(parse(CorpusSpec, {}, origin="test"))
    assert identity(parse(CorpusSpec, {"excerpt": 50}, origin="test"))["excerpt"] == 50


@pytest.mark.parametrize("key", ["documents", "excerpt"])
def test_shards_are_read_as_they_are(key: str):
    with pytest.raises(UserError, match=rf"corpus\.{key}: shards are read as they are"):
        parse(CorpusSpec, {"source": "shards:corpus", key: 50}, origin="test")
