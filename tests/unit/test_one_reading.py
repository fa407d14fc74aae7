"""One checkpoint, one reading: every verb opens odd checkpoints as plain transformers opens them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import secateur
from helpers import edit_config, hf, logits, tiny_family, tiny_llama, windows
from secateur.calibration.block_walk import BlockWalk
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.config_file import read_shape
from secateur.model.live import LiveCheckpoint
from secateur.model.weight_files import INDEX, SINGLE
from secateur.training.init import stored_weights

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Tensors = dict[str, Tensor]


def edit_tensors(directory: Path, edit: Callable[[Tensors], Tensors], file: str = SINGLE) -> None:
    save_file(edit(load_file(directory / file)), directory / file, {"format": "pt"})


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((directory / INDEX).read_text())
    edit(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


def tied_by_config(folder: Path) -> Path:
    directory = tiny_llama(folder)
    edit_config(directory, tie_word_embeddings=True)
    return directory


def tied_by_default(folder: Path) -> Path:
    """Gemma's config ties where the file does not name the key."""
    directory = tiny_family(folder, "gemma3-untied")
    edit_config(directory, drop=("tie_word_embeddings",))
    return directory


def tied_in_another_type(folder: Path) -> Path:
    """A head that is the embedding rounded to another type is another head."""
    directory = tiny_llama(folder, tie_word_embeddings=True)
    edit_tensors(directory, lambda t: {**t, HEAD: t[EMBEDDING].half()})
    return directory


def equal_head(folder: Path) -> Path:
    directory = tiny_llama(folder, tie_word_embeddings=True, dtype=torch.float16)
    edit_tensors(directory, lambda t: {**t, HEAD: t[EMBEDDING].float()})
    return directory


def head_alone(folder: Path) -> Path:
    directory = tiny_llama(folder, tie_word_embeddings=True)
    edit_tensors(directory, lambda t: {HEAD if name == EMBEDDING else name: tensor for name, tensor in t.items()})
    return directory


