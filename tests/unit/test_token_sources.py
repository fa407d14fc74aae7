"""Documents that come as ids: Arrow files, array_record, and the messages in the latter."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from secateur.cli import main
from secateur.data.encode import hash_of_ids
from secateur.data.shards import TokenStore
from secateur.data.tf_example import int64_features
from secateur.data.token_sources import is_tokenized, open_tokenized
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import UserError

ROWS = [[5, 6, 7], [8], [], [9, 10, 299, 0], [8]]


def save(path: Path, kind: Any = None, *, stream: bool = True, rows: Any = ROWS, **columns: Any) -> Path:
    """An Arrow file with ``input_ids`` in two record batches."""
    table = pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int32())), **columns})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def found(source: str, **options: Any) -> list[list[int]]:
    return [d.ids.tolist() for d in open_tokenized(source, **options).documents() if d.ids is not None]


def failure(source: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(open_tokenized(source, **options).documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_a_source_of_ids():
    assert is_tokenized("arrow:x") and is_tokenized("array_record:x:y")
    assert not is_tokenized("text:arrow:x") and not is_tokenized("hf:arrow") and not is_tokenized("stdlib")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())])
def test_arrow_files_of_either_kind(tmp_path: Path, kind: Any, stream: bool):
    path = save(tmp_path / "a.arrow", kind, stream=stream)
    assert found(f"arrow:{path}") == [row for row in ROWS if row]
    ids = [document.id for document in open_tokenized(f"arrow:{path}").documents()]
    assert ids == ["a.arrow: row 0", "a.arrow: row 1", "a.arrow: row 3", "a.arrow: row 4"]


def test_rows_of_one_length_and_other_columns(tmp_path: Path):
    path = save(tmp_path / "a.arrow", pa.list_(pa.int64(), 2), rows=[[1, 2], [3, 4], [5, 6], [7, 8]])
    assert found(f"arrow:{path}") == found(f"arrow:{path}:input_ids") == [[1, 2], [3, 4], [5, 6], [7, 8]]
    path = save(tmp_path / "b.arrow", mine=pa.array([[1]] * 5), kind_of=["a", "b", "a", "b", "c"])
    assert found(f"arrow:{path}:mine") == [[1]] * 5
    assert [d.domain for d in open_tokenized(f"arrow:{path}", domain="kind_of").documents()] == ["a", "b", "b", "c"]


def test_what_datasets_saves(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_dict({"input_ids": rows}) for rows in (ROWS, [[1, 2]]))
    train.save_to_disk(tmp_path / "plain", num_shards=2)
    assert found(f"arrow:{tmp_path / 'plain'}") == [row for row in ROWS if row]
    train.select([3, 0]).save_to_disk(tmp_path / "chosen")
    assert found(f"arrow:{tmp_path / 'chosen'}") == [ROWS[3], ROWS[0]]
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "dict")
    assert found(f"arrow:{tmp_path / 'dict'}") == [row for row in ROWS if row]
    assert found(f"arrow:{tmp_path / 'dict'}", split="test") == [[1, 2]]
    assert "no split 'dev'; set `split` to one of test, train" in failure(f"arrow:{tmp_path / 'dict'}", split="dev")


def test_broken_arrow(tmp_path: Path):
    path = save(tmp_path / "a.arrow", words=["x"] * 5, gap=pa.array([[1], None, [1], [1], [1]]))
    assert "no column 'ids'; the columns are input_ids, words, gap" in failure(f"arrow:{path}:ids")
    assert "'words' is string, not lists of whole numbers" in failure(f"arrow:{path}:words")
    assert "'gap' has missing values" in failure(f"arrow:{path}:gap")
    assert "no column 'kind'" in failure(f"arrow:{path}", domain="kind")
    assert "the field 'input_ids' is list, not text" in failure(f"arrow:{path}", domain="input_ids")
    path.write_bytes(b"neither")
    assert "a.arrow: not a readable Arrow file" in failure(f"arrow:{path}")
    assert "no such file or folder" in failure(f"arrow:{tmp_path / 'none'}:column")
    (tmp_path / "empty").mkdir()
    assert "has no .arrow file" in failure(f"arrow:{tmp_path / 'empty'}")
    save(tmp_path / "empty" / "a.arrow", rows=[[]])
    assert "holds no text" in failure(f"arrow:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "state.json").write_text('{"_indices_data_files": [{"filename": "indices.arrow"}]}')
    assert "call flatten_indices()" in failure(f"arrow:{tmp_path / 'empty'}")


def test_from_arrow_to_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "a.arrow")
    train_tokenizer(["some text " * 50 + text for text in "abcdefgh"], 257).save_pretrained(tmp_path / "small")
    tokenizer = train_tokenizer(["".join(chr(97 + n % 26) * (n % 7) for n in range(999))], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = ["data", f"arrow:{tmp_path / 'a.arrow'}", str(out), "--holdout", "0", "--workers", "2", "--tokenizer"]
    assert main([*command, str(tmp_path / "small")]) == 2
    error = capsys.readouterr().err
    assert "a.arrow: row 3: holds the id 299, but the tokenizer's ids are 0 to 256" in error
    assert not (tmp_path / "out.partial").exists()
    assert main([*command, str(tmp_path / "tokenizer"), "--field", "x"]) == 0
    said = capsys.readouterr()
    assert "3 documents, 1 repeated one left out, 8 tokens" in said.out and "bytes of text" not in said.out
    assert "--field x: does not apply" in said.err
    store = TokenStore(out)
    kept = [tuple(ROWS[0]), tuple(ROWS[1]), tuple(ROWS[3])]
    bounds = [*store.offsets("train").tolist(), 8]
    order = [tuple(store.read("train", *bounds[i : i + 2]).tolist()) for i in range(3)]
    assert sorted(order) == sorted(kept)
    for i, ids in enumerate(order):
        assert f"sha256 {hash_of_ids(np.array(ids)).hex()[:16]})" in store.document_name("train", i)


def varint(value: int) -> bytes:
    value, out = value % 2**64, b""
    while value > 127:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(packed: bool = True, **features: Any) -> bytes:
    """A serialised tf.train.Example, written after the specification of the wire format."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, bytes):
            value = field(1, field(1, values))
        elif packed:
            value = field(3, field(1, b"".join(map(varint, values))))
        else:
            value = field(3, b"".join(varint(1 << 3) + varint(v) for v in values))
        entries += field(1, field(1, name.encode()) + field(2, value))
    return field(1, entries)


