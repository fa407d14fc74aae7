"""Saved log-probabilities of a teacher: their values, the loss of a student on them, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from helpers import files, hf, tiny_llama, token_corpus
from processes import together
from secateur.data.shards import TokenStore
from secateur.errors import UserError
from secateur.losses.top_k import TopK
from secateur.training.batches import Span
from secateur.training.teacher_logits import TeacherLogits, decode, encode

VOCABULARY, SEQUENCE, TOKENS = 2048, 32, 1600
RECIPE = {"sequence": SEQUENCE, "tokens_per_step": 64, "peak_rate": 1e-3, "micro_batch": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(folder, seed=0, vocab_size=VOCABULARY, num_hidden_layers=2)
    tiny_llama(folder, seed=1, vocab_size=VOCABULARY, num_hidden_layers=1)
    token_corpus(folder / "corpus", tokens=6000, vocabulary=VOCABULARY)
    saved(folder, "logits")
    return folder


def saved(home: Path, name: str, **changes: Any) -> Any:
    fields = {"tokens": TOKENS, "skip": 64, "sequence": SEQUENCE, "device": "cpu", **changes}
    return secateur.teach(home / "llama-0", home / "corpus", home / name, **fields)


def trained(home: Path, out: Path, teacher: Any, **changes: Any) -> Any:
    fields: dict[str, Any] = {"tokens": 640, "skip": 128, "recipe": RECIPE, "alpha": 0.7, **changes}
    data = fields.pop("data", f"shards:{home / 'corpus'}")
    return secateur.train(out, init=home / "llama-1", data=data, teacher=teacher, device="cpu", **fields)


def distributions(home: Path, spans: list[Span]) -> Tensor:
    """The teacher's log-probabilities by plain transformers, [rows, vocabulary]."""
    store, model = TokenStore(home / "corpus"), hf(home / "llama-0")
    rows = []
    for start, stop in spans:
        ids = torch.from_numpy(store.read("train", start, stop).astype("int64"))[None]
        rows.append(model(input_ids=ids).logits[0, :-1].float().log_softmax(-1))
    return torch.cat(rows).detach()


def test_saved_values_are_the_teacher_s_own(home: Path) -> None:
    spans = [(64, 96), (64 + 10 * SEQUENCE, 64 + 11 * SEQUENCE), (64 + TOKENS - SEQUENCE, 64 + TOKENS)]
    rows = TeacherLogits(home / "logits").read(spans)
    reference = distributions(home, spans)
    top = reference.topk(64, dim=1)
    assert rows.ids.shape == (3 * (SEQUENCE - 1), 64)
    torch.testing.assert_close(rows.log_probs, reference.gather(1, rows.ids), atol=2e-3, rtol=0)
    torch.testing.assert_close(rows.log_probs, top.values, atol=2e-3, rtol=0)  # near-ties may change places
    rest = torch.log1p(-top.values.exp().sum(1, keepdim=True))
    torch.testing.assert_close(rows.log_rest, rest, atol=2e-3, rtol=0)