def head_alone_without_prefix(folder: Path) -> Path:
    directory = head_alone(folder)
    edit_tensors(directory, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    return directory


def stale_index(folder: Path) -> Path:
    directory = tiny_llama(folder, seed=5, shard="20KB")
    (folder / "saved").mkdir()
    shutil.copy(tiny_llama(folder / "saved", seed=6) / SINGLE, directory)
    return directory


def short_index(folder: Path) -> Path:
    directory = tiny_llama(folder, shard="20KB")
    edit_index(directory, lambda places: places.pop(NORM))
    return directory


def wrong_index(folder: Path) -> Path:
    """Names another shard for a tensor, and a tensor that no shard has."""
    directory = tiny_llama(folder, shard="20KB")
    edit_index(
        directory, lambda places: places.update({NORM: places[EMBEDDING], "model.rotary_emb.inv_freq": places[NORM]})
    )
    return directory


def tensor_in_two_shards(folder: Path) -> Path:
    directory = tiny_llama(folder, shard="20KB")
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    norm = load_file(directory / places[NORM])[NORM]
    other = next(file for file in sorted(set(places.values())) if file != places[NORM])
    edit_tensors(directory, lambda t: {**t, NORM: 2 * norm}, other)
    return directory


def base_model(folder: Path) -> Path:
    directory = tiny_llama(folder, tie_word_embeddings=True)
    edit_tensors(directory, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    return directory


def base_model_in_shards(folder: Path) -> Path:
    directory = tiny_llama(folder, tie_word_embeddings=True, shard="20KB")
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    for file in set(places.values()):
        edit_tensors(directory, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()}, file)
    edit_index(directory, lambda p: (p.clear(), p.update({n.removeprefix("model."): f for n, f in places.items()})))
    return directory


def wrapped(folder: Path) -> Path:
    """As the module of a trainer saves it: one prefix more."""
    directory = tiny_llama(folder)
    edit_tensors(directory, lambda t: {f"model.{name}": tensor for name, tensor in t.items()})
    return directory


def both_names(folder: Path) -> Path:
    directory = tiny_llama(folder)
    edit_tensors(directory, lambda t: {**t, "embed_tokens.weight": 2 * t[EMBEDDING], "norm.weight": 2 * t[NORM]})
    return directory


ODD = [
    *(tied_by_config, tied_by_default, tied_in_another_type, equal_head, head_alone, head_alone_without_prefix),
    *(stale_index, short_index, wrong_index, tensor_in_two_shards),
    *(base_model, base_model_in_shards, wrapped, both_names),
]


def notices(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is printed about a config.json; transformers prints bars beside it."""
    return [line for line in capsys.readouterr().err.splitlines() if "config.json: " in line]


def same_logits(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    assert torch.equal(logits(model, windows()), logits(reference, windows()))


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_every_reader_agrees_with_transformers(make: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = make(tmp_path)
    reference = hf(directory)
    checkpoint = Checkpoint(directory)
    same_logits(checkpoint.load(), reference)
    assert checkpoint.shape == read_shape(directory / "config.json")[0]
    assert checkpoint.shape.total == sum(parameter.numel() for parameter in reference.parameters())
    start = skeleton(checkpoint.config, directory)  # the first step of training
    weights = {name: stored_weights(checkpoint)(name).float() for name, _ in start.named_parameters()}
    start.load_state_dict(weights, strict=False, assign=True)
    start.tie_weights()
    same_logits(start, reference)
    walk = BlockWalk(checkpoint, windows())  # what methods are scored on
    states = walk.start()
    for block in walk.blocks():
        states = block.run(states)
    scores = logits(reference, windows()).double().log_softmax(-1)[:, :-1]
    loss = -scores.gather(2, windows()[:, 1:, None]).mean()
    assert walk.loss(states) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_pruning_cuts_what_transformers_reads(make: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = make(tmp_path)
    options: dict[str, Any] = {"method": "minitron-width", "ratio": 0.3, "axes": ["ffn"], "calibration": windows()}
    secateur.prune(directory, tmp_path / "out", **options)
    in_memory: Any = secateur.prune(hf(directory), **options)
    out = hf(tmp_path / "out")
    same_logits(in_memory.float(), out)
    assert (out.lm_head.weight is out.model.embed_tokens.weight) == Checkpoint(directory).shape.tied  # type: ignore[union-attr]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
        == out.config.tie_word_embeddings
    )
    assert torch.equal(out.get_input_embeddings().weight, hf(directory).get_input_embeddings().weight)
    assert torch.equal(out.lm_head.weight, hf(directory).lm_head.weight)  # type: ignore[union-attr]


def test_another_head_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tied_by_config(tmp_path)
    assert not Checkpoint(directory).shape.tied
    Checkpoint(directory)
    lines = notices(capsys)
    assert len(lines) == 1 and "config.json: says that the head is the embedding" in lines[0]
    assert "read as untied" in lines[0]


def test_shapes_need_no_weights(tmp_path: Path) -> None:
    directory = tied_by_config(tmp_path)
    weights = (directory / SINGLE).read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"", weights[:100]):
        (directory / SINGLE).write_bytes(content)
        assert read_shape(directory / "config.json")[0].tied
    shutil.copy(directory / "config.json", directory / "target.json")
    (directory / SINGLE).write_bytes(weights)
    assert not read_shape(directory / "config.json")[0].tied
    assert read_shape(directory / "target.json")[0].tied, "another file is not that of the weights"


def test_a_live_model_with_another_head(tmp_path: Path) -> None:
    model = hf(tied_by_config(tmp_path))
    assert model.config.tie_word_embeddings and not LiveCheckpoint(model).shape.tied
    assert model.config.tie_word_embeddings, "the model is left as it is"
    tied = hf(tiny_llama(tmp_path, seed=1, tie_word_embeddings=True))
    assert LiveCheckpoint(tied).shape.tied


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: {**t, HEAD: t[EMBEDDING][:-1].clone()}, "lm_head.weight has size (60, 32)"),
        (lambda t: {n: x for n, x in t.items() if n != EMBEDDING}, "lacks the tensor model.embed_tokens.weight"),
        (
            lambda t: {n.replace("q_proj", "q_proj.base_layer"): x for n, x in t.items()},
            "an adapter around it; merge it",
        ),
        (lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}, "holds _orig_mod.model.embed_tokens.weight; rename"),
    ],
)
def test_what_transformers_refuses(change: Callable[[Tensors], Tensors], part: str, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, tie_word_embeddings=True)
    edit_tensors(directory, change)
    with pytest.raises(UserError) as error:
        Checkpoint(directory)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_an_untied_model_without_a_head_names_the_key(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, tie_word_embeddings=True)
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks the tensor lm_head.weight; .* set tie_word_embeddings to true"):
        Checkpoint(directory)


def test_an_index_without_metadata(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, shard="20KB")
    content = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_text(json.dumps({"weight_map": content["weight_map"]}))
    with pytest.raises(UserError, match="has no metadata, and transformers refuses it"):
        Checkpoint(directory)


LEFTOVERS: dict[str, dict[str, Any]] = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "bitsandbytes of old": {"quantization_config": {"load_in_8bit": True}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    "compression_config": {"compression_config": {"quant_method": "compressed-tensors"}},
    "mlx": {"quantization": {"bits": 4}, "quantization_config": {"bits": 4, "group_size": 64}},
    "empty": {"quantization_config": {}},
    "unknown": {"quantization_config": {"quant_method": "quip#"}},
    "tuple": {"return_dict": False},
    "old tuple": {"use_return_dict": False},
    "torchscript": {"torchscript": True, "return_dict": False},
    "states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "flash": {"attn_implementation": "flash_attention_2"},
    "old flash": {"_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True},
    "type": {"torch_dtype": "auto"},
    "type as torch prints it": {"dtype": "torch.float16"},
    "cache": {"use_cache": False},
}
SILENT = ("cache",)


@pytest.mark.parametrize("case", LEFTOVERS)
def test_leftovers_change_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_llama(tmp_path)
    reference = hf(directory)
    edit_config(directory, **LEFTOVERS[case])
    checkpoint = Checkpoint(directory)
    same_logits(checkpoint.load(), reference)
    lines = notices(capsys)
    assert len(lines) == (0 if case in SILENT else 1), lines
    assert case in SILENT or all(key in lines[0] for key in LEFTOVERS[case] if not key.endswith("autoset"))
    secateur.prune(directory, tmp_path / "out", method="shortgpt", shape={"layers": 4}, calibration=windows())
    (tmp_path / "plain").mkdir()
    plain = tiny_llama(tmp_path / "plain")
    secateur.prune(plain, tmp_path / "reference", method="shortgpt", shape={"layers": 4}, calibration=windows())
    same_logits(hf(tmp_path / "out"), hf(tmp_path / "reference"))
    np.save(tmp_path / "ids.npy", windows().numpy())
    suite = ["cost"] if case in ("tuple", "states", "attentions", "cache") else []
    results = secateur.evaluate([directory, plain], data=f"tokens:{tmp_path / 'ids.npy'}", suite=suite)
    assert results[0].measurements[0].value == results[1].measurements[0].value


def test_a_live_model_that_returns_tuples(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    expected: Any = secateur.prune(model, method="wanda", ratio=0.5, calibration=windows())
    model.config.return_dict, model.config.output_hidden_states = False, True
    pruned: Any = secateur.prune(model, method="wanda", ratio=0.5, calibration=windows())
    same_logits(pruned, expected)
    assert not model.config.return_dict


QUANTIZED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {}
LINEAR = "model.layers.1.mlp.up_proj"


def store(name: str, *tensors: tuple[str, Tensor]) -> None:
    def change(stored: Tensors) -> Tensors:
        rest = {n: x for n, x in stored.items() if n != f"{LINEAR}.weight"}
        return rest | {f"{LINEAR}.{suffix}": tensor.clone() for suffix, tensor in tensors}

    QUANTIZED[name] = change, name


_WORDS = torch.zeros(4, 48, dtype=torch.int32)
store("gptq", ("qweight", _WORDS), ("scales", torch.ones(1, 48)), ("qzeros", _WORDS), ("g_idx", _WORDS[0]))
store("awq", ("qweight", _WORDS), ("scales", torch.ones(1, 48)), ("qzeros", _WORDS))
store("fp8", ("weight", torch.zeros(48, 32).to(torch.float8_e4m3fn)), ("weight_scale_inv", torch.ones(1, 1)))
store("int8", ("weight", torch.zeros(48, 32, dtype=torch.int8)), ("SCB", torch.ones(48)))
store("nf4", ("weight", torch.zeros(768, 1, dtype=torch.uint8)), ("weight.absmax", torch.ones(24)))
store("compressed-tensors", ("weight_packed", _WORDS), ("weight_scale", torch.ones(48, 1)))


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_refused(case: str, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    change, method = QUANTIZED[case]
    edit_tensors(directory, change)
    for settings in ({"quantization_config": {"quant_method": method}}, {}):
        edit_config(directory, drop=("quantization_config",), **settings)
        with pytest.raises(UserError, match="convert the checkpoint to bfloat16, float16 or float32") as error:
            Checkpoint(directory)
        assert "\n" not in str(error.value) and LINEAR in str(error.value)


@pytest.mark.parametrize("value", [float("inf"), [1.0, float("nan")], {"factor": float("-inf")}])
def test_numbers_that_json_cannot_hold(value: object, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    edit_config(directory, note=value)
    with pytest.raises(UserError, match="note holds NaN or Infinity"):
        secateur.prune(directory, tmp_path / "out", method="magnitude", ratio=0.5)


def test_a_padding_token_without_a_row(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    edit_config(directory, pad_token_id=61)
    with pytest.raises(UserError, match=r"pad_token_id is 61, but the embedding has 61 rows.* set it to null"):
        Checkpoint(directory)
    edit_config(directory, pad_token_id=-100)
    with pytest.raises(UserError, match=r"pad_token_id is -100, but"):
        secateur.prune(directory, tmp_path / "out", method="magnitude", ratio=0.5)
    edit_config(directory, pad_token_id=-1)
    same_logits(Checkpoint(directory).load(), hf(directory))


def test_weights_under_a_name_of_config_json(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, shard="20KB")
    (directory / INDEX).rename(directory / "model.ema.safetensors.index.json")
    (tmp_path / "usual").mkdir()
    shutil.copy(tiny_llama(tmp_path / "usual", seed=6) / SINGLE, directory)
    edit_config(directory, transformers_weights="model.ema.safetensors.index.json")
    same_logits(Checkpoint(directory).load(), hf(directory))
    secateur.prune(directory, tmp_path / "out", method="magnitude", ratio=0.5)
    model: Any = secateur.prune(hf(directory), method="magnitude", ratio=0.5)
    same_logits(hf(tmp_path / "out"), model)
    edit_config(directory, transformers_weights="../usual/llama-6/model.safetensors")
    with pytest.raises(UserError, match="no safetensors file in the same directory"):
        Checkpoint(directory)
    edit_config(directory, transformers_weights="absent.safetensors")
    with pytest.raises(UserError, match=r"lacks absent.safetensors, which `transformers_weights`"):
        Checkpoint(directory)


def test_an_adapter_is_not_left_out(tmp_path: Path) -> None:
    """transformers would add it where peft is installed, and pruning would cut a model without it."""
    directory = tiny_llama(tmp_path)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\).*merge_and_unload"):
        Checkpoint(directory)


def test_tensors_without_a_place_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, line = tiny_llama(tmp_path), "model.layers.0.self_attn.q_proj"
    edit_tensors(directory, lambda t: {**t, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    Checkpoint(directory)
    assert "left out" not in capsys.readouterr().err, "what old files store is computed"
    edit_tensors(directory, lambda t: {**t, f"{line}.lora_A.weight": torch.ones(2, 32), f"{line}.bias": torch.ones(32)})
    Checkpoint(directory)
    assert f"has no place for: {line}.bias, {line}.lora_A.weight" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["LlamaModel", "LLaMAForCausalLM", "LlamaForSequenceClassification", None])
def test_an_output_names_its_own_class(architecture: str | None, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    edit_config(directory, architectures=architecture and [architecture])
    secateur.prune(directory, tmp_path / "out", method="magnitude", ratio=0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_live_model_keeps_its_generation_settings(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    model.generation_config.eos_token_id = 5  # type: ignore[union-attr]
    pruned: Any = secateur.prune(model, method="magnitude", ratio=0.5)
    assert pruned.generation_config.eos_token_id == 5


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, lambda model: torch.nn.Linear(2, 2)])
def test_a_wrapped_live_model(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no model of transformers; pass the model inside it"):
        secateur.prune(wrap(hf(tiny_llama(tmp_path))), method="magnitude", ratio=0.5)
