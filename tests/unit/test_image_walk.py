"""Calibration on images with text: the walk's states are those of the whole image-text model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers import tiny_llama
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


def test_the_cost_of_a_narrower_projector_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are the channels' outputs times the weights' norms; the loss is that with silenced channels."""
    directory, samples = tiny_wrapper(tmp_path, "llava"), samples_of("llava")
    result = prune(directory, tmp_path / "out", method="random-width", shape="hidden=32", calibration=samples)
    assert "by weights alone" in capsys.readouterr().err  # random-width looks at no images
    result = prune(directory, tmp_path / "images", method="minitron-width", shape="hidden=32", calibration=samples)
    model = opened_wrapper(directory)
    linear: Any = model.get_submodule("model.multi_modal_projector.linear_2")
    inputs: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    before = naive_loss(model, samples)
    hook.remove()
    outputs = torch.cat(inputs).square().mean(dim=0).sqrt()
    scores = outputs * linear.weight[result.plan.keep_hidden].detach().norm(dim=0)
    assert result.plan.keep_projector is not None
    assert result.plan.keep_projector.tolist() == sorted(scores.argsort(descending=True)[:32].tolist())
    silent = torch.tensor(sorted(set(range(48)) - set(result.plan.keep_projector.tolist())))
    linear.register_forward_pre_hook(lambda _, args: (args[0].index_fill(-1, silent, 0.0),))
    after = naive_loss(model, samples)
    assert f"from {before:.4f} to {after:.4f} nats" in capsys.readouterr().err


def test_what_reads_text_alone_refuses_images(tmp_path: Path) -> None:
    directory = tiny_wrapper(tmp_path, "gemma3")
    samples = samples_of("gemma3")
    for method in ("llm-pruner", "sheared"):
        with pytest.raises(UserError, match="on text alone"):
            prune(directory, tmp_path / method, method=method, ratio=0.3, calibration=samples)
    with pytest.raises(UserError, match=r"^`reconstruct`: blocks are tuned on text.*; name text$"):
        prune(directory, tmp_path / "out", method="wanda", ratio=0.3, calibration=samples, reconstruct=2)
    assert not list(tmp_path.glob("out*"))


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def llava_processor() -> LlavaProcessor:
    """A processor whose image token has the id that the tiny model's configuration names."""
    words = ["<pad>", "<unk>", "what", "is", "this", "user", "assistant", "<image>", ":", "a", "cat"]
    words += [f"w{number}" for number in range(61 - len(words))]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # type: ignore[dict-item]
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def conversation(image: str, answer: str) -> dict[str, Any]:
    """A row with one image and its answer."""
    question = [{"type": "image", "path": image}, {"type": "text", "text": "what is this"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_pairs(folder: Path, rows: list[Any]) -> str:
    """Write a file of conversations beside two images; the source that names it."""
    for name, colour in (("red.png", (200, 30, 30)), ("blue.png", (10, 20, 220))):
        Image.new("RGB", (20, 24), colour).save(folder / name)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return f"images:{folder / 'pairs.jsonl'}"


def test_conversations_in_a_file_are_what_the_processor_makes_of_them(tmp_path: Path) -> None:
    directory, processor = tiny_wrapper(tmp_path, "llava"), llava_processor()
    processor.save_pretrained(directory)
    source = write_pairs(tmp_path, [conversation("red.png", "a cat"), conversation("blue.png", "w1 w2 w3 w4")])
    samples = []
    for name, answer in (("red.png", "a cat"), ("blue.png", "w1 w2 w3 w4")):
        text = f"user : <image> what is this assistant : {answer} "
        with Image.open(tmp_path / name) as image:
            inputs: Any = processor(images=image.convert("RGB"), text=text, return_tensors="pt")  # type: ignore[call-arg]
            samples.append(dict(inputs))
    request = {"method": "wanda", "ratio": 0.5}
    result = prune(directory, tmp_path / "file", calibration=source, **request)
    expected = prune(directory, tmp_path / "samples", calibration=samples, **request)
    assert result.calibration["hash"] == expected.calibration["hash"]
    assert result.calibration["tokens"] == sum(sample["input_ids"].shape[1] for sample in samples)
    assert all(torch.equal(mask, expected.plan.masks[name]) for name, mask in result.plan.masks.items())
    opened = AutoProcessor.from_pretrained(result.path)  # the processor follows the model
    assert opened.chat_template == TEMPLATE
    assert prune(directory, tmp_path / "first", calibration=source, windows=1, **request).calibration["windows"] == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (conversation("https://example.org/cat.png", "a"), "local files"),
        (conversation("../red.png", "a"), "local files"),
        (conversation("green.png", "a"), "cannot be read as an image"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "red.png"}]}]}, "'video'"),
        ({"messages": [{"content": "what"}]}, "needs `role`"),
        ({"text": "what"}, "no list of `messages`"),
    ],
)
def test_faults_of_a_row_are_named(row: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    directory = tiny_wrapper(tmp_path, "llava")
    llava_processor().save_pretrained(directory)
    source = write_pairs(tmp_path / "pairs", [conversation("red.png", "a cat"), row])
    with pytest.raises(UserError, match=words) as error:
        prune(directory, tmp_path / "out", method="wanda", ratio=0.5, calibration=source)
    assert "pairs.jsonl:2" in str(error.value)


def test_models_without_images_or_processor_refuse_them(tmp_path: Path) -> None:
    source = write_pairs(tmp_path, [conversation("red.png", "a cat")])
    with pytest.raises(UserError, match="reads no images"):
        prune(tiny_llama(tmp_path), tmp_path / "a", method="wanda", ratio=0.5, calibration=source)
    with pytest.raises(UserError, match="processor"):
        prune(tiny_wrapper(tmp_path, "llava"), tmp_path / "b", method="wanda", ratio=0.5, calibration=source)
