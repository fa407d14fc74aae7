"""Image-text models: the language model is pruned, and the whole gives what the whole with silenced parts gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from helpers import token_corpus, windows
from reference import silenced
from secateur import evaluate, inspect, prune, train
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.model.wrappers import WRAPPERS
from secateur.pruning.job import Pruned
from wrapper_models import WRAPPER_CONFIGS, Tower, image_inputs, image_logits, opened_wrapper, tiny_wrapper

KINDS: dict[str, dict[str, Any]] = {
    "depth": {"method": "shortgpt", "ratio": 0.4},
    "width": {"method": "minitron-width", "shape": "hidden=32,ffn=48,kv_heads=2"},
    "ffn": {"method": "flap", "ratio": 0.2, "axes": "ffn", "options": {"bias": "none"}},
    "sparse": {"method": "wanda", "ratio": 0.5},
}

#: tensors outside the language model that a cut of the hidden axis changes, by the end of their names
_FOLLOWERS = {
    "gemma3": ("mm_input_projection_weight",),
    **dict.fromkeys(("mistral3", "internvl", "llava"), ("linear_1.weight", "linear_2.weight")),
    "llava_next": ("linear_1.weight", "linear_2.weight", "image_newline"),
    "smolvlm": ("modality_projection.proj.weight",),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), ("merger.mlp.2.weight", "merger.mlp.2.bias")),
    "qwen3_5": ("visual.merger.linear_fc2.weight", "visual.merger.linear_fc2.bias"),
    "qwen3_vl": tuple(
        f"{merger}.linear_fc2.{kind}"
        for merger in ("visual.merger", "deepstack_merger_list.0", "deepstack_merger_list.1")
        for kind in ("weight", "bias")
    ),
}
for _name in ("internvl", "llava", "llava_next"):
    _FOLLOWERS[_name] += ("linear_1.bias", "linear_2.bias")


@dataclass
class Cut:
    """A wrapper and what pruning made of it."""

    name: str
    source: Path
    result: Pruned

    @cached_property
    def logits(self) -> Tensor:
        """The pruned model's, of the family's image and text."""
        return image_logits(opened_wrapper(self.result.path), image_inputs(self.name))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Cut]]:
    root = tmp_path_factory.mktemp("wrappers")
    ids = windows(4, 12)
    done = {}
    for name in WRAPPER_CONFIGS:
        source = tiny_wrapper(root, name)
        for kind, request in KINDS.items():
            done[name, kind] = Cut(name, source, prune(source, root / f"{name}-{kind}", calibration=ids, **request))
    yield done


def test_every_row_is_here() -> None:
    assert {name for row in WRAPPERS for name in row.model_types} == set(WRAPPER_CONFIGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRAPPER_CONFIGS)
def test_image_and_text_give_the_logits_of_the_silenced_whole(
    cuts: dict[tuple[str, str], Cut], name: str, kind: str
) -> None:
    cut = cuts[name, kind]
    expected = image_logits(silenced_wrapper(opened_wrapper(cut.source), cut.result.plan), image_inputs(name))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(cut.logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def silenced_wrapper(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The whole image-text model, with what the plan drops silenced."""
    silent = sorted(set(range(plan.before.hidden)) - set(plan.keep_hidden.tolist()))
    decoder: nn.Module = model.get_decoder()

    def silence_images(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        def silence(states: Tensor) -> Tensor:
            return states.index_fill(-1, torch.tensor(silent, dtype=torch.int64), 0.0)

        features = kwargs.get("deepstack_visual_embeds")
        changes: dict[str, Any] = {"inputs_embeds": silence(kwargs["inputs_embeds"])}
        if features is not None:
            changes["deepstack_visual_embeds"] = [silence(states) for states in features]
        return args, kwargs | changes

    decoder.register_forward_pre_hook(silence_images, with_kwargs=True)
    if plan.keep_projector is not None:
        inner = torch.tensor(sorted(set(range(plan.before.hidden)) - set(plan.keep_projector.tolist())))
        projector: Any = model.get_submodule("model.multi_modal_projector")
        projector.linear_2.register_forward_pre_hook(lambda _, args: (args[0].index_fill(-1, inner, 0.0),))
    silenced(Tower(model), plan)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRAPPER_CONFIGS)
def test_the_vision_tower_is_copied(cuts: dict[tuple[str, str], Cut], name: str, kind: str) -> None:
    cut = cuts[name, kind]
    before, after = (load_file(path / "model.safetensors") for path in (cut.source, cut.result.path))
    around = Checkpoint(cut.source).image_text
    assert around is not None
    changed = {name for name in around.outside if not _same_bytes(before[name], after[name])}
    followers = {n for n in around.outside if n.endswith(_FOLLOWERS[name])} if kind == "width" else set()
    assert changed == followers
    assert len(after) - len(before) <= 0  # no tensor is new


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and bool((first == second).all())


