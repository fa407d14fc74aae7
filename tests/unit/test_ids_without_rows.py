"""Tokenizers with more ids than their model has rows: what reads text works until the text uses such an id."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur
from helpers import hf, naive_loss, tiny_family
from secateur.config import fingerprint
from secateur.data.shards import TokenStore
from secateur.data.tokenizer import encode_documents, load_tokenizer, train_tokenizer
from secateur.errors import UserError
from secateur.evaluation.lm_eval.accuracy import language_model, measure_task
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.measure import text_protocols
from secateur.evaluation.protocols import PROTOCOLS
from secateur.evaluation.token_windows import document_windows
from secateur.files import write_json
from secateur.model.checkpoint import Checkpoint
from secateur.study.session import Study

SENTENCE = "The gardener prunes the old tree, and the tree grows new leaves in spring. "
ROWS = 262
BEYOND = r"holds the token '<image>' with id 262, but the embedding has 262 rows"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, as the Gemma 3 models are, with a padding token as well; ``plain`` text and ``image`` text."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer: Any = train_tokenizer([SENTENCE * 40], ROWS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<pad>")] == [ROWS, ROWS + 1]
    tiny_family(folder, "gemma3", vocab_size=ROWS).rename(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, sentence in (("plain", SENTENCE), ("image", SENTENCE.replace("tree", "<image>"))):
        lines = [json.dumps({"text": f"{number} {sentence * 4}"}) for number in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        secateur.build_corpus(f"text:{folder / name}.jsonl", folder / name, tokenizer=folder / "model", holdout=0.3)
    return folder


def test_evaluation(world: Path) -> None:
    source = f"text:{world / 'plain.jsonl'}"
    (result,) = secateur.evaluate(world / "model", data=source, windows=4, seqlen=16)
    documents = [json.loads(line)["text"] for line in (world / "plain.jsonl").read_text().splitlines()]
    stream = load_tokenizer(world / "model")(documents[0])["input_ids"][:64]
    assert result.measurements[0].value == pytest.approx(
        naive_loss(hf(world / "model"), torch.tensor(stream).view(4, 16)), rel=1e-5
    )
    with pytest.raises(UserError, match=BEYOND):
        secateur.evaluate(world / "model", data=f"text:{world / 'image.jsonl'}", windows=4, seqlen=16)


@pytest.mark.parametrize("live", [False, True])
def test_pruning(live: bool, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = hf(world / "model") if live else world / "model"
    options: dict[str, Any] = {"seqlen": 16, "windows": 4, "tokenizer": world / "model" if live else None}
    text = f"text:{world / 'image.jsonl'}"
    with pytest.raises(UserError, match=BEYOND):
        secateur.prune(model, tmp_path / "no", method="wanda", ratio=0.5, calibration=text, **options)
    assert not (tmp_path / "no").exists()
    text = f"text:{world / 'plain.jsonl'}"
    secateur.prune(model, tmp_path / "out", method="wanda", ratio=0.5, calibration=text, **options)
    capsys.readouterr()
    secateur.prune(world / "model", tmp_path / "magnitude", method="magnitude", ratio=0.5)
    assert "its tokenizer has ids up to 263, and the embedding 262 rows" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "magnitude").get_vocab() == load_tokenizer(world / "model").get_vocab()
    with pytest.raises(UserError, match=BEYOND):
        document_windows(
            Checkpoint(world / "model"), f"text:{world / 'image.jsonl'}", field=None, windows=2, seqlen=8, seed=0
        )
    with pytest.raises(UserError, match="has ids up to 262, but the model's vocabulary is 262"):
        secateur.prune(
            world / "model", tmp_path / "no", method="sheared", ratio=0.5, calibration=f"shards:{world / 'image'}"
        )


def test_shards(world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 128, "recipe": {"sequence": 16, "tokens_per_step": 64, "peak_rate": 1e-3}}
    source = f"shards:{world / 'plain'}"
    (result,) = secateur.evaluate(world / "model", data=source, windows=32, seqlen=16)
    options |= {"heldout_windows": 32, "points": 1}
    trained = secateur.train(tmp_path / "out", init=world / "model", data=source, **options)
    assert trained.curve[0]["loss"] == pytest.approx(result.measurements[0].value, rel=0.2)
    again = secateur.train(tmp_path / "scratch", init="scratch", like=world / "model", data=source, **options)
    assert again.curve
    for call in (
        lambda source: secateur.evaluate(world / "model", data=source, seqlen=16),
        lambda source: secateur.train(tmp_path / "no", init=world / "model", data=source, **options),
        lambda source: secateur.train(tmp_path / "no", init="scratch", like=world / "model", data=source, **options),
    ):
        with pytest.raises(UserError, match="has ids up to 262, but the model's vocabulary is 262"):
            call(f"shards:{world / 'image'}")


@pytest.mark.parametrize(("name", "largest"), [("plain", ROWS - 1), ("image", ROWS)])
def test_the_largest_id_of_shards(name: str, largest: int, world: Path, tmp_path: Path) -> None:
    store = TokenStore(world / name)
    ids = np.concatenate([store.read(split, 0, store.tokens(split)) for split in ("train", "heldout")])
    assert store.largest_id == ids.max() <= largest and store.vocabulary == ROWS + 2
    shutil.copytree(world / name, tmp_path / "old")
    manifest = dataclasses.asdict(store.manifest)
    for split in manifest["splits"].values():
        del split["largest_id"]
    write_json(tmp_path / "old" / "manifest.json", manifest)
    old = TokenStore(tmp_path / "old")
    assert old.largest_id == store.largest_id
    assert old.fingerprint == store.fingerprint == fingerprint(store.manifest)


def test_texts_of_a_suite(world: Path, tmp_path: Path) -> None:
    text = PROTOCOLS["heldout"][0]
    for name, fits in (("plain", True), ("image", False)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{text.field: json.loads(line)["text"]} for line in (world / f"{name}.jsonl").read_text().splitlines()]
        (folder / f"{text.file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments: dict[str, Any] = {"data": str(folder), "windows": 2, "seqlen": 16}
        if fits:
            assert text_protocols(Checkpoint(world / "model"), [text], **arguments)
        else:
            with pytest.raises(UserError, match=BEYOND):
                text_protocols(Checkpoint(world / "model"), [text], **arguments)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, of the extra tasks")
def test_tasks(world: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    goals = {"plain": "Mend the rope.", "image": "Mend <image>."}
    measured = {}
    for name, goal in goals.items():
        (tmp_path / name).mkdir()
        rows = [{"goal": goal, "sol1": f"knot {n}", "sol2": "with a saw", "label": n % 2} for n in range(4)]
        (tmp_path / name / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = language_model(Checkpoint(world / "model"), hf(world / "model"))
        task = Task("piqa", str(tmp_path / name))
        if name == "plain":
            measured = measure_task(model, task).items
            assert len(measured) == 4
        else:
            with pytest.raises(UserError, match=f"piqa: the text {BEYOND}"):
                measure_task(model, task)
    model = language_model(Checkpoint(world / "model"), hf(world / "model"), batch=2)
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}

    def written(*contexts: str) -> list[str]:  # in one batch, the shorter one padded by an id that has a row
        return model.generate_until(
            [Instance("generate_until", {}, (text, settings), n) for n, text in enumerate(contexts)]
        )

    pair = "The tree", SENTENCE
    assert written(*pair) == [written(text)[0] for text in pair]
    with pytest.raises(UserError, match=BEYOND):
        written("The tree", "The <image>")


@pytest.mark.parametrize("name", ["plain", "image"])
def test_a_study(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = {"source": f"text:{world / name}.jsonl", "holdout": 0.3, "tokenizer": str(world / "model")}
    (tmp_path / "study.yaml").write_text(
        json.dumps(
            {
                "name": "rows",
                "corpus": corpus,
                "parent": {"checkpoint": str(world / "model")},
                "methods": ["minitron-depth"],
                "ratios": 0.5,
                "retrain": {"tokens": 256, "peak_rate": 1e-3},
                "settings": ["equal_training_tokens"],
                "calibration": {"windows": 4},
                "recipe": {"sequence": 16, "tokens_per_step": 64, "peak_rate": 1e-3},
                "evaluation": {"windows": 8, "points": 1},
            }
        )
    )
    study = Study.load(tmp_path / "study.yaml", out=tmp_path / "out")
    study.plan()
    outcome = study.run(jobs=1)
    assert bool(outcome.failed) == (name == "image")
    if name == "image":
        errors = capsys.readouterr().err
        assert "holds the token '<image>' with id 262" in errors and "Traceback" not in errors


def test_encoding_is_left_as_it_is(world: Path) -> None:
    """The same ids, with the token that has no row."""
    from secateur.data.readers import Document

    stream = encode_documents([Document("a", "<image>")], load_tokenizer(world / "model"))
    assert stream.ids.max() == ROWS