def test_a_row_survives_its_encoding_with_the_error_of_one_delta() -> None:
    """Errors do not add up along a row, however long it is."""
    log_probs = (torch.randn(20, 400) * 6).log_softmax(1).sort(dim=1, descending=True).values
    top = TopK(torch.arange(399).expand(20, -1), log_probs[:, :399], log_probs[:, 399:])
    back = decode(encode(top, 400))
    torch.testing.assert_close(back.log_probs, log_probs[:, :399], atol=4e-3, rtol=0)  # a delta of 4 to 8 has 1/512
    total = back.log_probs.exp().sum(1) + back.log_rest[:, 0].exp()
    torch.testing.assert_close(total, torch.ones(20), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 16}, {"recipe": {**RECIPE, "data_seed": 5}}, {"dtype": "bfloat16"}], ids=str
)
def test_a_student_learns_as_from_the_live_teacher(home: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    live = trained(home, tmp_path / "live", home / "llama-0", **{"top_k": 64, **changes})
    run = trained(home, tmp_path / "saved", f"logits:{home / 'logits'}", **changes)
    tolerance = 1e-2 if "dtype" in changes else 1e-3  # the live teacher computes in bfloat16 then, too
    for point, reference in zip(run.curve, live.curve, strict=True):
        assert point["training_loss"] == pytest.approx(reference["training_loss"], abs=tolerance)
        assert point["loss"] == pytest.approx(reference["loss"], abs=tolerance)
    assert run.teacher_flops is None and live.flops > run.flops


def test_a_killed_run_resumes_at_its_last_shard_to_the_same_bytes(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from secateur.training import teach

    write, count = teach._write_shard, []

    def stop_after_two(*arguments: Any) -> None:
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(arguments)
        write(*arguments)

    monkeypatch.setattr(teach, "_write_shard", stop_after_two)
    fields = {"tokens": TOKENS, "skip": 64, "sequence": SEQUENCE, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        secateur.teach(home / "llama-0", home / "corpus", tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(teach, "_write_shard", lambda *arguments: (count.append(arguments), write(*arguments)))
    secateur.teach(home / "llama-0", home / "corpus", tmp_path / "out", **fields)
    shards = json.loads((home / "logits" / "manifest.json").read_text())["shards"]
    assert len(count) == len(shards) > 3  # none was computed twice
    assert files(tmp_path / "out") == files(home / "logits")


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(home: Path, tmp_path: Path) -> None:
    line = ["teach", home / "llama-0", home / "corpus", tmp_path / "out", "--tokens", TOKENS, "--skip", 64]
    line += ["--sequence", SEQUENCE, "--device", "cpu"]
    together(2, [[str(word) for word in line]], tmp_path)
    assert files(tmp_path / "out") == files(home / "logits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": 96 + 7}, "its windows begin at token 64, one every 32 tokens, and none at 103"),
        ({"skip": 0}, "has tokens 64 to 1,664, but the run reads 0 to 640"),
        ({"tokens": 1600}, "has tokens 64 to 1,664, but the run reads 128 to 1,728"),
        ({"recipe": {**RECIPE, "sequence": 16}}, "was saved with sequence=32, not 16"),
        ({"recipe": {**RECIPE, "attention": "document"}}, "was saved with attention=window, not document"),
        ({"temperature": 2.0}, "was saved at temperature 1, not 2"),
        ({"top_k": 65}, "has the likeliest 64 ids, fewer than top_k=65"),
    ],
)
def test_what_does_not_fit_is_refused(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(home, tmp_path / "out", f"logits:{home / 'logits'}", **changes)
    assert not (tmp_path / "out").exists()


def test_other_shards_and_damage_are_refused(home: Path, tmp_path: Path) -> None:
    other = token_corpus(tmp_path / "other", tokens=6000, vocabulary=VOCABULARY, seed=1)
    with pytest.raises(UserError, match="was saved on other token shards"):
        trained(home, tmp_path / "out", f"logits:{home / 'logits'}", data=f"shards:{other}")
    with pytest.raises(UserError, match="holds no log-probabilities"):
        trained(home, tmp_path / "out", f"logits:{tmp_path}")
    copy = saved(home, "damaged").path
    path = copy / "logits-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"logits-00001.safetensors is damaged; save the log-probabilities again"):
        trained(home, tmp_path / "out", f"logits:{copy}")
    path.unlink()
    with pytest.raises(UserError, match=r"logits-00001.safetensors is missing"):
        trained(home, tmp_path / "out", f"logits:{copy}")


def test_requests_out_of_range(home: Path, tmp_path: Path) -> None:
    for fields, message in (
        ({"top_k": VOCABULARY + 1}, "`top_k`: 2049 is more than the teacher's vocabulary of 2048"),
        ({"tokens": 100_000}, "lower `tokens` or `skip`"),
        ({"sequence": 65}, "`sequence`: 65 is more than the teacher's 64 positions"),
    ):
        with pytest.raises(UserError, match=message):
            saved(home, "refused", **fields)
        assert not (home / "refused").exists()
    with pytest.raises(UserError, match="exists"):
        saved(home, "logits")


def test_the_size_is_what_was_estimated(home: Path) -> None:
    from secateur.training.logits_size import logits_size

    manifest = TeacherLogits(home / "logits").manifest
    estimate = logits_size(TOKENS, SEQUENCE, 64, VOCABULARY)
    assert estimate <= manifest.bytes <= estimate + 500 * len(manifest.shards)
