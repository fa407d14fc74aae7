"""Windows that overlap, documents, domains and positions; the named protocols on local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from helpers import hf, logits, tiny_llama
from secateur.data.tokenizer import Stream, train_tokenizer
from secateur.errors import UserError
from secateur.evaluation.loss import Losses, Protocol, measure_loss, window_losses
from secateur.evaluation.protocols import PROTOCOLS, Text, text_protocol

WORDS = ("frost", "pear", "ladder", "soil", "rope", "hedge", "saw", "twine")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([" ".join(WORDS)] * 3, 280)


def stream(lengths: list[int], domains: list[str], seed: int = 0) -> Stream:
    ids = np.random.default_rng(seed).integers(0, 61, sum(lengths))
    return Stream(ids, np.repeat(np.arange(len(lengths)), lengths), tuple(domains))


def naive(directory: Path, ids: np.ndarray, seqlen: int, stride: int) -> dict[int, float]:
    """The loss of each token, by its place in the stream, from the first window that predicts it."""
    model, losses = hf(directory), {}
    for start in range(0, len(ids), stride):
        window = ids[start : start + seqlen].tolist()
        every = logits(model, torch.tensor([window]))[0].double().log_softmax(1)
        for position in range(1, len(window)):
            losses.setdefault(start + position, -float(every[position - 1][window[position]]))
    return losses


@pytest.mark.parametrize(("tokens", "stride"), [(32, 5), (35, 3), (34, 7), (5, 3), (8, 3), (9, 1), (13, 5)])
def test_overlapping_windows_predict_every_token_once(tokens: int, stride: int, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    ids = np.random.default_rng(1).integers(0, 61, tokens)
    protocol = Protocol.of_stream(ids, 8, "test", stride=stride)
    expected = naive(directory, ids, 8, stride)
    assert protocol.tokens == len(expected) == tokens - 1
    losses = window_losses(hf(directory), protocol, batch=3)
    assert losses.mean() == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    plain = Protocol.of_stream(ids, 8, "test")
    assert (protocol.record()["fingerprint"] == plain.record()["fingerprint"]) is (tokens <= 8)


def test_a_stride_that_leaves_tokens_out() -> None:
    with pytest.raises(UserError, match="a stride of 9"):
        Protocol.of_stream(np.arange(20), 8, "test", stride=9)


@pytest.mark.parametrize("stride", [8, 3])
def test_losses_by_document_domain_and_position(stride: int, tmp_path: Path) -> None:
    directory, lengths = tiny_llama(tmp_path), [5, 1, 12, 9, 7]
    documents = stream(lengths, ["web", "books", "web", "code", "books"])
    protocol = Protocol.of_stream(documents, 8, "test", stride=stride)
    losses = window_losses(hf(directory), protocol)
    expected = naive(directory, documents.ids, 8, stride)
    of = {n: [v for i, v in expected.items() if documents.documents[i] == n] for n in range(5)}
    sums = {n: (len(v), pytest.approx(sum(v), rel=1e-5)) for n, v in of.items() if v}
    assert losses.documents() == sums
    domains = {part["domain"]: part for part in losses.domains()}
    assert list(domains) == ["books", "code", "web"]
    for name, numbers in {"web": (0, 2), "books": (1, 4), "code": (3,)}.items():
        values = [v for n in numbers for v in of[n]]
        assert domains[name] == {
            "domain": name,
            "tokens": len(values),
            "loss": pytest.approx(np.mean(values), rel=1e-5),
        }
    measured = measure_loss(losses, "loss")
    assert measured.unit == "documents" and [i["tokens"] for i in measured.items] == [n for n, _ in sums.values()]
    weighted = sum(item["value"] * item["tokens"] for item in measured.items) / protocol.tokens
    assert weighted == pytest.approx(measured.value)
    buckets = losses.positions()
    assert [(b["from"], b["to"]) for b in buckets] == [(1, 1), (2, 3), (4, 7)]
    assert sum(b["tokens"] for b in buckets) == protocol.tokens
    assert sum(b["tokens"] * b["loss"] for b in buckets) / protocol.tokens == pytest.approx(measured.value)
    if stride == 8:
        first = [v for i, v in expected.items() if i % 8 == 1]
        assert buckets[0]["loss"] == pytest.approx(np.mean(first), rel=1e-5)


def test_ids_without_documents_are_measured_by_windows() -> None:
    text = stream([30], [""])
    for ids, unit, count in ((text, "documents", 1), (text.ids, "windows", 4)):
        protocol = Protocol.of_stream(ids, 8, "test")
        losses = Losses(protocol, tuple(torch.ones(p.shape[0], p.shape[1] - 1) for p in protocol.windows))
        measured = measure_loss(losses, "loss")
        assert (measured.unit, len(measured.items)) == (unit, count) and losses.domains() == []
        assert len(losses.summary()["documents"]["number"]) == (1 if unit == "documents" else 0)


def rows(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(("name", "field"), [("heldout/c4", "text"), ("heldout/cnn_dailymail", "article")])
def test_documents_of_a_local_text(name: str, field: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = next(t for t in PROTOCOLS["heldout"] if t.name == name)
    texts = [" ".join(WORDS[i:]) for i in range(6)]
    rows(tmp_path / f"{text.file}.jsonl", texts, field)
    protocol = text_protocol(text, tokenizer, data=str(tmp_path), positions=16, windows=4)
    ids = [i for t in texts for i in tokenizer(t)["input_ids"]]
    assert protocol.windows[0].flatten().tolist() == ids[:64]
    record = protocol.record()
    assert record["name"] == name and record["split"] == text.split and record["bos"] is True and "note" not in record
    assert (record["windows"], record["seqlen"], record["source"]) == (4, 16, f"text:{text.file}.jsonl")
    assert len(protocol.documents) == 1


def test_the_protocol_of_the_paper_joins_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = next(t for t in PROTOCOLS["paper-train-split"] if t.file == "wikitext-train")
    texts = ["", " = Frost = \n", "", "frost and soil\n", " \n", "pear twine"] * 9
    rows(tmp_path / "wikitext-train.jsonl", texts)
    protocol = text_protocol(text, tokenizer, data=str(tmp_path), positions=32, windows=5)
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    assert protocol.windows[0].shape == (5, 32) and protocol.windows[0].flatten().tolist() == ids[:160]
    assert protocol.documents == () and "train split" in protocol.record()["note"]
    short = text_protocol(text, tokenizer, data=str(tmp_path), positions=len(ids) - 5)
    assert [tuple(part.shape) for part in short.windows] == [(1, len(ids) - 5)]  # the rest is no whole window
    with pytest.raises(UserError, match="tokens, less than a window of 8,192"):
        text_protocol(text, tokenizer, data=str(tmp_path))


@pytest.mark.parametrize("form", ["file.txt", "folder"])
def test_other_forms_of_a_local_text(form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = Text("heldout/c4", "c4", "hub", "validation")
    place = tmp_path / ("c4.txt" if form == "file.txt" else "c4/part.txt")
    place.parent.mkdir(exist_ok=True)
    place.write_text("frost and soil")
    protocol = text_protocol(text, tokenizer, data=str(tmp_path))
    assert protocol.windows[0].flatten().tolist() == tokenizer("frost and soil")["input_ids"]


def test_a_missing_text_names_the_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text: Any = PROTOCOLS["heldout"][0]
    with pytest.raises(
        UserError,
        match=r"holds no c4.txt, c4.jsonl, c4.json, c4.csv, c4.tsv or c4.parquet, the validation split of allenai/c4",
    ):
        text_protocol(text, tokenizer, data=str(tmp_path))
    with pytest.raises(UserError, match="no such folder; name one that holds c4"):
        text_protocol(text, tokenizer, data=str(tmp_path / "none"))
