"""Chat data: the template's text and the assistant's tokens, from rows to gradients, against TRL and naive loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur
from chat_cases import CASES, GOLDEN, chat_model
from chat_tokenizers import CONVERSATIONS, MESSAGE_PAIRS, PAIRS, TEMPLATES, chat_tokenizer, turns
from helpers import hf, logits
from secateur import distributed
from secateur.cli import main
from secateur.config import identity
from secateur.data import external_sort
from secateur.data.domains import DomainTokens, document_stream
from secateur.data.shards import TokenStore
from secateur.errors import UserError
from secateur.evaluation.loss import Losses, Protocol, window_losses
from secateur.evaluation.token_windows import calibration_windows, heldout_protocol
from secateur.losses.next_token import IGNORE_INDEX
from secateur.model.checkpoint import Checkpoint
from secateur.training import loop
from secateur.training.batches import Slice
from secateur.training.heldout import domain_protocols
from secateur.training.parallel import TrainModule
from secateur.training.recipe import Recipe

MANY = [turns(f"Question {n}?", f"Answer {n * n}.", *(("More?", "No.") if n % 3 else ())) for n in range(60)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"text:{path}"


def build(folder: Path, rows: list[dict[str, Any]], format: str, tokenizer: Any, **fields: Any) -> TokenStore:
    """Write rows, and the shards of them."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder / "encoder")
    fields = {"holdout": 0, "workers": 1, "format": format, **fields}
    corpus = secateur.build_corpus(
        write_rows(folder / "rows.jsonl", rows), folder / "corpus", tokenizer=folder / "encoder", **fields
    )
    return TokenStore(corpus.path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = chat_model(tmp_path_factory.mktemp("model"))
    chat_tokenizer("chatml").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Sixty conversations, a third of them held out, in shards of 500 tokens."""
    rows = [{"messages": messages} for messages in MANY]
    folder = tmp_path_factory.mktemp("store")
    return build(folder, rows, "messages", chat_tokenizer("chatml"), holdout=0.33, shard_tokens=500)


def labels_of(store: TokenStore, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each document, as TRL has them."""
    ends = [*store.offsets(split)[1:].tolist(), store.tokens(split)]
    documents = []
    for start, stop in zip(store.offsets(split).tolist(), ends, strict=True):
        ids, mask = store.read(split, start, stop), store.targets(split, start, stop)
        assert mask is not None
        documents.append((ids.tolist(), np.where(mask, ids, IGNORE_INDEX).tolist()))
    return documents


# --- against TRL's SFTTrainer


@pytest.mark.parametrize("name", CASES)
def test_ids_targets_and_loss_are_those_of_trl(name: str, tmp_path: Path) -> None:
    case, golden = CASES[name], json.loads(GOLDEN.read_text())[name]
    store = build(tmp_path, case.rows, case.format, case.tokenizer)
    assert sorted(labels_of(store)) == sorted((row["input_ids"], row["labels"]) for row in golden["rows"])
    total = store.tokens("train")
    network = hf(chat_model(tmp_path))
    protocol = Protocol.of_stream(document_stream(store, "train", 0, total), total, "rows")
    assert protocol.tokens == golden["targets"]
    assert window_losses(network, protocol).mean() == pytest.approx(golden["loss"], rel=1e-5)
    data = Slice(store, 0, total, Recipe(sequence=total, tokens_per_step=total, attention="document"))
    batch = data.batch([(0, total)])
    with torch.no_grad():
        loss = TrainModule(network).train()(batch.ids, batch.positions, batch.targets).total
    assert data.targets([(0, total)]) == golden["targets"]
    assert float(loss) / golden["targets"] == pytest.approx(golden["loss"], rel=1e-5)


# --- templates


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_stands_once(template: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(template, bos=bos)
    ((ids, labels),) = labels_of(build(tmp_path, [{"messages": turns("Hm?", "Yes.")}], "messages", tokenizer))
    begins = bos or template in ("bos", "strict")
    assert ids.count(1) == begins and (ids[0] == 1) == begins
    answer = {"bos": " Yes.</s>", "marked": "Yes.<|im_end|>", "forgetful": "<think>\n</think>\nYes.<|im_end|>\n"}
    text = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert text == answer.get(template, "Yes.<|im_end|>\n")


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}|{% endif %}" + TEMPLATES["chatml"]
    rows = [{"messages": turns("Hm?", "Yes."), "tools": json.dumps([{"name": "shears"}])}]
    ((ids, _),) = labels_of(build(tmp_path, rows, "messages", tokenizer))
    assert tokenizer.decode(ids).startswith("shears|<|im_start|>user")


BAD_ROWS: dict[str, tuple[str, str, Any, str]] = {
    "no template": ("", "messages", turns("a", "b"), "`format`: the tokenizer has no chat template"),
    "system role": (
        "strict",
        "messages",
        turns("a", "b", system="c"),
        "rows.jsonl:1: the chat template refuses it",
    ),
    "unknown role": (
        "bos",
        "messages",
        [*turns("a", "b"), {"role": "critic", "content": "tut"}],
        "rows.jsonl:1: the chat template leaves out message 2 (role 'critic')",
    ),
    "no answer": ("chatml", "messages", turns("a"), "rows.jsonl:1: no token is the assistant's"),
    "answer first": (
        "chatml",
        "messages",
        turns("a", "b")[1:],
        "rows.jsonl:1: the conversation begins with",
    ),
    "prefix": (
        "forgetful",
        "messages",
        turns("a", "b", "c", "d"),
        "rows.jsonl:1: the chat template renders the",
    ),
    "no list": ("chatml", "messages", "hello", "rows.jsonl:1: the field 'messages' is str, not a list of messages"),
    "empty": ("chatml", "messages", [], "rows.jsonl:1: the field 'messages' has no messages"),
    "other keys": (
        "chatml",
        "messages",
        [{"speaker": "human", "words": "a"}],
        "rows.jsonl:1: message 0 of 'messages' has no `role` and `content`, but 'speaker', 'words'",
    ),
    "image": (
        "chatml",
        "messages",
        [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}],
        "rows.jsonl:1: message 0 of 'messages' has a part of type image, not text",
    ),
    "missing": ("chatml", "prompt-completion", turns("a", "b"), "rows.jsonl:1: no field 'prompt'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, format, messages, line = BAD_ROWS[name]
    chat_tokenizer(template or None).save_pretrained(tmp_path / "encoder")
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    command = ["data", source, str(tmp_path / "out"), "--tokenizer", str(tmp_path / "encoder")]
    assert main([*command, "--format", format, "--workers", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.replace("`format`", "--format") in error
    assert not (tmp_path / "out").exists()


def test_rows_of_another_format_name_the_remedy(tmp_path: Path) -> None:
    for rows, remedy in (
        ([{"messages": turns("a", "b")}], "set `format` to messages to read it"),
        ([{"conversations": turns("a", "b")}], "set `format` to messages and `field` to conversations"),
        (PAIRS, "set `format` to prompt-completion"),
    ):
        with pytest.raises(UserError, match=remedy):
            build(tmp_path, list(rows), "text", chat_tokenizer("chatml"))
    with pytest.raises(UserError, match=r"`format`: .* is plain text"):
        (tmp_path / "a.txt").write_text("a")
        secateur.build_corpus(
            f"text:{tmp_path / 'a.txt'}", tmp_path / "out", tokenizer=tmp_path / "encoder", format="messages"
        )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_that_do_not_fit_are_skipped_and_counted(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shards as without them, also over many runs."""
    monkeypatch.setattr(external_sort, "BYTES", 400)
    good = [{"messages": messages} for messages in MANY[:20]]
    bad = [{"messages": turns("a", "b", system="c")}, {"messages": turns("a")}, {"messages": 3}, {"messages": None}]
    tokenizer = chat_tokenizer("strict")
    plain = build(tmp_path / "plain", [*good, good[0]], "messages", tokenizer)
    mixed = build(
        tmp_path / "mixed", [*bad, *good, *bad, good[0]], "messages", tokenizer, on_bad_row="skip", workers=workers
    )
    assert labels_of(mixed) == labels_of(plain)
    assert mixed.manifest.provenance["duplicates"] == plain.manifest.provenance["duplicates"] == 1
    lines = capsys.readouterr().err
    assert "4 documents skipped (2 not a conversation, 2 null)" in lines
    assert "4 documents skipped (2 refused by the chat template, 2 without an assistant turn), the first: rows" in lines


# --- shards


def test_shards_keep_the_targets(store: TokenStore) -> None:
    """Over the bounds of shards, by domain, and in the manifest."""
    masks, total = [], store.tokens("train")
    for ids, labels in labels_of(store):
        assert np.array_equal(np.array(labels) != IGNORE_INDEX, np.array(labels) == ids)
        masks += [label != IGNORE_INDEX for label in labels]
    assert store.manifest.splits["train"].targets == sum(masks)
    mask = store.targets("train", 480, 1020)
    assert mask is not None and mask.tolist() == masks[480:1020]
    view = DomainTokens(store, "train", 0, total, 64)
    by_domain = view.targets("train", 10, 700)
    assert by_domain is not None and by_domain.tolist() == masks[10:700]


def test_changed_targets_are_detected(tmp_path: Path) -> None:
    store = build(
        tmp_path, [{"messages": messages} for messages in CONVERSATIONS], "messages", chat_tokenizer("marked")
    )
    store.verify()
    path = store.folder / "targets.train-00000.npy"
    np.save(path, ~np.load(path))
    with pytest.raises(UserError, match=r"targets\.train-00000\.npy: has changed"):
        store.verify()
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        TokenStore(store.folder)


def test_text_has_no_targets_and_its_identity_stays(tmp_path: Path) -> None:
    store = build(tmp_path, [{"text": "one"}, {"text": "two"}], "text", chat_tokenizer("chatml"))
    assert store.targets("train", 0, 3) is None
    assert not list(store.folder.glob("targets*"))
    assert "targets" not in json.dumps(identity(store.manifest))


# --- losses


def naive_losses(network: Any, documents: list[tuple[list[int], list[int]]], length: int) -> list[float]:
    """Loss of each target, one document's part of one window at a time."""
    at, losses = 0, []
    for ids, labels in documents:
        begin = 0
        while begin < len(ids):
            end = min(len(ids), begin + length - (at + begin) % length)
            scores = logits(network, torch.tensor([ids[begin:end]]))[0].double().log_softmax(dim=1)
            places = [i for i in range(begin + 1, end) if labels[i] != IGNORE_INDEX]
            losses += [-float(scores[i - begin - 1, ids[i]]) for i in places]
            begin = end
        at += len(ids)
    return losses


def test_evaluation_measures_targets_within_conversations(store: TokenStore, model: Path) -> None:
    network = hf(model)
    protocol = heldout_protocol(Checkpoint(model), f"shards:{store.folder}", seqlen=24)
    losses: Losses = window_losses(network, protocol)
    naive = naive_losses(network, labels_of(store, "heldout"), 24)
    assert any(count == 0 for count, _ in losses.windows())
    assert protocol.tokens == len(naive) == sum(count for count, _ in losses.windows())
    assert losses.mean() == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    summary = losses.summary()
    assert sum(summary["documents"]["tokens"]) == sum(summary["window_tokens"]) == len(naive)
    assert sum(summary["documents"]["loss_sum"]) == pytest.approx(sum(naive), rel=1e-5)
    assert sum(bucket["tokens"] for bucket in losses.positions()) == len(naive)
    overlapping = heldout_protocol(Checkpoint(model), f"shards:{store.folder}", seqlen=24, stride=8)
    assert len(naive) < overlapping.tokens <= int(store.manifest.splits["heldout"].targets or 0)
    (by_domain,) = domain_protocols(store, 24, 5).values()
    assert torch.equal(by_domain.targets[0], protocol.targets[0][:5])


def test_other_masks_are_other_protocols(store: TokenStore, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": messages} for messages in MANY[:9]])
    protocols = []
    for template in ("chatml", "marked"):
        chat_tokenizer(template).save_pretrained(model)
        protocols.append(heldout_protocol(Checkpoint(model), rows, format="messages", seqlen=64))
    assert all(torch.equal(*parts) for parts in zip(*(p.windows for p in protocols), strict=True))
    plain = Protocol(protocols[0].windows, rows)
    prints = {protocol.record()["fingerprint"] for protocol in [*protocols, plain]}
    assert len(prints) == 3
    chat_tokenizer("chatml").save_pretrained(model)


def test_gradients_are_those_of_one_batch(store: TokenStore, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the micro-batches and processes; some windows have no target, and one process may have none."""
    total, recipe = 40 * 24, {"sequence": 24, "tokens_per_step": 40 * 24, "attention": "document"}
    reference, network = hf(model), hf(model)
    data = Slice(store, 0, total, Recipe(**recipe))
    spans = sorted(data.spans(0), key=lambda span: data.targets([span]))
    assert not data.targets(spans[:2]) and data.targets(spans[-1:])
    batch = data.batch(spans)
    assert batch.targets is not None
    module = TrainModule(reference).train()
    loss = module(batch.ids, batch.positions, batch.targets).total / data.targets(spans)
    loss.backward()
    for size, world in ((3, 1), (40, 1), (7, 2), (1, 3)):
        network.zero_grad()
        sums = np.zeros(len(spans))
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
            monkeypatch.setattr(distributed, "all_reduce", lambda values: values)
            part = Slice(store, 0, total, Recipe(**recipe, micro_batch=size))
            losses, _ = loop._accumulate_gradients(
                TrainModule(network).train(), part, spans, data.targets(spans), [lambda: False]
            )
            sums += losses
        assert sums[:2].tolist() == [0, 0] and np.isfinite(sums).all()
        assert sums.sum() / data.targets(spans) == pytest.approx(loss.item(), rel=1e-5)
        for (name, parameter), expected in zip(network.named_parameters(), reference.parameters(), strict=True):
            assert parameter.grad is not None and expected.grad is not None
            torch.testing.assert_close(
                parameter.grad / world, expected.grad, rtol=1e-4, atol=1e-5, msg=f"{name} {size}"
            )


@pytest.mark.parametrize("teacher", [False, True])
def test_a_training_run_counts_its_targets(
    teacher: bool, store: TokenStore, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = 6 * 64 + 20
    recipe = {"sequence": 32, "tokens_per_step": 64, "attention": "document" if teacher else "window"}
    run = secateur.train(
        tmp_path / "out",
        init=model,
        tokens=tokens,
        data=f"shards:{store.folder}",
        recipe=recipe,
        points=1,
        **({"teacher": str(model), "alpha": 1.0} if teacher else {}),
    )
    mask = store.targets("train", 0, tokens)
    assert mask is not None
    expected = sum(int(mask[start + 1 : start + 32].sum()) for start in range(0, tokens, 32))
    assert run.result["targets"] == expected < tokens
    line = capsys.readouterr().err
    assert f"chat data: the loss is on {expected} targets of {tokens} tokens, those of the assistant; " in line
    assert ("set attention=document" in line) != teacher
    metrics = [json.loads(text) for text in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    assert len(losses) == 7 and np.isfinite(losses).all()
    if teacher:  # the student is its own teacher
        assert losses[0] == pytest.approx(0, abs=1e-5)


def test_a_slice_without_targets_is_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": turns("x" * 200, "y")}]
    store = build(tmp_path, rows, "messages", chat_tokenizer("chatml"))
    fields: dict[str, Any] = {"init": model, "data": f"shards:{store.folder}", "recipe": {"sequence": 32}}
    fields["recipe"]["tokens_per_step"] = 64
    with pytest.raises(UserError, match="`data`: no token of the slice is the assistant's"):
        secateur.train(tmp_path / "out", tokens=128, **fields)


# --- calibration


def test_calibration_renders_conversations(model: Path, tmp_path: Path) -> None:
    """With the assistant's answers, or with the prompt that asks for one."""
    tokenizer = chat_tokenizer("chatml")
    prompts = [turns("Who?"), turns("Why?", "So.", "And?")]
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": m} for m in [*CONVERSATIONS, *prompts]])
    windows = calibration_windows(Checkpoint(model), source, format="messages", seqlen=32)
    expected: list[int] = []
    for messages in CONVERSATIONS:
        expected += tokenizer.apply_chat_template(messages)["input_ids"]
    for messages in prompts:
        expected += tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert windows.flatten().tolist() == expected[: len(expected) // 32 * 32]
    fields: dict[str, Any] = {"method": "wanda", "ratio": 0.5, "seqlen": 32}
    cut = secateur.prune(model, tmp_path / "a", calibration=source, format="messages", **fields)
    same = secateur.prune(model, tmp_path / "b", calibration=windows, **fields)
    assert (cut.path / "plan.safetensors").read_bytes() == (same.path / "plan.safetensors").read_bytes()


def test_parquet_rows_are_those_of_json(tmp_path: Path, model: Path) -> None:
    """Parquet gives every message every key; null ones do not reach the template."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{**messages[0], "name": "Ann"}, *messages[1:]]} for messages in CONVERSATIONS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first = build(tmp_path / "json", rows, "messages", chat_tokenizer("chatml"))
    second = secateur.build_corpus(
        f"text:{tmp_path / 'rows.parquet'}",
        tmp_path / "corpus",
        tokenizer=tmp_path / "json" / "encoder",
        format="messages",
        holdout=0,
        workers=1,
    )
    assert sorted(labels_of(TokenStore(second.path))) == sorted(labels_of(first))


def test_the_command_line_prints_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_tokenizer("chatml").save_pretrained(tmp_path)
    write_rows(tmp_path / "rows.jsonl", list(MESSAGE_PAIRS))
    command = ["data", f"text:{tmp_path / 'rows.jsonl'}", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    assert main([*command, "--format", "prompt-completion", "--holdout", "0", "--workers", "1"]) == 0
    assert "280 tokens" in (text := capsys.readouterr().out) and "of which 52 targets (18.6%)" in text