def test_a_fresh_process_opens_each_by_its_own_class(cuts: dict[tuple[str, str], Cut], tmp_path: Path) -> None:
    """Without secateur, from config.json alone, and with the logits that this process computes."""
    rows = {}
    for (name, kind), cut in cuts.items():
        inputs = {**image_inputs(name), "logits": cut.logits}
        torch.save(inputs, tmp_path / f"{name}-{kind}.pt")
        rows[f"{name}-{kind}"] = str(cut.result.path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code = """
import json, sys, torch, transformers
folder = sys.argv[1]
for name, path in json.load(open(f"{folder}/rows.json")).items():
    inputs = torch.load(f"{folder}/{name}.pt", weights_only=True)
    logits = inputs.pop("logits")
    (architecture,) = json.load(open(f"{path}/config.json"))["architectures"]
    model = getattr(transformers, architecture).from_pretrained(path).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, logits), name
assert not any(name.startswith("secateur") for name in sys.modules)
print("equal")
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


def test_layers_with_deepstack_features_stay(cuts: dict[tuple[str, str], Cut], tmp_path: Path) -> None:
    """Random scores would remove one of the first two layers in most draws."""
    source = cuts["qwen3_vl", "depth"].source
    for seed in range(4):
        result = prune(source, tmp_path / str(seed), method="random-depth", ratio=0.6, options={"seed": seed})
        assert {0, 1} <= set(result.plan.keep_layers.tolist())


@pytest.mark.parametrize("name", ["gemma3", "llava_next", "qwen2_5_vl"])
def test_a_model_in_memory_is_cut_as_its_directory_is(cuts: dict[tuple[str, str], Cut], name: str) -> None:
    inputs = image_inputs(name)
    for kind in ("width", "sparse"):
        cut = cuts[name, kind]
        for model in (opened_wrapper(cut.source), cut.source):
            pruned = prune(model, calibration=windows(4, 12), **KINDS[kind])
            expected = image_logits(opened_wrapper(cut.result.path), inputs)
            assert torch.equal(image_logits(pruned, inputs), expected)
            for path, mask in pruned.masks.items():
                assert not pruned.get_parameter(path)[~mask].any()
            assert bool(pruned.masks) == (kind == "sparse")
    again = prune(pruned, calibration=windows(4, 12), method="shortgpt", ratio=0.4)  # masks in memory are carried over
    assert again.plan.masks
    assert "the masks of" in again.plan.summary["detail"]


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_text_is_measured_on_the_language_model(cuts: dict[tuple[str, str], Cut], name: str, tmp_path: Path) -> None:
    ids = windows(6, 16)
    np.save(tmp_path / "ids.npy", ids.numpy())
    source = cuts[name, "depth"].source
    (result,) = evaluate([source], data=f"tokens:{tmp_path / 'ids.npy'}", seqlen=16, suite=("cost",))
    with torch.no_grad():
        logits = opened_wrapper(source)(input_ids=ids).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert result.measurements[0].value == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
def test_training_changes_the_language_model_alone(cuts: dict[tuple[str, str], Cut], name: str, tmp_path: Path) -> None:
    store = token_corpus(tmp_path / "store", tokens=2000, vocabulary=61)
    source, recipe = cuts[name, "sparse"].result.path, {"sequence": 16, "tokens_per_step": 64, "peak_rate": 1e-2}
    trained = train(tmp_path / "out", init=source, tokens=640, data=f"shards:{store}", recipe=recipe)
    before, after = (load_file(path / "model.safetensors") for path in (source, trained.path))
    around = Checkpoint(source).image_text
    assert around is not None
    assert before.keys() == after.keys()
    for stored in before:
        assert _same_bytes(before[stored], after[stored]) == (stored in around.outside), stored
    masks = Checkpoint(trained.path).masks
    assert masks
    for text_name, mask in masks.items():
        assert not after[around.names[text_name]][~mask].any()
    image_logits(opened_wrapper(trained.path), image_inputs(name))


def test_inspect_tells_the_tower_from_the_rest(cuts: dict[tuple[str, str], Cut]) -> None:
    source = cuts["smolvlm", "depth"].source
    inspection = inspect(source)
    model = opened_wrapper(source)
    tower = sum(p.numel() for p in model.get_decoder().parameters()) + model.lm_head.weight.numel()
    assert inspection.shape.total == tower
    assert inspection.image_text == {
        "model_type": "smolvlm",
        "parameters": sum(p.numel() for p in model.parameters()) - tower,
    }


def test_a_scratch_model_is_not_made_like_a_wrapper(cuts: dict[tuple[str, str], Cut], tmp_path: Path) -> None:
    store = token_corpus(tmp_path / "store", tokens=2000, vocabulary=61)
    with pytest.raises(UserError, match="image-text model"):
        train(
            tmp_path / "out", init="scratch", like=cuts["gemma3", "depth"].source, tokens=640, data=f"shards:{store}",
            recipe={"sequence": 16, "tokens_per_step": 64},
        )  # fmt: skip


def test_a_learned_method_cuts_the_language_model(cuts: dict[tuple[str, str], Cut], tmp_path: Path) -> None:
    """The layers with features of images stay, and the projector is cut with the hidden size."""
    store = token_corpus(tmp_path / "store", tokens=2000, vocabulary=61)
    options = {"steps": 60, "windows": 4, "phi": 1000.0, "multiplier_rate": 300.0}
    request = {"method": "sheared", "calibration": f"shards:{store}", "options": options, "seqlen": 16}
    deep = prune(cuts["qwen3_vl", "depth"].source, tmp_path / "deep", shape="layers=3", **request)
    assert {0, 1} <= set(deep.plan.keep_layers.tolist())
    image_logits(opened_wrapper(deep.path), image_inputs("qwen3_vl"))
    narrow = prune(cuts["llava", "depth"].source, tmp_path / "narrow", shape="hidden=32", **request)
    assert narrow.plan.keep_projector is not None
    assert len(narrow.plan.keep_projector) == 32
    image_logits(opened_wrapper(narrow.path), image_inputs("llava"))


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of Qwen2-VL as its publisher has it, with the language model's keys at the top."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    rest = {key: value for key, value in text.items() if key not in ("model_type", "dtype", "layer_types")}
    return {**rest, **config}


_WIDE = {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 8}


def _without_default_size(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that leaves out a size, since it is the default of the language model's class."""
    assert config["text_config"].pop("num_attention_heads") == 32
    return config


@pytest.mark.parametrize(
    ("name", "text", "top", "change"),
    [
        ("qwen2_vl", {}, {"tie_word_embeddings": True}, _flat),
        ("qwen2_5_vl", {}, {}, _flat),
        ("smolvlm", _WIDE, {}, _without_default_size),
        ("gemma3", {}, {"tie_word_embeddings": False}, dict),
        ("qwen3_vl", {}, {"tie_word_embeddings": True}, dict),
    ],
)
def test_published_spellings_are_read(
    name: str, text: dict[str, Any], top: dict[str, Any], change: Any, tmp_path: Path
) -> None:
    directory = tiny_wrapper(tmp_path, name, text=text, **top)
    path = directory / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    inputs = image_inputs(name)
    for kind in ("depth", "width"):
        result = prune(directory, tmp_path / kind, calibration=windows(4, 12), **KINDS[kind])
        expected = image_logits(silenced_wrapper(opened_wrapper(directory), result.plan), inputs)
        torch.testing.assert_close(image_logits(opened_wrapper(result.path), inputs), expected, rtol=1e-4, atol=1e-4)
        assert result.shape.total < result.plan.before.total


def test_a_model_in_memory_is_written_sharded_and_in_its_type(tmp_path: Path) -> None:
    directory = tiny_wrapper(tmp_path, "mistral3")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    request = {**KINDS["width"], "calibration": windows(4, 12)}
    from_memory = prune(model, tmp_path / "memory", **request)
    from_shards = prune(tmp_path / "shards", tmp_path / "files", **request)
    inputs = image_inputs("mistral3")
    first, second = (opened_wrapper(result.path) for result in (from_memory, from_shards))
    assert first.dtype == second.dtype == torch.bfloat16
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert torch.equal(image_logits(first, inputs), image_logits(second, inputs))


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_wrapper(tmp_path, "qwen2_vl")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    result = prune(directory, tmp_path / "out", calibration=windows(4, 12), **KINDS["ffn"])
    assert "hold another head" in capsys.readouterr().err
    assert json.loads((result.path / "config.json").read_text())["tie_word_embeddings"] is False
    inputs = image_inputs("qwen2_vl")
    expected = image_logits(silenced_wrapper(opened_wrapper(directory), result.plan), inputs)
    torch.testing.assert_close(image_logits(opened_wrapper(result.path), inputs), expected, rtol=1e-4, atol=1e-4)


def test_prediction_layers_that_no_model_reads_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_wrapper(tmp_path, "qwen3_5")
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.ones(48, 96)}, directory / "model.safetensors", {"format": "pt"})
    result = prune(directory, tmp_path / "out", calibration=windows(4, 12), **KINDS["width"])
    assert "mtp.fc.weight" in capsys.readouterr().err
    assert load_file(result.path / "model.safetensors").keys() == tensors.keys()


def test_a_missing_projector_is_named(tmp_path: Path) -> None:
    directory = tiny_wrapper(tmp_path, "llava")
    tensors = load_file(directory / "model.safetensors")
    rest = {name: value for name, value in tensors.items() if "linear_2" not in name}
    save_file(rest, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor multi_modal_projector\.linear_2\.weight"):
        Checkpoint(directory)


@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "mistral3"])
def test_a_missing_vision_tower_is_named(tmp_path: Path, name: str) -> None:
    """Transformers would fill it with random numbers."""
    directory = tiny_wrapper(tmp_path, name)
    tensors = load_file(directory / "model.safetensors")
    rest = {key: value for key, value in tensors.items() if "vision" not in key}
    save_file(rest, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the vision tower of a {name} model; restore its weights"):
        Checkpoint(directory)
