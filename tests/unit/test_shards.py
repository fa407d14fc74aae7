from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.data.manifest import smallest_dtype, write_manifest
from secateur.data.shards import ShardWriter, TokenStore
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import UserError

LENGTHS = (3, 0, 7, 1, 12, 5)


def build(folder: Path, vocabulary: int = 100, shard_tokens: int = 4) -> np.ndarray:
    """Two splits of documents with ids below ``vocabulary``; returns the ids of the first, one after the other."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocabulary, length) for length in LENGTHS]
    splits = {}
    for split, part in (("train", documents), ("heldout", documents[:1])):
        writer = ShardWriter(folder, split, smallest_dtype(vocabulary), shard_tokens)
        for ids in part:
            writer.append(ids)
        splits[split] = writer.close()
    write_manifest(folder, vocabulary, splits)
    return np.concatenate(documents)


def edit(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("shard_tokens", [1, 3, 4, 7, 28, 1000])
def test_every_slice_equals_the_concatenation(tmp_path: Path, shard_tokens: int):
    ids = build(tmp_path, shard_tokens=shard_tokens)
    store = TokenStore(tmp_path)
    store.verify()
    assert store.tokens("train") == len(ids) == 28
    assert len(list(tmp_path.glob("train-*.npy"))) == -(-28 // shard_tokens)
    for start in range(29):
        for stop in range(start, 29):
            part = store.read("train", start, stop)
            assert part.dtype == np.int64 and part.shape == (stop - start,)
            assert (part == ids[start:stop]).all()
    assert store.offsets("train").tolist() == [0, 3, 3, 10, 11, 23]
    assert store.read("heldout", 0, 3).tolist() == ids[:3].tolist()


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_the_dtype_is_the_smallest_that_holds_every_id(tmp_path: Path, vocabulary: int, dtype: str):
    writer = ShardWriter(tmp_path, "train", smallest_dtype(vocabulary))
    writer.append(np.array([0, vocabulary - 1]))
    write_manifest(tmp_path, vocabulary, {"train": writer.close()})
    assert np.load(tmp_path / "train-00000.npy", allow_pickle=False).dtype == dtype
    store = TokenStore(tmp_path)
    assert (store.manifest.dtype, store.vocabulary) == (dtype, vocabulary)
    assert store.read("train", 0, 2).tolist() == [0, vocabulary - 1]


def test_writing_is_deterministic(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_writer_refuses_what_it_cannot_store(tmp_path: Path):
    writer = ShardWriter(tmp_path, "train", "uint16")
    for ids in (np.array([65536]), np.array([-1]), np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(ValueError, match="fit uint16"):
            writer.append(ids)
    writer.append(np.zeros(0, dtype=np.int64))
    with pytest.raises(UserError, match="split 'train' has no tokens"):
        writer.close()
    with pytest.raises(ValueError, match="at least one token"):
        ShardWriter(tmp_path, "train", "uint16", 0)


def test_a_slice_over_the_end(tmp_path: Path):
    build(tmp_path)
    store = TokenStore(tmp_path)
    with pytest.raises(UserError, match=r"'train' has 28 tokens, but tokens 20 to 30 .* lower the token budget by 2"):
        store.read("train", 20, 30)
    for start, stop in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="not a slice"):
            store.read("train", start, stop)
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        store.tokens("trian")


def test_missing_and_damaged_files(tmp_path: Path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        TokenStore(tmp_path)
    build(tmp_path)
    shard = tmp_path / "train-00002.npy"
    whole = shard.read_bytes()
    for content in (whole[:-2], whole[:20], b"", b"PK\x03\x04"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"train-00002\.npy: damaged") as caught:
            TokenStore(tmp_path)
        assert "\n" not in str(caught.value)
    for array in (np.zeros(3, dtype=np.uint16), np.zeros(4, dtype=np.int64), np.zeros((4, 1), dtype=np.uint16)):
        np.save(shard, array)
        with pytest.raises(UserError, match="not the 4 values of uint16"):
            TokenStore(tmp_path)
    np.save(shard, np.array([{"pickled": 1}] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        TokenStore(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="no such file, but the manifest names it"):
        TokenStore(tmp_path)


def test_only_verify_reads_every_byte(tmp_path: Path):
    build(tmp_path)
    for name in ("train-00001.npy", "documents.heldout.npy", "hashes.train.npy"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        store = TokenStore(tmp_path)
        with pytest.raises(UserError, match=f"{name}: has changed"):
            store.verify()
        path.write_bytes(whole)
    TokenStore(tmp_path).verify()


@pytest.mark.parametrize("name", ["../train-00000.npy", "/etc/passwd", "sub/x.npy", "..", ""])
def test_the_manifest_cannot_point_elsewhere(tmp_path: Path, name: str):
    build(tmp_path)
    edit(tmp_path, lambda raw: raw["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises(UserError, match=r"outside the folder|damaged"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=1), "format 1, but this secateur reads 2"),
        (lambda raw: raw.update(extra=1), "extra: unknown key"),
        (lambda raw: raw.update(dtype="object"), "dtype: 'object' is not known"),
        (lambda raw: raw.pop("vocabulary"), "vocabulary: this key is required"),
        (lambda raw: raw["splits"]["train"].update(tokens=27), "do not add up"),
        (lambda raw: raw["splits"]["train"].update(documents=5), "documents.train.npy: not the 5 values"),
        (lambda raw: raw["splits"]["train"]["hashes"].update(file="documents.train.npy"), "6 values of uint64"),
        (lambda raw: raw["splits"]["train"]["offsets"].update(file="../x.npy"), "outside the folder"),
        (lambda raw: raw["splits"]["train"]["shards"].pop(), "do not add up"),
    ],
)
def test_a_malformed_manifest(tmp_path: Path, change: Any, message: str):
    build(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path)


def domains(folder: Path) -> None:
    """Six documents of two domains."""
    writer = ShardWriter(folder, "train", "uint16", 4, domains=True)
    for number, length in enumerate(LENGTHS):
        writer.append(np.full(length, number), digest=hashlib.sha256(str(number).encode()).digest(), domain=number % 2)
    write_manifest(folder, 10, {"train": writer.close()}, domains=["books", "web"], provenance={"made": "here"})


def test_documents_have_names(tmp_path: Path):
    domains(tmp_path)
    store = TokenStore(tmp_path)
    store.verify()
    assert (store.domains, store.documents("train")) == (("books", "web"), 6)
    for number in range(6):
        hashed = hashlib.sha256(str(number).encode()).hexdigest()[:16]
        domain = ("books", "web")[number % 2]
        assert store.document_name("train", number) == f"document {number} (sha256 {hashed}, domain {domain})"
    for number in (-1, 6):
        with pytest.raises(IndexError, match=f"no document {number}"):
            store.document_name("train", number)
    edit(tmp_path, lambda raw: raw.update(domains=["books"]))
    assert "domain 1 (unknown)" in TokenStore(tmp_path).document_name("train", 1)


def test_a_document_without_text_goes_by_its_ids(tmp_path: Path):
    ids = build(tmp_path)
    store = TokenStore(tmp_path)
    hashed = hashlib.sha256(ids[:3].astype("<u4").tobytes()).hexdigest()[:16]
    assert store.document_name("train", 0) == store.document_name("heldout", 0) == f"document 0 (sha256 {hashed})"
    assert store.domains == ()


def test_documents_and_positions_of_every_slice(tmp_path: Path):
    build(tmp_path)
    store = TokenStore(tmp_path)
    owner = np.repeat(np.arange(6), LENGTHS)
    for start in range(29):
        assert list(store.documents_in("train", start, start)) == []
        for stop in range(start + 1, 29):
            within = store.documents_in("train", start, stop)
            owners = owner[start:stop].tolist()
            assert (within.start, within.stop) == (owners[0], owners[-1] + 1)
            naive = [token - max(start, owner.tolist().index(o)) for token, o in enumerate(owners, start)]
            positions = store.positions("train", start, stop)
            assert positions.dtype == np.int64 and positions.tolist() == naive
    assert store.positions("train", 5, 5).shape == (0,)
    with pytest.raises(UserError, match="lower the token budget by 1"):
        store.documents_in("train", 0, 29)
    with pytest.raises(ValueError, match="not a slice"):
        store.positions("train", 4, 3)


def test_empty_documents_at_the_ends(tmp_path: Path):
    writer = ShardWriter(tmp_path, "train", "uint16")
    for length in (0, 2, 0, 0, 1, 0):
        writer.append(np.zeros(length, dtype=np.int64))
    write_manifest(tmp_path, 10, {"train": writer.close()})
    store = TokenStore(tmp_path)
    assert store.documents_in("train", 0, 3) == range(1, 5)
    assert store.positions("train", 0, 3).tolist() == [0, 1, 0]


def test_columns_are_not_read_whole(tmp_path: Path):
    writer = ShardWriter(tmp_path, "train", "uint16", domains=True)
    count = 400_000
    writer.extend(np.zeros(3 * count, dtype=np.uint16), [3] * count, np.arange(count, dtype=np.uint64), [1] * count)
    write_manifest(tmp_path, 10, {"train": writer.close()}, domains=["a", "b"])
    tracemalloc.start()
    store = TokenStore(tmp_path)
    for start in range(0, 3 * count - 2048, 99_991):
        within = store.documents_in("train", start, start + 2048)
        assert within == range(start // 3, (start + 2047) // 3 + 1)
        assert store.positions("train", start, start + 2048)[3] == (start + 3) % 3
        assert store.document_name("train", within[0]) == f"document {start // 3} (sha256 {start // 3:016x}, domain b)"
        assert len(store.read("train", start, start + 2048)) == 2048
    assert tracemalloc.get_traced_memory()[1] < 400_000  # a column of offsets takes eight times as much
    tracemalloc.stop()


def test_more_shards_than_a_process_may_have_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("secateur.data.shards._MAPS", 8)
    ids = build(tmp_path, shard_tokens=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, hard))
    try:
        store = TokenStore(tmp_path)
        assert (store.read("train", 0, 28) == ids).all()
        assert (np.concatenate(list(store.chunks("train", 5))) == ids).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_fingerprint_is_that_of_the_data(tmp_path: Path):
    train_tokenizer(["words " * 9], 257).save_pretrained(tmp_path / "a" / "tokenizer")
    domains(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = TokenStore(tmp_path / "a"), TokenStore(tmp_path / "b")
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
    assert first.tokenizer == tmp_path / "a" / "tokenizer"
    edit(tmp_path / "b", lambda raw: raw.update(provenance={"made": "elsewhere"}))
    assert TokenStore(tmp_path / "b").fingerprint == first.fingerprint
    edit(tmp_path / "b", lambda raw: raw["splits"]["train"]["hashes"].update(sha256="0" * 64))
    assert TokenStore(tmp_path / "b").fingerprint != first.fingerprint
    first.verify()
    (tmp_path / "a" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer: has changed"):
        first.verify()


def test_a_store_goes_to_another_process(tmp_path: Path):
    ids = build(tmp_path)
    store = pickle.loads(pickle.dumps(TokenStore(tmp_path)))
    assert (store.read("train", 0, 28) == ids).all()
