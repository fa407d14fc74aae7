"""Calibration on images with text: the walk's states are those of the whole image-text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import prune
from secateur.calibration.image_walk import ImageWalk
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.live import LiveCheckpoint
from wrapper_models import IMAGE_TOKEN, WRAPPER_CONFIGS, image_inputs, image_logits, opened_wrapper, tiny_wrapper


def samples_of(name: str) -> list[dict[str, Any]]:
    """Two conversations with an image each, of different lengths, and one of text alone."""
    first, second = image_inputs(name, seed=3), image_inputs(name, seed=4)
    length = second["input_ids"].shape[1] - 4
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in second:
            second[key] = second[key][:, :length]
    ids = torch.randint(11, 61, (1, 9), generator=torch.Generator().manual_seed(5))
    return [first, second, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


@torch.no_grad()
def entering_states(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    """The states that enter each block of the whole model, and those that enter the last norm."""
    decoder: Any = model.get_decoder()
    states: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        states.append(args[0])

    hooks = [module.register_forward_pre_hook(record) for module in (*decoder.layers, decoder.norm)]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("name", WRAPPER_CONFIGS)
@pytest.mark.parametrize("live", [False, True])
def test_walked_states_are_those_of_the_whole_model(name: str, live: bool, tmp_path: Path) -> None:
    directory = tiny_wrapper(tmp_path, name)
    model, samples = opened_wrapper(directory), samples_of(name)
    expected = [entering_states(model, sample) for sample in samples]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    walk = ImageWalk(LiveCheckpoint(model) if live else Checkpoint(directory), samples)
    states = walk.start()
    for block in walk.blocks():
        for state, sample in zip(states, expected, strict=True):
            torch.testing.assert_close(state, sample[block.index], rtol=1e-5, atol=1e-5)
        states = block.run(states)
    for state, sample in zip(states, expected, strict=True):
        torch.testing.assert_close(state, sample[-1], rtol=1e-5, atol=1e-5)
    assert walk.loss(states) == pytest.approx(naive_loss(model, samples), rel=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model.get_decoder().layers) == walk.checkpoint.shape.layers  # type: ignore[arg-type]


def naive_loss(model: PreTrainedModel, samples: list[dict[str, Any]]) -> float:
    """Mean next-token loss of the tokens that are words, one at a time."""
    losses = []
    for sample in samples:
        logits = image_logits(model, sample)[0].double()
        for position, token in enumerate(sample["input_ids"][0, 1:].tolist()):
            if token != IMAGE_TOKEN:
                losses.append(float(logits[position].logsumexp(0) - logits[position, token]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", ["shortgpt", "minitron-depth", "minitron-width", "flap", "wanda", "sparsegpt"])
def test_methods_score_on_images(method: str, tmp_path: Path) -> None:
    directory = tiny_wrapper(tmp_path, "qwen3_vl")
    request = {"method": method, "ratio": 0.4, "out": tmp_path / "out", "calibration": samples_of("qwen3_vl")}
    result = prune(directory, **request)
    text = prune(directory, **{**request, "out": tmp_path / "text", "calibration": torch.arange(11, 59).reshape(4, 12)})
    assert result.calibration["windows"] == 3
    assert result.calibration["hash"] != text.calibration["hash"]
    assert {0, 1} <= set(result.plan.keep_layers.tolist())
    image_logits(opened_wrapper(result.path), image_inputs("qwen3_vl"))


def test_what_reads_text_alone_refuses_images(tmp_path: Path) -> None:
    directory = tiny_wrapper(tmp_path, "gemma3")
    samples = samples_of("gemma3")
    for method in ("llm-pruner", "sheared"):
        with pytest.raises(UserError, match="on text alone"):
            prune(directory, tmp_path / method, method=method, ratio=0.3, calibration=samples)
