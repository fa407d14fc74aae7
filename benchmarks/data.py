"""How fast `secateur data` writes tokens, and how fast they are read, beside plain loops in the same run.

    python benchmarks/data.py [--source SOURCE] [--tokenizer DIR] [--copies N] [--rounds N] [--store MB]

Each writer is a process of its own and counts from reading the first document to the last byte written, without
imports. `plain` encodes one document at a time and appends its ids to a file; `plain-batched` hands a thousand at once
to the tokenizers library, which uses threads of its own. Neither drops repeated documents, shuffles, holds out, hashes,
or can go on after a kill. CPU-seconds are those of all its processes; on cores with other work to do as well,
they say more than seconds. Readers take windows at random places from a store of random ids.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cli import main as secateur
from secateur.data.manifest import write_manifest
from secateur.data.shards import ShardWriter, TokenStore
from secateur.data.sources import open_source

WINDOW = 2048
VOCABULARY = 32768


def texts(path: Path) -> Iterator[str]:
    """The documents of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def plain(corpus: Path, tokenizer: Any, out: Path) -> int:
    """One document at a time."""
    written = 0
    with (out / "ids").open("wb") as file:
        for text in texts(corpus):
            ids = np.array(tokenizer(text)["input_ids"], dtype=np.uint16)
            file.write(ids.data)
            written += len(ids)
    return written


def plain_batched(corpus: Path, tokenizer: Any, out: Path) -> int:
    """A thousand documents at a time, and as many threads as the library takes."""
    written, documents = 0, texts(corpus)
    with (out / "ids").open("wb") as file:
        while batch := list(islice(documents, 1000)):
            for ids in tokenizer(batch)["input_ids"]:
                file.write(np.array(ids, dtype=np.uint16).data)
                written += len(ids)
    return written


def write(contender: str, corpus: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    """Run one contender in this process."""
    from secateur.data.tokenizer import load_tokenizer  # not above: worker processes import this file, too

    out.mkdir(parents=True)
    loaded = load_tokenizer(tokenizer)
    loaded("warm up")
    if contender.startswith("secateur"):
        importlib.import_module("secateur.cli.verbs")  # imports are not counted
    before, started = cpu(), time.perf_counter()
    if contender.startswith("secateur"):
        workers = contender.partition("-")[2]
        code = secateur(["data", f"text:{corpus}", f"{out}/data", "--tokenizer", f"{tokenizer}", "--workers", workers])
        assert code == 0
        seconds, used = time.perf_counter() - started, cpu() - before
        store = TokenStore(out / "data")
        tokens = sum(store.tokens(split) for split in store.manifest.splits)
    else:
        tokens = {"plain": plain, "plain-batched": plain_batched}[contender](corpus, loaded, out)
        seconds, used = time.perf_counter() - started, cpu() - before
    return {"tokens": tokens, "seconds": seconds, "cpu": used}


def cpu() -> float:
    """CPU-seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def make_corpus(path: Path, source: str, copies: int) -> None:
    """The documents of a source, each so many times, told apart by a number."""
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for document in open_source(source).documents():
                file.write(json.dumps({"text": f"{copy}\n{document.text}"}) + "\n")


def writers(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure all writers, in turn and several times; print a table."""
    from secateur.data.tokenizer import train_tokenizer

    corpus, tokenizer = folder / "corpus.jsonl", arguments.tokenizer or folder / "tokenizer"
    make_corpus(corpus, arguments.source, arguments.copies)
    if not arguments.tokenizer:
        train_tokenizer(islice(texts(corpus), 1000), VOCABULARY).save_pretrained(tokenizer)
    contenders = ["plain", "plain-batched", "secateur-1", "secateur-2"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name in contenders:
            command = [sys.executable, __file__, "--run", name, str(corpus), str(tokenizer), str(folder / "out")]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": str(name == "plain-batched").lower()}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(folder / "out")
    size = corpus.stat().st_size
    tokens = int(found["plain"][0]["tokens"])
    print(f"\n{size / 1e6:.1f} MB of text, {tokens:,} tokens; medians of {arguments.rounds} rounds, best in brackets\n")
    print("| writer | seconds | tokens/s | to plain | CPU s | tokens per CPU s | to plain |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    middle = {n: {k: statistics.median(r[k] for r in rows) for k in ("seconds", "cpu")} for n, rows in found.items()}
    for name, rows in found.items():
        seconds, used = middle[name]["seconds"], middle[name]["cpu"]
        best = min(row["seconds"] for row in rows)
        print(
            f"| {name} | {seconds:.1f} ({best:.1f}) | {tokens / seconds:,.0f} | "
            f"{middle['plain']['seconds'] / seconds:.2f} | {used:.1f} | {tokens / used:,.0f} | "
            f"{middle['plain']['cpu'] / used:.2f} |"
        )


def make_store(folder: Path, megabytes: int) -> TokenStore:
    """Random ids of two bytes in documents of a thousand."""
    generator, writer = np.random.default_rng(0), ShardWriter(folder, "train", "uint16", 2**25)
    for _ in range(megabytes // 2):
        ids = generator.integers(0, VOCABULARY, 10**6, dtype=np.uint16)
        writer.extend(ids, [1000] * 1000, generator.integers(0, 2**63, 1000, dtype=np.uint64), [])
    write_manifest(folder, VOCABULARY, {"train": writer.close()})
    return TokenStore(folder)


def forget(folder: Path) -> None:
    """Ask the system to drop what it holds of the files in memory."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def readers(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure reading windows at random places; print a table."""
    total = make_store(folder, arguments.store).tokens("train")
    print(f"\n{total:,} tokens in {total * 2 / 1e6:,.0f} MB, windows of {WINDOW} at random places\n")
    print("| reader | first time, tokens/s | again, tokens/s |")
    print("|---|---:|---:|")
    for number, (name, reader) in enumerate(READERS.items()):
        forget(folder)  # what is mapped stays, so that each reader maps the files itself and lets go of them
        read = reader(folder)
        starts = np.random.default_rng(number).integers(0, total - WINDOW, arguments.windows).tolist()
        rates = []
        for _ in range(2):
            began = time.perf_counter()
            for start in starts:
                read(start)
            rates.append(len(starts) * WINDOW / (time.perf_counter() - began))
        del read
        gc.collect()
        print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} |")


def mapped(folder: Path) -> Callable[[int], Any]:
    """What numpy does by itself."""
    maps = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("train-*.npy"))]
    whole = len(maps[0])

    def read(start: int) -> Any:
        shard, at = divmod(start, whole)
        return maps[shard][at : at + WINDOW].astype(np.int64)

    return read


def stored(folder: Path) -> Callable[[int], Any]:
    """Ids alone."""
    store = TokenStore(folder)
    return lambda start: store.read("train", start, start + WINDOW)


def positioned(folder: Path) -> Callable[[int], Any]:
    """Ids and each one's place in its document."""
    store = TokenStore(folder)
    return lambda start: (
        store.read("train", start, start + WINDOW),
        store.positions("train", start, start + WINDOW),
    )


READERS = {"plain memory map": mapped, "read": stored, "read and positions": positioned}


def main() -> None:
    """Measure writers, then readers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--tokenizer", type=Path, help="directory (default: one of 32768 is trained on the source)")
    parser.add_argument("--copies", type=int, default=1, help="times that each document is read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=int, default=800, help="MB of ids to read from")
    parser.add_argument("--windows", type=int, default=20000, help="windows to read")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        contender, *paths = arguments.run
        print(json.dumps(write(contender, *map(Path, paths))))
        return
    for measure in (writers, readers):
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
