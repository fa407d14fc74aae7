"""secateur data: the same bytes however it runs, and everything that a run says."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from processes import Processes
from secateur.cli import main
from secateur.data import build
from secateur.data import external_sort as runs
from secateur.data.build import Holdout, write_splits
from secateur.data.documents import Document
from secateur.data.encode import Encoder, encode_texts
from secateur.data.shards import ShardWriter, TokenStore
from secateur.data.sources import open_source
from secateur.data.tokenizer import load_tokenizer, token_hash, train_tokenizer

SMALL = 6000  # bytes of a run and of a bucket, so that a small corpus has many


def text_of(number: int) -> str:
    words = random.Random(number)
    return f"document {number}: " + " ".join(f"w{words.randrange(300)}é" for _ in range(words.randrange(1, 60)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tokenizer`` and ``corpus``: 330 documents in two folders and beside them, of which 30 repeat another."""
    root = tmp_path_factory.mktemp("data")
    texts = [text_of(number) for number in range(300)]
    train_tokenizer(texts, 300).save_pretrained(root / "tokenizer")
    parts = {"books/a.jsonl": texts[:100] + texts[:20], "web/b.jsonl": texts[100:280] + texts[95:105]}
    for name, part in parts.items():
        (root / "corpus" / name).parent.mkdir(parents=True)
        rows = [json.dumps({"body": text, "kind": f"kind {len(text) % 3}"}) + "\n" for text in part]
        (root / "corpus" / name).write_text("".join(rows))
    for number in range(280, 300):
        (root / "corpus" / f"{number}.txt").write_text(texts[number])
    return root


def command(world: Path, out: Path, *options: object) -> list[str]:
    tokenizer = ["--tokenizer", str(world / "tokenizer"), "--field", "body", "--workers", "1", "--shard-tokens", "5000"]
    return ["data", f"text:{world / 'corpus'}", str(out), *tokenizer, *map(str, options)]