@pytest.mark.parametrize("packed", [True, False])
def test_whole_numbers_of_an_example(packed: bool):
    ids = [0, 1, 127, 128, 300, 2**16, 2**31 - 1, 2**63 - 1, -1, -(2**63)]
    got = int64_features(example(packed, text=ids, other=b"bytes", none=[]))
    assert got["text"].tolist() == ids and got["none"].tolist() == [] and set(got) == {"text", "none"}
    assert int64_features(b"") == {}


def test_random_numbers_of_an_example():
    ids = np.random.default_rng(0).integers(0, 2**32, 5000).tolist()
    assert int64_features(example(a=ids))["a"].tolist() == ids


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"hello", b"\xff" * 12, b"\x0a\x01\x0b", example(text=[300])[:-1]])
def test_bytes_that_are_no_example(data: bytes):
    with pytest.raises(ValueError, match=r"cut off|wire type|field"):
        int64_features(data)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Stands in for the package array_record: name of a file -> its records."""
    records: dict[str, list[bytes]] = {}

    class ArrayRecordReader:
        def __init__(self, path: str) -> None:
            self.records = records.get(Path(path).name)

        def ok(self) -> bool:
            return self.records is not None

        def num_records(self) -> int:
            return len(self.records or ())

        def read(self, start: int, stop: int) -> list[bytes]:
            return (self.records or [])[start:stop]

        def close(self) -> None:
            pass

    name = "array_record.python.array_record_module"
    module = ModuleType(name)
    module.ArrayRecordReader = ArrayRecordReader  # type: ignore[attr-defined]
    for part in ("array_record", "array_record.python", name):
        monkeypatch.setitem(sys.modules, part, module if part == name else ModuleType(part))
    return records


def test_records(tmp_path: Path, package: dict[str, list[bytes]]):
    for part, ids in (("b", [[1, 2], [3]]), ("a", [[300, 4]])):
        (tmp_path / f"{part}.array_record").touch()
        package[f"{part}.array_record"] = [example(text=row) for row in ids]
    assert found(f"array_record:{tmp_path}") == found(f"array_record:{tmp_path}:text") == [[300, 4], [1, 2], [3]]
    one = f"array_record:{tmp_path / 'b.array_record'}"
    assert found(one) == [[1, 2], [3]]
    assert "record 0: no feature 'ids' of whole numbers; there are text" in failure(f"{one}:ids")
    assert "`domain`: 'x' cannot be read" in failure(one, domain="x")
    package["b.array_record"] = [example(a=[1], b=[2])]
    assert "features of whole numbers are a, b; name one" in failure(one)
    assert found(f"{one}:b") == [[2]]
    package["b.array_record"] = [b"text, not a message"]
    assert "b.array_record: record 0: not a tf.train.Example" in failure(one)
    del package["b.array_record"]
    assert "not a readable array_record file" in failure(one)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    (tmp_path / "a.array_record").touch()
    assert "pip install array_record" in failure(f"array_record:{tmp_path}")


def test_the_package_itself(tmp_path: Path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    rows = [[n, n + 1, 70000] for n in range(3000)]
    for row in rows:
        writer.write(example(text=row))
    writer.close()
    assert found(f"array_record:{path}") == rows
    path.write_bytes(b"not one")
    assert "not a readable array_record file" in failure(f"array_record:{path}")
