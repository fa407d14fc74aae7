from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from secateur import progress
from secateur.data.documents import Document
from secateur.data.installed_code import PACKAGES, package_source
from secateur.data.local_files import FileSource
from secateur.data.sources import open_source
from secateur.errors import RunError, UserError


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(source: str, **options: str) -> list[str]:
    return [document.text for document in open_source(source, **options).documents()]


def failure(source: str, **options: str) -> str:
    with pytest.raises((UserError, RunError)) as caught:
        list(open_source(source, **options).documents())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` without network, and with its cache in a folder of the test."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_stdlib_is_sorted_and_leaves_tests_and_other_packages_out():
    source = open_source("stdlib")
    ids = [document.id for document in source.documents()]
    assert ids == sorted(ids) and len(ids) == len(set(ids)) > 300
    assert "json/decoder.py" in ids
    parts = {part for name in ids for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    assert not [name for name in ids if "_sysconfigdata" in name]
    assert (source.size() or 0) > 5e6
    assert source.digest() == open_source("stdlib").digest()


def test_python_is_the_library_and_the_packages_that_secateur_needs():
    source = open_source("python")
    assert isinstance(source, FileSource)
    names = list(source.files)
    library = [f"stdlib/{name}" for name in open_source("stdlib").files]
    assert names[: len(library)] == library and len(set(names)) == len(names) > 5000
    for name in ("torch/nn/modules/linear.py", "numpy/linalg/_linalg.py", "yaml/loader.py", "PIL/Image.py"):
        assert name in names
    assert not [name for name in names if {"tests", "test", ".."} & set(name.split("/"))]
    assert "torch/version.py" not in names
    assert (source.size() or 0) > 1e8
    assert next(source.documents()).id.startswith("stdlib/")


def test_packages_of_the_corpus_are_what_secateur_cannot_do_without():
    """Each is reached from secateur's own requirements, without extras and conditions."""
    known, ahead = set(), ["secateur"]
    while ahead:
        name = re.sub(r"[-_.]+", "-", ahead.pop()).lower()
        if name not in known and (name == "secateur" or name in PACKAGES):
            known.add(name)
            bare = [text for text in metadata.requires(name) or [] if ";" not in text]
            ahead += [re.split(r"[^\w.-]", text)[0] for text in bare]
    assert known - {"secateur"} == set(PACKAGES)
    assert list(PACKAGES) == sorted(PACKAGES)


def test_a_package_that_is_not_whole_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("secateur.data.sources.PACKAGES", ("secateur-none",))
    message = failure("python")
    assert "python: the package secateur-none is not installed; install it with: " in message
    assert "-m pip install" in message and message.endswith(" --force-reinstall --no-deps secateur-none")
    (tmp_path / "p-1.dist-info").mkdir()
    (tmp_path / "p-1.dist-info" / "METADATA").write_text("Name: p\nVersion: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"the package p has no list of its files"):
        package_source("p")
    files = ("p/b.py", "p/a.py", "p/version.py", "p/tests/x.py", "p/c.so", "../../bin/p.py")
    (tmp_path / "p-1.dist-info" / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    with pytest.raises(UserError, match=r"p/b.py is not there; install it"):
        package_source("p")
    (tmp_path / "p").mkdir()
    for name in ("a", "b"):
        (tmp_path / "p" / f"{name}.py").write_text(name)
    assert package_source("p") == {f"p/{name}.py": tmp_path / "p" / f"{name}.py" for name in ("a", "b")}


def test_stdlib_replaces_bytes_that_are_not_utf8_and_skips_empty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"stdlib: .* holds no Python sources"):
        open_source("stdlib")
    for name in ("b.py", "test/x.py", "lib2to3/tests/data/y.py", "config-3-x/z.py", "_sysconfigdata_x.py", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"caf\xe9\r\n")
    (tmp_path / "a.py").touch()
    assert list(open_source("stdlib").documents()) == [Document("b.py", "caf�\r\n")]


def test_a_text_file_is_one_document_with_its_newlines(tmp_path: Path):
    for name in ("notes.txt", "README.md", "script.py", "LICENSE"):
        (tmp_path / name).write_bytes("eins\r\n\nzwei é\n".encode())
        assert list(open_source(f"text:{tmp_path / name}").documents()) == [Document(name, "eins\r\n\nzwei é\n")]


def test_a_folder_is_read_recursively_in_the_order_of_paths(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "ignored.md").write_text("ignored")
    (tmp_path / "z.TXT").write_text("last")
    lines(tmp_path / "b" / "a.jsonl", {"text": "one"}, {"text": " "}, {"text": "two", "n": 1})
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "a.parquet")
    source = open_source(f"text:{tmp_path}")
    assert source.name == f"text:{tmp_path.name}"
    assert [(d.id, d.text) for d in source.documents()] == [
        ("a.parquet:0", "p"),
        ("a.parquet:1", "q"),
        ("b/a.jsonl:1", "one"),
        ("b/a.jsonl:3", "two"),
        ("z.TXT", "last"),
    ]
    assert list(source.documents()) == list(source.documents())


def test_relative_paths_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert texts("text:a.txt") == ["here"]
    assert open_source("text:.").name == f"text:{tmp_path.name}"


def test_the_field_names_key_and_column(tmp_path: Path):
    rows = lines(tmp_path / "a.jsonl", {"body": "one \ud800", "text": 3})
    assert texts(f"text:{rows}", field="body") == ["one �"]
    pq.write_table(pa.table({"text": [1], "body": ["p"]}), tmp_path / "a.parquet")
    assert texts(f"text:{tmp_path / 'a.parquet'}", field="body") == ["p"]


def test_the_digest_follows_names_and_content_but_not_the_place(tmp_path: Path):
    digests = []
    for folder, name, text in (("1", "a.txt", "x"), ("2", "a.txt", "x"), ("3", "b.txt", "x"), ("4", "a.txt", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        digests.append(open_source(f"text:{tmp_path / folder}").digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "data.jsonl:2: not valid JSON"),
        (b'{"body": "a", "id": 1}\n', "data.jsonl:1: no field 'text'; the fields are body, id"),
        (b"{}\n", "data.jsonl:1: no field 'text'; the fields are none"),
        (b'\n{"text": 7}\n', "data.jsonl:2: the field 'text' is int, not text"),
        (b'{"text": null}\n', "data.jsonl:1: the field 'text' is null"),
        (b'["a"]\n', "data.jsonl:1: expected an object with the field 'text', got list"),
        (b'{"text": "\xff"}\n', "data.jsonl:1: not UTF-8"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "data.jsonl:1: not valid JSON"),
        (b"", "text:data.jsonl: holds no text"),
        (b'{"text": ""}\n', "text:data.jsonl: holds no text"),
    ],
)
def test_broken_json_lines(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "data.jsonl").write_bytes(content)
    assert message in failure(f"text:{tmp_path / 'data.jsonl'}")


def test_broken_parquet(tmp_path: Path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"not parquet")
    assert "data.parquet: not a readable parquet file" in failure(f"text:{path}")
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), path)
    assert "data.parquet: no column 'text'; the columns are a, b" in failure(f"text:{path}")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert texts(f"text:{path}") == ["x"]


def domains(source: str, **options: str) -> list[str]:
    return [document.domain for document in open_source(source, **options).documents()]


def test_domains_are_the_first_folders_or_a_field(tmp_path: Path):
    for name in ("b/x.txt", "a/deep/x.txt", "z.txt"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text("text")
    assert domains(f"text:{tmp_path / 'c'}") == ["a", "b", "."]
    assert domains(f"text:{tmp_path / 'c' / 'b'}") == domains(f"text:{tmp_path / 'c' / 'z.txt'}") == [""]
    rows = [{"text": "one", "kind": "k"}, {"text": "two", "kind": "l"}]
    (tmp_path / "d").mkdir()
    path = lines(tmp_path / "d" / "a.jsonl", *rows)
    pq.write_table(pa.table({"kind": ["p"], "text": ["three"]}), tmp_path / "d" / "b.parquet")
    assert domains(f"text:{tmp_path / 'd'}", domain="kind") == ["k", "l", "p"]
    assert domains(f"text:{tmp_path / 'd'}") == ["", "", ""]
    assert "a.jsonl:1: no field 'sort'" in failure(f"text:{path}", domain="sort")
    assert "no column 'sort'" in failure(f"text:{tmp_path / 'd' / 'b.parquet'}", domain="sort")
    assert "plain text has no field 'kind'" in failure(f"text:{tmp_path / 'c'}", domain="kind")
    assert "have no fields" in failure("stdlib", domain="kind")


@pytest.mark.usefixtures("offline")
def test_domains_of_a_dataset(tmp_path: Path):
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", {"text": "one", "kind": "k"}, {"text": "two", "kind": "l"})
    assert domains(f"hf:{tmp_path / 'set'}", domain="kind") == ["k", "l"]
    assert "no field 'sort'" in failure(f"hf:{tmp_path / 'set'}", domain="sort")


def test_the_size_is_that_of_the_text_within(tmp_path: Path):
    texts = [f"{n} " * 400 for n in range(500)]
    pq.write_table(pa.table({"text": texts, "other": ["x" * 999] * 500}), tmp_path / "a.parquet", compression="zstd")
    size = open_source(f"text:{tmp_path}").size()
    assert size is not None and 0.9 < size / sum(map(len, texts)) < 1.1


def test_broken_text(tmp_path: Path):
    assert "no such file or folder" in failure(f"text:{tmp_path / 'nowhere'}")
    (tmp_path / "only.md").write_text("x")
    assert "the folder has no .txt, .jsonl, .json, .csv, .tsv or .parquet file" in failure(f"text:{tmp_path}")
    (tmp_path / "data.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    assert "data.jsonl.gz: not a readable .gz file: Truncated" in failure(f"text:{tmp_path / 'data.jsonl.gz'}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: byte 3 is not UTF-8" in failure(f"text:{tmp_path / 'latin.txt'}")
    (tmp_path / "empty.txt").write_text("\n")
    assert "text:empty.txt: holds no text" in failure(f"text:{tmp_path / 'empty.txt'}")
    (tmp_path / "latin.txt").unlink()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert "dangling.txt: cannot be read" in failure(f"text:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("stdlb", "did you mean 'stdlib'?"),
        ("txt:corpus", "did you mean 'text'?"),
        ("stdlib:json", "did you mean 'stdlib'?"),
        ("text:", "names no text; write text:PATH"),
        ("hf", "names no text; write hf:NAME"),
        ("https://example.org", "known: hf, python, stdlib, text"),
    ],
)
def test_unknown_schemes(source: str, hint: str):
    assert hint in failure(source)


def test_a_path_without_scheme_is_explained(tmp_path: Path):
    assert f"write 'text:{tmp_path}'" in failure(str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_a_local_dataset(tmp_path: Path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    lines(folder / "train.jsonl", *({"text": f"document {n}" if n != 1 else "", "body": ""} for n in range(4)))
    lines(folder / "test.jsonl", {"text": "held", "body": "other"})
    source = open_source(f"hf:{folder}")
    assert source.name == "hf:wiki"
    assert [d.id for d in source.documents()] == ["train:0", "train:2", "train:3"]
    assert [d.text for d in islice(source.documents(), 2)] == ["document 0", "document 2"]
    assert texts(f"hf:{folder}", split="test", field="body") == ["other"]
    assert "hf:wiki: train row 0: no field 'txt'; the fields are text, body" in failure(f"hf:{folder}", field="txt")
    message = failure(f"hf:{folder}", split="valid")
    assert "Bad split: valid" in message and "split 'valid'" in message
    assert "'english' not found" in failure(f"hf:{folder}:english")
    before = source.digest()
    assert before != open_source(f"hf:{folder}", split="test").digest()
    folder.rename(tmp_path / "moved")
    assert before == open_source(f"hf:{tmp_path / 'moved'}").digest()
    lines(tmp_path / "moved" / "train.jsonl", {"text": "changed"})
    assert before != open_source(f"hf:{tmp_path / 'moved'}").digest()


@pytest.mark.usefixtures("offline")
def test_a_local_parquet_dataset_and_broken_ones(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert "hf:set: " in failure(f"hf:{folder}")  # no data files
    pq.write_table(pa.table({"text": ["p", "q"]}), folder / "part.parquet")
    assert texts(f"hf:{folder}") == ["p", "q"]
    pq.write_table(pa.table({"text": ["", " "]}), folder / "part.parquet")
    assert "hf:set: split 'train': holds no text; 2 documents skipped (2 empty)" in failure(f"hf:{folder}")
    pq.write_table(pa.table({"text": [1]}), folder / "part.parquet")
    assert "hf:set: train row 0: the field 'text' is int" in failure(f"hf:{folder}")
    (folder / "part.parquet").unlink()
    lines(folder / "train.jsonl", {"text": "a"})
    lines(folder / "test.jsonl", {"text": "a", "n": 1})
    assert "column names don't match" in failure(f"hf:{folder}", split="test")
    (folder / "test.jsonl").unlink()
    (folder / "train.jsonl").unlink()
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": 3\n')
    assert "hf:set: " in failure(f"hf:{folder}")


def test_a_stream_left_half_way_does_not_abort_the_process(tmp_path: Path):
    table = pa.table({"text": [f"document {n}" for n in range(20_000)]})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=1000)
    code = (
        "import sys; from itertools import islice; from secateur.data.sources import open_source;"
        "print(len(list(islice(open_source(sys.argv[1]).documents(), 3))))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / ".cache")}
    command = [sys.executable, "-c", code, f"hf:{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.usefixtures("offline")
def test_the_hub_out_of_reach(tmp_path: Path):
    source = open_source("hf:someone/something:english")  # the digest needs no network
    assert source.name == "hf:someone/something:english"
    assert source.digest() != open_source("hf:someone/something").digest()
    assert "hf:someone/something: the Hugging Face Hub cannot be reached" in failure("hf:someone/something")
    assert "no such folder" in failure(f"hf:{tmp_path / 'nowhere'}")
    assert "no such folder" in failure("hf:./nowhere")


def test_progress_without_a_known_end_tells_how_far(capsys: pytest.CaptureFixture[str]):
    shown = progress.LineListener(interval=0.0)
    for done in (0.0, 0.0, 0.0):
        shown.update("read hf:x", done, 0, "1,000 documents")
    shown.update("read text:x", 0.0, 10, "")
    shown.update("read text:x", 5.0, 10, "7 documents")
    said = capsys.readouterr().err.splitlines()
    assert set(said[:-1]) == {"read hf:x: 1,000 documents"}
    assert said[-1].startswith("read text:x: 50%  7 documents  ETA")


@pytest.mark.parametrize(("source", "hint"), [("c4", "write 'hf:c4'"), ("wikitext", "write 'hf:wikitext'")])
def test_a_bare_name_of_a_dataset(source: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        open_source(source)


def test_a_bare_name_near_a_built_in_source() -> None:
    with pytest.raises(UserError, match="did you mean 'stdlib'"):
        open_source("stdlb")