def call(world: Path, out: Path, *options: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*command(world, out, *options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert main([*map(str, arguments)]) == code
    said = capsys.readouterr()
    assert not said.out
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("secateur: error: ")
    return line


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens."""
    store, tokenizer = TokenStore(folder), load_tokenizer(folder / "tokenizer")
    bounds = [*store.offsets(split).tolist(), store.tokens(split)]
    ids = store.read(split, 0, store.tokens(split)).tolist()
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(bounds)]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """What one process writes that is not disturbed."""
    assert main(command(world, world / "whole")) == 0
    return world / "whole"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "BYTES", SMALL)
    monkeypatch.setattr("secateur.data.build._BATCH_DOCUMENTS", 10)


def test_the_answer_says_what_was_written(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    answer = call(world, tmp_path / "out", capsys=capsys)
    store = TokenStore(tmp_path / "out")
    store.verify()
    assert not (tmp_path / "out.partial").exists()
    assert (answer["source"], answer["vocabulary"], answer["dtype"]) == ("text:corpus", 300, "uint16")
    assert (answer["duplicates"], sum(answer["documents"].values())) == (30, 300)
    assert answer["fingerprint"] == store.fingerprint
    assert answer["tokenizer_sha256"] == store.manifest.tokenizer_sha256
    assert answer["disk"] == sum(map(len, files(tmp_path / "out").values()))
    for split in ("train", "heldout"):
        texts = documents(tmp_path / "out", split)
        ids = np.concatenate(encode_texts(load_tokenizer(world / "tokenizer"), texts))
        assert (store.read(split, 0, store.tokens(split)) == ids).all()
        assert answer["documents"][split] == len(texts) == store.documents(split)
        assert answer["bytes"][split] == sum(len(text.encode()) for text in texts)
        assert answer["tokens"][split] == len(ids)
        assert answer["bytes_per_token"][split] == answer["bytes"][split] / len(ids)
        assert answer["sha256"][split] == token_hash(ids)
        for key in ("documents", "tokens", "bytes"):
            assert sum(found[split][key] for found in answer["domains"].values()) == answer[key][split]
    told = store.manifest.provenance
    assert (told["source_sha256"], told["seed"], told["holdout"]) == (answer["source_sha256"], 0, 0.05)
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_people_are_told_the_same(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command(world, tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    store = TokenStore(tmp_path / "out")
    total = store.tokens("train") + store.tokens("heldout")
    assert lines[0] == f"{tmp_path / 'out'}: 300 documents, 30 repeated ones left out, {total:,} tokens"
    assert [line.split()[0] for line in lines[1:]] == ["train", "heldout", "domains", "vocabulary", "identity", "used"]
    assert f"{store.documents('train')} documents, {store.tokens('train'):,} tokens" in lines[1]
    assert "web " in lines[3] and "books " in lines[3] and "by tokens" in lines[3]


def test_no_document_is_lost_or_on_both_sides(world: Path, whole: Path):
    train, heldout = documents(whole, "train"), documents(whole, "heldout")
    assert sorted(train + heldout) == sorted(text_of(number) for number in range(300))
    for text in train + heldout:
        share = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        assert (text in heldout) == (share < 0.05)
    for split, texts in (("train", train), ("heldout", heldout)):
        order = [hashlib.sha256(f"0:{hashlib.sha256(t.encode()).hexdigest()}".encode()).digest() for t in texts]
        assert order == sorted(order), split


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_bytes_do_not_depend_on_workers_runs_or_buckets(world: Path, whole: Path, tmp_path: Path, workers: int):
    assert main(command(world, tmp_path / "out", "--workers", workers)) == 0
    assert files(tmp_path / "out") == files(whole)
    assert len(list(whole.glob("train-*.npy"))) > 3


def test_the_seed_changes_the_order_and_nothing_else(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    call(world, tmp_path / "other", "--seed", 1, capsys=capsys)
    for split in ("train", "heldout"):
        first, second = documents(whole, split), documents(tmp_path / "other", split)
        assert first != second and sorted(first) == sorted(second)
    assert TokenStore(whole).fingerprint != TokenStore(tmp_path / "other").fingerprint


def run_until(owner: str, name: str, calls: int, line: list[str]) -> int:
    """Run a command line that dies as by kill -9 once a function has been called so often, and is called once more."""
    runs.BYTES, build._BATCH_DOCUMENTS = SMALL, 10  # small runs: many such moments
    target = {"runs": runs, "os": os, "Runs": runs.SortedRuns, "ShardWriter": ShardWriter}[owner]
    real, left = getattr(target, name), calls

    def deadly(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(target, name, deadly)
    return main(line)


def killed(world: Path, out: Path, owner: str, name: str, calls: int, *options: object) -> list[int]:
    """Kill a run at such a moment; return the workers' process ids."""
    process = Processes(out.parent, run_until, owner, name, calls, command(world, out, *options))
    assert process.join() == [-signal.SIGKILL], process.errors
    assert not out.exists()
    return [int(pid) for pid in process.output.split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    work = tmp_path / "out.partial" / "work"
    moments = [
        ("runs", "_save", 4, 3),  # within the second run
        ("os", "rename", 1, 1),  # before a run is in its place
        ("Runs", "finish", 0, 1),  # at the end of the source
        ("ShardWriter", "extend", 5, 1),  # within the second pass
    ]
    reached = []
    for owner, name, calls, workers in moments:
        pids = killed(world, out, owner, name, calls, "--workers", workers)
        assert len(pids) == (workers if workers > 1 else 0)
        if sys.platform == "linux":
            deadline = time.monotonic() + 20
            while not all(map(gone, pids)) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert all(map(gone, pids)), "workers outlive the process that started them"
        reached.append(len(list(work.glob("run-*/finished"))))
    assert reached[0] >= 1 and reached == sorted(reached) and (work / "complete.json").exists()
    before = {path: path.stat().st_mtime_ns for path in work.glob("run-*/ids")}
    assert len(before) > 3
    answer = call(world, out, "--workers", 2, capsys=capsys)
    assert answer["duplicates"] == 30
    assert files(out) == files(whole)
    assert not work.parent.exists()


@pytest.mark.usefixtures("small")
def test_what_is_encoded_is_not_encoded_again(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    taken: list[int] = []
    real = Encoder.__call__

    def counting(self: Encoder, batch: list[Document]) -> Any:
        if sum(taken) > 200:
            raise KeyboardInterrupt
        taken.append(len(batch))
        return real(self, batch)

    monkeypatch.setattr(Encoder, "__call__", counting)
    assert main(command(world, out)) == 130
    kept = sum(json.loads(p.read_text())["documents"] for p in (tmp_path / "out.partial").glob("work/run-*/finished"))
    assert 100 < kept < 300
    capsys.readouterr()

    message = refusal(capsys, *command(world, out, "--seed", 7, "--holdout", 0.1))
    assert "another request: --holdout; --seed; repeat that request, or delete the directory" in message
    taken.clear()
    monkeypatch.setattr(Encoder, "__call__", lambda self, batch: taken.append(len(batch)) or real(self, batch))
    assert main(command(world, out)) == 0
    assert sum(taken) == 330 - kept
    assert f"already encoded: {kept} documents" in capsys.readouterr().err
    assert files(out) == files(whole)


@pytest.mark.usefixtures("small")
def test_a_full_disk_keeps_what_is_done(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real, left = runs._save, [10]

    def full(path: Path, values: np.ndarray) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(path, values)

    monkeypatch.setattr(runs, "_save", full)
    assert "the disk is full; make room" in refusal(capsys, *command(world, tmp_path / "out"), code=1)
    monkeypatch.setattr(runs, "_save", real)
    assert len(list((tmp_path / "out.partial" / "work").glob("run-*/finished"))) == 3
    assert main(command(world, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(whole)


def test_a_worker_that_dies_is_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Deadly(Encoder):
        def __reduce__(self) -> Any:
            return os._exit, (1,)

    source = open_source(f"text:{world / 'corpus'}", field="body")
    encoder = Deadly(load_tokenizer(world / "tokenizer"), 300, "uint16", 0)
    with pytest.raises(Exception, match="a worker process was killed"):
        write_splits(source, encoder, tmp_path, tmp_path / "work", holdout=Holdout(), workers=2)


def test_domains_by_folder_and_by_field(world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = TokenStore(whole)
    assert store.domains == (".", "books", "web")
    number = {text_of(n): n for n in range(300)}
    for split in ("train", "heldout"):
        for index, text in enumerate(documents(whole, split)):
            # Of a document that is repeated, the place in the source that comes first counts: books before web.
            domain = "." if number[text] >= 280 else "books" if number[text] < 100 else "web"
            hashed = hashlib.sha256(text.encode()).hexdigest()[:16]
            assert store.document_name(split, index) == f"document {index} (sha256 {hashed}, domain {domain})"

    for name in ("books", "web"):
        source = f"text:{world / 'corpus' / name}"
        options = [*command(world, tmp_path / name)[2:], "--domain", "kind"]
        assert main(["data", source, *options]) == 0
        assert TokenStore(tmp_path / name).domains == ("kind 0", "kind 1", "kind 2")
    assert main(["data", f"text:{world / 'corpus' / 'web'}", *command(world, tmp_path / "one")[2:]]) == 0
    one = TokenStore(tmp_path / "one")
    assert one.domains == () and one.manifest.splits["train"].domains is None
    assert not list((tmp_path / "one").glob("domains.*"))
    assert one.document_name("train", 3).count("domain") == 0


def test_ids_take_four_bytes_where_two_do_not_hold_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"w{n} w65535 w{n * 7}"}) + "\n" for n in range(9))
    )
    for size, dtype in ((65536, "uint16"), (65537, "uint32")):
        words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / dtype)
        options = ["--tokenizer", tmp_path / dtype, "--holdout", 0, "--workers", 1, "--json"]
        assert main(["data", f"text:{tmp_path / 'text.jsonl'}", str(tmp_path / f"o{dtype}"), *map(str, options)]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["dtype"], answer["vocabulary"]) == (dtype, size)
        assert list(answer["tokens"].items()) == [("train", 27)]
        store = TokenStore(tmp_path / f"o{dtype}")
        assert np.load(tmp_path / f"o{dtype}" / "train-00000.npy").dtype == dtype
        found = {tuple(store.read("train", i, i + 3).tolist()) for i in store.offsets("train").tolist()}
        assert found == {(n, 65535, n * 7) for n in range(9)}


def test_at_most_so_many_documents(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    answer = call(world, tmp_path / "out", "--documents", "0.125k", "--holdout", 0, capsys=capsys)
    assert (answer["documents"], answer["duplicates"]) == ({"train": 120}, 5)


class Endless:
    """Documents that are made as they are read; ``Source`` as far as building asks for it."""

    name = "endless"

    def __init__(self, count: int) -> None:
        self.count = count

    def size(self) -> None:
        return None

    def digest(self) -> str:
        return ""

    def documents(self) -> Iterator[Document]:
        ids = np.arange(2000, dtype=np.int32)
        return (Document(str(n), "", "", (ids * n) % 300) for n in range(self.count))


def test_memory_does_not_grow_with_the_corpus(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "BYTES", 2**18)
    encoder = Encoder(load_tokenizer(world / "tokenizer"), 300, "uint16", 0)
    peaks = []
    for count in (300, 4000):  # 1.2 MB and 16 MB of ids
        tracemalloc.start()
        folder = tmp_path / str(count)
        folder.mkdir()
        built = write_splits(Endless(count), encoder, folder, folder / "work", holdout=Holdout())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(split.documents for split in built.splits.values()) + built.duplicates == count
    assert peaks[1] < 1.3 * peaks[0] < 8 * 2**20


def test_refusals(world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    source, tokenizer = f"text:{world / 'corpus'}", ("--tokenizer", world / "tokenizer")
    assert "already exists" in refusal(capsys, "data", source, whole, *tokenizer)
    assert "lies inside the source" in refusal(capsys, "data", source, world / "corpus" / "out", *tokenizer)
    assert "--tokenizer" in refusal(capsys, "data", source, out)
    assert "no such directory" in refusal(capsys, "data", source, out, "--tokenizer", tmp_path / "none")
    assert "has no tokenizer" in refusal(capsys, "data", source, out, "--tokenizer", tmp_path)
    assert "no field 'text'" in refusal(capsys, "data", source, out, *tokenizer)
    assert "plain text has no field 'kind'" in refusal(capsys, *command(world, out, "--domain", "kind"))
    assert "did you mean 'arrow'" in refusal(capsys, "data", "arow:x", out, *tokenizer)
    assert "is not a share" in refusal(capsys, *command(world, out, "--holdout", 1))
    assert "0.000001 of 300" in refusal(capsys, *command(world, out, "--holdout", "1e-6")).replace("1e-06", "0.000001")
    assert "'0' is not above zero" in refusal(capsys, *command(world, out, "--documents", 0))
    assert "did you mean '--holdout'" in refusal(capsys, *command(world, out, "--holdot", 1))
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no text" in refusal(capsys, "data", f"text:{tmp_path / 'empty.jsonl'}", out, *tokenizer)
    assert "have no fields" in refusal(capsys, "data", "stdlib", out, *tokenizer, "--domain", "x")
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    (tmp_path / "file").write_text("x")
    assert "cannot be created" in refusal(capsys, *command(world, tmp_path / "file" / "out"))


def test_help_names_every_source(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["data", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(form in said for form in ("stdlib", "text:PATH", "hf:NAME", "arrow:PATH", "array_record:PATH"))
