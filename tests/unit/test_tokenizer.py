from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from secateur.data.documents import Document
from secateur.data.encode import encode_texts
from secateur.data.tokenizer import (
    END,
    check_ids,
    encode_documents,
    id_bound,
    load_tokenizer,
    token_hash,
    train_tokenizer,
)
from secateur.errors import UserError

TEXTS = [f"the {a} of the {b}\r\n\tand so on" for a in ("hedge", "rose", "pear") for b in ("garden", "wall", "yard")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 280)


def altered(tokenizer: PreTrainedTokenizerFast, folder: Path, **parts: object) -> Path:
    """The tokenizer saved with top-level entries of its JSON replaced."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return folder


def test_training_gives_bytes_and_one_special_token(tokenizer: PreTrainedTokenizerFast):
    assert len(tokenizer) == id_bound(tokenizer) == 280
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (END, END, 0)
    text = " é\r\n\0日本 \U0001f331 the  hedge"
    ids = encode_texts(tokenizer, [text])[0]
    assert ids[0] == 0 and 0 not in ids[1:]
    assert tokenizer.decode(ids[1:].tolist()) == text


def test_training_depends_on_the_texts_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    code = (
        "import sys; from secateur.data.tokenizer import train_tokenizer; import json;"
        "train_tokenizer(reversed(json.load(sys.stdin)), 280).save_pretrained(sys.argv[1])"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")],
        input=json.dumps(TEXTS),
        text=True,
        check=True,
        env=environment,
    )
    tokenizer.save_pretrained(tmp_path / "this")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "this" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_training_refuses_a_vocabulary_out_of_range():
    with pytest.raises(UserError, match=r"256 is too small .* 257"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match=r"gives only (\d+) tokens, not a vocabulary of 5000; lower .* to \1 "):
        train_tokenizer(TEXTS, 5000)
    assert len(train_tokenizer(["a"], 257)) == 257


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert [ids.tolist() for ids in encode_texts(loaded, TEXTS)] == [
        ids.tolist() for ids in encode_texts(tokenizer, TEXTS)
    ]
    loaded.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_loading_what_is_no_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "someone" / "something")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no tokenizer; copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match="has no vocabulary; copy"):
        load_tokenizer(tmp_path)
    for text in ("{", '{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot be loaded .*; restore") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_loading_runs_no_code_of_the_checkpoint(tmp_path: Path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_eos_closes_documents_only_where_nothing_else_is_added(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    opened = encode_texts(tokenizer, ["the hedge", "a"])
    plain = load_tokenizer(altered(tokenizer, tmp_path / "plain", post_processor=None))
    closed = encode_texts(plain, ["the hedge", "a"])
    assert [ids.tolist() for ids in closed] == [[*ids[1:].tolist(), 0] for ids in opened]
    plain.eos_token = None
    assert [ids.tolist() for ids in encode_texts(plain, ["the hedge", "a"])] == [ids[1:].tolist() for ids in opened]
    assert encode_texts(plain, []) == []


def test_long_documents_are_neither_cut_nor_warned_about(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    loaded = load_tokenizer(altered(tokenizer, tmp_path / "cut", truncation=cut))
    loaded.model_max_length = 4
    with caplog.at_level(logging.WARNING):
        ids = encode_texts(loaded, ["the hedge " * 50])[0]
    assert len(ids) > 50 and ids.dtype == np.int64
    assert not caplog.records


def test_a_stream_reads_no_more_than_it_needs(tokenizer: PreTrainedTokenizerFast):
    read = []

    def documents(count: int) -> Iterator[Document]:
        for number in range(count):
            read.append(number)
            yield Document(str(number), TEXTS[number % len(TEXTS)])

    whole = encode_documents(documents(40), tokenizer).ids
    assert (
        whole.tolist() == np.concatenate(encode_texts(tokenizer, [TEXTS[n % len(TEXTS)] for n in range(40)])).tolist()
    )
    read.clear()
    assert encode_documents(documents(10_000), tokenizer, 24).ids.tolist() == whole[:24].tolist()
    assert len(read) <= 16
    assert encode_documents(documents(40), tokenizer, 10**6).ids.tolist() == whole.tolist()
    empty = encode_documents([], tokenizer).ids
    assert empty.shape == (0,) and empty.dtype == np.int64


def test_every_id_of_a_text_needs_a_row(tokenizer: PreTrainedTokenizerFast):
    check_ids(np.array([[3, 278]]), 279, tokenizer, "model")
    check_ids(np.zeros(0, dtype=np.int64), 279, tokenizer, "model")
    token = tokenizer.convert_ids_to_tokens(279)
    with pytest.raises(UserError) as error:
        check_ids(np.array([3, 279]), 279, tokenizer, "model")
    problem = f"model: the text holds the token {token!r} with id 279, but the embedding has 279 rows; "
    assert str(error.value).startswith(problem)


def test_ids_with_gaps_are_bounded_by_the_largest(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    last = max(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    raw["model"]["vocab"][last] = 999
    path.write_text(json.dumps(raw))
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) < 300
    assert id_bound(loaded) == 1000


def test_the_hash_is_of_shape_and_values():
    ids = np.arange(6)
    expected = hashlib.sha256(b"[6]" + np.arange(6, dtype="<i8").tobytes()).hexdigest()
    assert token_hash(ids) == token_hash(ids.astype(np.uint16)) == token_hash(ids.astype(">i4")) == expected
    assert len({token_hash(array) for array in (ids, ids.reshape(2, 3), ids.reshape(3, 2), ids[::-1])}) == 4
    assert token_hash(ids.reshape(2, 3).T) == token_hash(ids.reshape(2, 3).T.copy())
