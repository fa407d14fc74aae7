"""Formats of text files, compressed or not, and records without text: read, skipped and counted, or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import tiny_llama
from secateur.cli import main
from secateur.config import parse
from secateur.data.corpus import CorpusSpec, build_corpus
from secateur.data.shards import TokenStore
from secateur.data.sources import open_source
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import UserError

TEXTS = ["one, two", 'a "quoted" line\r\nand é', "NA", "007", "null"]
BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def texts(source: str, **options: Any) -> list[str]:
    return [document.text for document in open_source(source, **options).documents()]


def failure(source: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        texts(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def lines(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(TEXTS)).encode()


def array(field: str = "text") -> bytes:
    return json.dumps([{"id": n, field: text} for n, text in enumerate(TEXTS)], indent=1).encode()


def table(delimiter: str) -> Callable[[str], bytes]:
    def write(field: str = "text") -> bytes:
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=delimiter).writerows([["id", field], *enumerate(TEXTS)])
        return out.getvalue().encode()

    return write


FORMATS = {
    "a.jsonl": lines,
    "c4-train.00000-of-01024.json": lines,
    "a.ndjson": lines,
    "A.JSON": array,
    "a.csv": table(","),
    "a.tsv": table("\t"),
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_texts(tmp_path: Path, name: str, compression: str):
    path = tmp_path / (name + compression)
    for mark in (b"", BOM):
        path.write_bytes(COMPRESSORS[compression](mark + FORMATS[name]("body")))
        assert texts(f"text:{path}", field="body") == TEXTS
        assert texts(f"text:{tmp_path}", field="body") == TEXTS
    assert ": the columns are id" not in (message := failure(f"text:{path}"))
    assert "'text'; the " in message and "are id, body" in message


def test_a_compressed_text_is_one_document_without_its_mark(tmp_path: Path):
    for name, data in (("a.txt", BOM + b"text\r\n"), ("b.txt.gz", gzip.compress(BOM + b"text\r\n"))):
        (tmp_path / name).write_bytes(data)
        assert texts(f"text:{tmp_path / name}") == ["text\r\n"]
    (tmp_path / "c.jsonl").write_bytes(BOM + b'{"text": "one"}\n' + BOM + b'{"text": "two"}\r\n')  # two files, joined
    assert texts(f"text:{tmp_path / 'c.jsonl'}") == ["one", "two"]


def test_a_json_file_may_be_one_object(tmp_path: Path):
    (tmp_path / "a.json").write_text('{\n "text": "one",\n "n": [\n1]\n}\n')
    assert texts(f"text:{tmp_path / 'a.json'}") == texts(f"text:{tmp_path}") == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"', "a.json:1: not a valid JSON array"),
        ("a.json", b'["a", "b"]', "a.json: row 0: expected an object with the field 'text', got str"),
        ("a.json", b'[{"text": "a"}, {"text": "\xff"}]', "a.json: row 1: not UTF-8"),
        ("a.json", b'{"text": "a"}\n{"text": \n', "a.json:2: not valid JSON"),
        ("a.json", b"", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.csv", b"id,text\n1,a\n2,caf\xe9\n", "a.csv:3: not UTF-8"),
        ("a.csv", b"id,text\n1,a\n2\n", "a.csv:3: 1 cell under a header of 2"),
        ("a.csv", b'id,text\n1,"a\n2,b\n', "a.csv:3: not valid CSV"),
        ("a.csv", b"id;text\n1;a\n", "a.csv: no column 'text'; the columns are id;text"),
        ("a.csv", b"id,text\n", "holds no text"),
        ("a.csv", b"", "holds no text"),
        ("a.jsonl", "\ufeff{}\n".encode("utf-16-le"), "a.jsonl: UTF-16 text; convert it"),
        ("a.csv", "\ufefftext\n".encode("utf-16-be"), "a.csv: UTF-16 text; convert it"),
        ("a.txt", "\ufeffa".encode("utf-16-le"), "a.txt: UTF-16 text; convert it"),
        ("a.jsonl", "\ufeff{}\n".encode("utf-32-le"), "a.jsonl: UTF-32 text; convert it: iconv -f UTF-32"),
        ("a.csv", "\ufefftext\n".encode("utf-32-be"), "a.csv: UTF-32 text; convert it"),
        ("a.csv", b"text,id,text\na,1,b\n", "a.csv: several columns have the name 'text'; rename all but one"),
        *(
            (f"a{suffix}", LFS_POINTER, "holds a pointer of git-lfs")
            for suffix in (".txt", ".jsonl.gz", ".json", ".parquet")
        ),
        ("a.jsonl.gz", b'{"text": "a"}\n', "a.jsonl.gz: not a readable .gz file"),
        ("a.jsonl.gz", gzip.compress(lines() * 9)[:-9], "a.jsonl.gz: not a readable .gz file"),
        ("a.json.xz", b"text", "a.json.xz: not a readable .xz file"),
        ("a.json.zst", b"text", "a.json.zst: not a readable .zst file"),
        ("a.parquet.gz", b"text", "a.parquet.gz: a compressed parquet file cannot be read"),
        ("a.log", b'{"text": "a"}\n', "a.log: JSON without a suffix that says so; rename it"),
        (
            "a.jsonl",
            b'{"text": [{"role": "user", "content": "a"}]}',
            "a.jsonl:1: the field 'text' is chat data (a list of objects), not text: set `format` to messages",
        ),
        (
            "a.jsonl",
            b'{"messages": [], "id": 1}',
            "no field 'text'; 'messages' is chat data: set `format` to messages to read it",
        ),
        ("a.csv", b"conversations,n\n[],1\n", "a.csv: no column 'text'; 'conversations' is chat data: set `format`"),
        ("a.csv", b"\0,b\nc,d\n", "a.csv: no column 'text'; the columns are ?, b"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    assert message in failure(f"text:{tmp_path / name}")


def test_columns_of_one_name_are_refused_in_parquet(tmp_path: Path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "several columns have the name 'text'" in failure(f"text:{tmp_path / 'a.parquet'}")


def test_an_empty_name_of_a_field_is_no_default(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert "no field ''; the fields are text" in failure(f"text:{tmp_path / 'a.jsonl'}", field="")


def test_a_file_is_no_folder_of_a_dataset(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert f"is a file; write 'text:{tmp_path / 'a.jsonl'}'" in failure(f"hf:{tmp_path / 'a.jsonl'}")


def broken_parquet(path: Path) -> Path:
    """Write a column of three strings without a check, as some writers do; the second is not UTF-8."""
    binary = pa.array([b"one", b"caf\xe9", b"two"], pa.binary())
    strings = pa.StringArray.from_buffers(len(binary), binary.buffers()[1], binary.buffers()[2])
    pq.write_table(pa.table({"text": strings}), path)
    return path


def test_bad_rows_stop_or_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "a.jsonl"
    rows = [
        b'{"text": "one"}',
        b'{"text": null}',
        b'{"text": " "}',
        b'{"text": "caf\xe9"}',
        b'{"text": 3}',
        b"{",
        b"{}",
    ]
    path.write_bytes(b"\n".join([*rows, b'{"text": "two"}']))
    assert "a.jsonl:4: not UTF-8; convert the file, or set `on_bad_row` to skip such rows" in failure(f"text:{path}")
    capsys.readouterr()
    assert texts(f"text:{path}", on_bad_row="skip") == ["one", "two"]
    counts = "1 null, 1 empty, 1 not UTF-8, 1 not text, 1 malformed, 1 without the field"
    assert capsys.readouterr().err == f"text:a.jsonl: 6 documents skipped ({counts})\n"
    assert texts(f"text:{path}", on_bad_row="skip", blank=True) == ["one", " ", "two"]
    path.write_bytes(rows[4])
    message = failure(f"text:{path}", on_bad_row="skip")
    assert (
        "holds no text; 1 document skipped (1 not text), the first: " in message and "a.jsonl:1: the field" in message
    )
    assert "on_bad_row" not in failure(f"text:{path}")  # no row has text: the field may be the wrong one
    for name, data in (
        ("a.csv", b"text\none\ncaf\xe9\n\ntwo\n"),
        ("a.json", b'[{"text":"one"},{"text":"\xe9"},{"text":"two"}]'),
    ):
        (tmp_path / name).write_bytes(data)
        assert texts(f"text:{tmp_path / name}", on_bad_row="skip") == ["one", "two"]
    source = f"text:{broken_parquet(tmp_path / 'a.parquet')}"
    assert "a.parquet: row 1: not UTF-8" in failure(source)
    assert texts(source, on_bad_row="skip") == ["one", "two"]


def test_a_domain_that_is_null_is_a_bad_row(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "kind": "k"}\n{"text": "two", "kind": null}\n')
    assert "a.jsonl:2: the field 'kind' is null" in failure(f"text:{tmp_path / 'a.jsonl'}", domain="kind")


def test_a_folder_of_several_formats_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "mix"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("text")
    assert texts(f"text:{folder}") == ["text"] and capsys.readouterr().err == ""
    digest = open_source(f"text:{folder}").digest()
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(lines()))
    (folder / "dataset_info.json").write_text('{"splits": {}}')
    for name in ("README.md", "NOTES.md", "b.parquet.gz", "LICENSE", ".hidden"):
        (folder / name).write_text("x")
    (folder / "linked").symlink_to(tmp_path)
    assert texts(f"text:{folder}") == ["text", *TEXTS]
    assert capsys.readouterr().err == (
        "text:mix: 2 files read (1 .txt, 1 .jsonl.gz); 6 passed over "
        "(2 .md, 1 without a suffix, 1 .parquet.gz, 1 .json without the text field, 1 linked folder)\n"
    )
    (folder / "deep" / "b.jsonl.gz").unlink()
    assert open_source(f"text:{folder}").digest() == digest  # files that are not read are no part of it


def test_a_field_of_plain_text_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    for source in (f"text:{tmp_path / 'a.txt'}", f"text:{tmp_path}", "stdlib"):
        assert "which has no field 'body'; leave it out" in failure(source, field="body")
    assert texts(f"text:{tmp_path}", field="text") == texts(f"text:{tmp_path}", default_field="body") == ["text"]


def save(folder: Path, *rows: object, field: str = "text") -> datasets.Dataset:
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list([{field: row} for row in rows])
    dataset.save_to_disk(folder)
    return dataset


def test_a_saved_dataset(tmp_path: Path):
    dataset = save(tmp_path / "saved", "one", None, "two")
    source = f"hf:{tmp_path / 'saved'}"
    assert texts(source) == ["one", "two"]
    assert "write 'hf:" in failure(f"text:{tmp_path / 'saved'}")
    assert "hf:saved: no column 'body'; the columns are text" in failure(source, field="body")
    assert "hf:saved: holds one split" in failure(source, split="test")
    assert "has no configurations; leave out 'en'" in failure(f"{source}:en")
    digest = open_source(source).digest()
    dataset.select([0, 1]).save_to_disk(tmp_path / "saved")
    assert open_source(source).digest() != digest
    save(tmp_path / "chat", [{"role": "user", "content": "a"}], field="messages")
    assert "hf:chat: no column 'text'; 'messages' is chat data: set `format` to messages" in failure(
        f"hf:{tmp_path / 'chat'}"
    )
    datasets.DatasetDict({"test": dataset, "valid": dataset}).save_to_disk(tmp_path / "splits")
    message = failure(f"hf:{tmp_path / 'splits'}")
    assert "no split 'train'; the splits are test, valid; name the folder of one, e.g. hf:" in message
    assert texts(message.rpartition("e.g. ")[2]) == texts(f"hf:{tmp_path / 'splits'}", split="valid") == ["one", "two"]


def test_a_saved_dataset_or_a_local_one_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    path = broken_parquet(tmp_path / "set" / "a.parquet")
    assert "hf:set: train row 1 or one after it is not UTF-8" in failure(f"hf:{tmp_path / 'set'}")
    datasets.Dataset(pq.read_table(path)).save_to_disk(tmp_path / "saved")
    assert "hf:saved: row 1: not UTF-8" in failure(f"hf:{tmp_path / 'saved'}")
    assert texts(f"hf:{tmp_path / 'saved'}", on_bad_row="skip") == ["one", "two"]


def test_a_local_dataset_lists_the_files_that_datasets_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "set" / name).write_text('{"text": "one"}\n')
    (tmp_path / "linked").symlink_to(tmp_path / "set")
    assert texts(f"hf:{tmp_path / 'linked'}") == ["one", "one"] and capsys.readouterr().err == ""
    (tmp_path / "set" / "notes.txt").write_text("text")
    assert texts(f"hf:{tmp_path / 'linked'}") == ["one", "one"]
    assert capsys.readouterr().err == "hf:set: 2 files read (2 .jsonl); 1 passed over (1 .txt)\n"


def test_every_verb_reads_the_formats_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"the gardener prunes tree {n} in spring. " * 9 for n in range(12)]
    tokenizer = train_tokenizer(words, 280)
    model = tiny_llama(tmp_path, vocab_size=300)
    tokenizer.save_pretrained(model)
    rows = "".join(json.dumps({"body": text}) + "\n" for text in words)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(rows.encode() + b'{"body": null}\n{"body": 3}\n'))

    def run(verb: str, name: str, *options: str) -> tuple[int, dict[str, Any], str]:
        source, out = f"text:{tmp_path / name}", str(tmp_path / f"{verb}-{name}")
        cut = ["--seqlen", "32", "--windows", "100"]
        command = {
            "eval": ["eval", str(model), "--data", source, *cut],
            "prune": ["prune", str(model), out, "--method", "wanda", "--ratio", "0.5", "--calibration", source, *cut],
            "data": ["data", source, out, "--tokenizer", str(model), "--workers", "1", "--holdout", "0"],
        }[verb]
        code = main([*command, "--field", "body", "--json", *options])
        output = capsys.readouterr()
        return code, json.loads(output.out) if code == 0 else {}, output.err

    def answer(verb: str, record: dict[str, Any]) -> object:
        if verb == "eval":
            return record["results"][0]["measurements"][0]["value"]
        return record["calibration"]["hash"] if verb == "prune" else record["sha256"]

    for verb in ("eval", "prune", "data"):
        code, _, err = run(verb, "b.json.gz")
        assert code == 2 and err.splitlines()[-1].startswith("secateur: error: ") and "b.json.gz:14: the field" in err
        assert "or set --on-bad-row to skip such rows" in err
        code, record, err = run(verb, "b.json.gz", "--on-bad-row", "skip")
        assert code == 0, err
        assert "text:b.json.gz: 2 documents skipped (1 null, 1 not text)" in err
        assert answer(verb, record) == answer(verb, run(verb, "a.jsonl")[1])


def test_a_study_corpus_skips_bad_rows_only_if_it_says_so(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"text {n}" * 40} for n in range(40)] + [{"text": 3}]))
    spec = {"source": f"text:{tmp_path / 'a.json'}", "vocabulary": 270, "holdout": 0.2}
    with pytest.raises(UserError, match="row 40: the field 'text' is int"):
        build_corpus(parse(CorpusSpec, spec, origin="test"), tmp_path / "out")
    build_corpus(parse(CorpusSpec, {**spec, "on_bad_row": "skip"}, origin="test"), tmp_path / "out")
    assert sum(split.documents for split in TokenStore(tmp_path / "out").manifest.splits.values()) == 40
