from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import hf, logits, tiny_llama
from secateur.errors import UserError
from secateur.evaluation.loss import Protocol, token_losses, window_losses


def stream(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, tokens)


def naive(model: PreTrainedModel, ids: np.ndarray, length: int) -> list[list[float]]:
    """Each window's token losses, one at a time, each from its own pass over what comes before it."""
    windows = []
    for start in range(0, len(ids), length):
        window, losses = ids[start : start + length].tolist(), []
        for position in range(1, len(window)):
            row = logits(model, torch.tensor([window[:position]]))[0, -1].double().tolist()
            top = max(row)
            losses.append(top + math.log(sum(math.exp(v - top) for v in row)) - row[window[position]])
        if losses:
            windows.append(losses)
    return windows


@pytest.mark.parametrize("tokens", [32, 35, 33, 5, 8])  # whole; a tail; a tail of one token; only a tail; one window
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluate_against_a_naive_loop(tokens: int, batch: int, tmp_path: Path) -> None:
    model, ids = hf(tiny_llama(tmp_path)), stream(tokens)
    protocol = Protocol.of_stream(ids, 8, "test")
    steps: list[int] = []
    result = window_losses(model, protocol, batch=batch, advance=steps.append).summary()
    expected = naive(model, ids, 8)
    every = [loss for window in expected for loss in window]
    assert result["windows"] == pytest.approx([sum(w) / len(w) for w in expected], rel=1e-5)
    assert result["loss"] == pytest.approx(sum(every) / len(every), rel=1e-5)  # each token counts alike
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == protocol.tokens == protocol.record()["tokens"] == len(every)
    assert sum(steps) == sum(len(w) + 1 for w in expected)
    assert protocol.record()["windows"] == len(expected)


def test_token_losses_are_the_library_s(tmp_path: Path) -> None:
    model, ids = hf(tiny_llama(tmp_path)).requires_grad_(False), torch.from_numpy(stream(24).reshape(3, 8))
    losses = token_losses(model, ids)
    assert losses.shape == (3, 7) and losses.dtype == torch.float32
    assert float(losses.mean()) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(training: bool, tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path, attention_dropout=0.5)).train(training)
    protocol = Protocol.of_stream(stream(20), 8, "test")
    assert window_losses(model, protocol).summary() == window_losses(model, protocol).summary()  # no dropout
    assert model.training is training


def test_the_fingerprint_is_of_the_ids() -> None:
    ids = stream(35)
    a = Protocol.of_stream(ids, 8, "a").record()
    b = Protocol.of_stream(ids.copy(), 8, "b").record()
    assert a["fingerprint"] == b["fingerprint"] and a["source"] != b["source"]
    changed = ids.copy()
    changed[-1] = (changed[-1] + 1) % 61
    others = [
        Protocol.of_stream(changed, 8, "a"),
        Protocol.of_stream(ids, 7, "a"),
        Protocol.of_stream(ids[:-1], 8, "a"),
        Protocol.of_stream(ids[::-1].copy(), 8, "a"),
    ]
    prints = {p.record()["fingerprint"] for p in others}
    assert len(prints) == 4 and a["fingerprint"] not in prints


@pytest.mark.parametrize("tokens", [0, 1])
def test_too_little_text(tokens: int) -> None:
    with pytest.raises(UserError, match="held-out: has fewer than two tokens"):
        Protocol.of_stream(stream(tokens), 8, "held-out")


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="held-out: the loss is nan"):
        window_losses(model, Protocol.of_stream(stream(20), 8, "held-out")).summary()
