from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from helpers import VARIANTS, edit_config, files, hf, logits, model_tensors, tiny_llama, windows
from secateur.calibration.block_walk import BlockWalk
from secateur.errors import UserError
from secateur.files import resumable_directory
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.checkpoint_writing import write_checkpoint
from secateur.model.weight_files import INDEX


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def first_shard(directory: Path) -> Path:
    return next(iter(sorted(directory.glob("model-*.safetensors"))))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_header(directory: Path, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Rewrite what the weight file says of its tensors, and leave their bytes as they are."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overwrite(directory: Path, start: int, data: bytes) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(start)
        file.write(data)


def store_as(directory: Path, dtype: torch.dtype) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))


def point_beyond(header: dict[str, dict[str, object]]) -> None:
    last = max(header, key=lambda name: header[name].get("data_offsets", [0, 0])[1])  # type: ignore[index]
    size, (start, stop) = header[last]["shape"], header[last]["data_offsets"]  # type: ignore[misc]
    header[last].update(shape=[2 * size[0], *size[1:]], data_offsets=[start, 2 * stop - start])  # type: ignore[index]


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
BAD: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "no directory": ("plain", shutil.rmtree, ["no such directory"]),
    "no config": ("plain", lambda d: (d / "config.json").unlink(), ["config.json", "no such file"]),
    "config not JSON": ("plain", lambda d: (d / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config a list": ("plain", lambda d: (d / "config.json").write_text("[]"), ["config.json", "model_type"]),
    "config null": ("plain", lambda d: edit_config(d, drop=("model_type",)), ["config.json", "model_type"]),
    "unknown family": ("plain", lambda d: edit_config(d, model_type="gpt2"), ["'gpt2'", "known: llama"]),
    "family a list": ("plain", lambda d: edit_config(d, model_type=["llama"]), ["model_type", "known: llama"]),
    "hidden no multiple of heads": ("plain", lambda d: edit_config(d, num_attention_heads=5), ["config.json"]),
    "pickles only": ("plain", only_pickles, ["model.safetensors", ".bin", "unpickles nothing"]),
    "no weights": ("plain", lambda d: (d / "model.safetensors").unlink(), ["holds no model.safetensors"]),
    "truncated": ("plain", lambda d: truncate(d / "model.safetensors"), ["model.safetensors", "truncated"]),
    "empty": ("plain", lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors", "truncated"]),
    "pointer": ("plain", lambda d: (d / "model.safetensors").write_bytes(LFS_POINTER), ["git lfs pull"]),
    "shard pointer": ("sharded", lambda d: first_shard(d).write_bytes(LFS_POINTER), ["model-00001", "git lfs pull"]),
    "index outside": ("sharded", lambda d: edit_index(d, lambda m: m.update({Q: "../x"})), ["'../x'", INDEX]),
    "index absolute": ("sharded", lambda d: edit_index(d, lambda m: m.update({Q: "/x"})), ["'/x'", INDEX]),
    "index dots": ("sharded", lambda d: edit_index(d, lambda m: m.update({Q: ".."})), ["'..'", INDEX]),
    "index a number": ("sharded", lambda d: edit_index(d, lambda m: m.update({Q: 3})), ["3", INDEX]),  # type: ignore[dict-item]
    "index a list": ("sharded", lambda d: edit_index(d, lambda m: m.update({Q: ["a"]})), [INDEX]),  # type: ignore[dict-item]
    "index empty": ("sharded", lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index not a mapping": ("sharded", lambda d: (d / INDEX).write_text("[]"), [INDEX, "weight_map"]),
    "shard missing": ("sharded", lambda d: first_shard(d).unlink(), ["model-00001", "missing"]),
    "shard truncated": ("sharded", lambda d: truncate(first_shard(d)), ["model-00001", "truncated"]),
    "tensor missing": ("plain", lambda d: edit_tensors(d, lambda t: t.pop(NORM)), [NORM, "lacks"]),
    "tensor size": (
        "plain",
        lambda d: edit_tensors(d, lambda t: t.update({Q: t[Q][:-1]})),
        [Q, "(31, 32)", "(32, 32)"],
    ),
    "type unknown": ("plain", lambda d: store_as(d, torch.float8_e4m3fn), [Q, "F8_E4M3", "convert", "bfloat16"]),
    "type of whole numbers": ("plain", lambda d: store_as(d, torch.int8), [Q, "int8", "convert", "bfloat16"]),
    "type misspelt": ("plain", lambda d: edit_header(d, lambda h: h[Q].update(dtype="F31")), ["model.safetensors"]),
    "offsets beyond": ("plain", lambda d: edit_header(d, point_beyond), ["model.safetensors", "cannot be read"]),
    "offsets negative": (
        "plain",
        lambda d: edit_header(d, lambda h: h[Q].update(data_offsets=[-4, 0])),
        ["model.safetensors", "cannot be read"],
    ),
    "offsets of another size": (
        "plain",
        lambda d: edit_header(d, lambda h: h[Q].update(shape=[16, 16])),
        ["model.safetensors", "cannot be read"],
    ),
    "header longer than the file": (
        "plain",
        lambda d: overwrite(d, 0, b"\xff" * 8),
        ["model.safetensors", "cannot be"],
    ),
    "header not JSON": ("plain", lambda d: overwrite(d, 8, b"!!!"), ["model.safetensors", "cannot be read"]),
    "header not text": ("plain", lambda d: overwrite(d, 20, b"\xff\xfe"), ["model.safetensors", "cannot be read"]),
    "header cut": (
        "plain",
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:40]),
        ["model.safetensors", "cannot be read"],
    ),
    "tied no more": ("tied", lambda d: edit_config(d, tie_word_embeddings=False), ["lm_head.weight", "lacks"]),
    "more layers": ("plain", lambda d: edit_config(d, num_hidden_layers=6), ["model.layers.5."]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_one_line(case: str, tmp_path: Path) -> None:
    variant, damage, parts = BAD[case]
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    damage(directory)
    with pytest.raises(UserError) as caught:
        Checkpoint(directory)
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_those_of_the_model(variant: str, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    checkpoint = Checkpoint(directory)
    model = checkpoint.load()
    reference = dict(hf(directory).named_parameters())
    assert set(checkpoint.tensors()) == set(reference)
    for name, parameter in reference.items():
        assert torch.equal(checkpoint.tensor(name).float(), parameter), name
        assert torch.equal(dict(model.named_parameters())[name], parameter), name
    assert torch.equal(checkpoint.tensor("lm_head.weight").float(), hf(directory).lm_head.weight)
    assert checkpoint.dtype == VARIANTS[variant].get("dtype", torch.float32)
    assert not model.training


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS[variant])
    model, out = hf(directory), tmp_path / "out"
    config = {**Checkpoint(directory).raw_config, "dtype": "float32", "auto_map": {"AutoConfig": "evil.py"}}
    with resumable_directory(out, {}, resume=False) as (fresh, _):
        write_checkpoint(
            fresh, config, model_tensors(model), provenance={"kind": "copy"}, card="# card\n", shard_bytes=5000
        )
    assert not out.with_name("out.partial").exists()
    index = json.loads((out / INDEX).read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 5 and set(index["weight_map"].values()) == {p.name for p in shards}
    largest = max(p.numel() for p in model.parameters()) * 4
    for path in shards:
        held = load_file(path)
        assert sum(t.nbytes for t in held.values()) <= max(5000, largest)
        assert {index["weight_map"][name] for name in held} == {path.name}
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(hf(out), windows()), logits(model, windows()))
    again = Checkpoint(out)
    assert again.provenance is not None and again.provenance["kind"] == "copy"
    assert "auto_map" not in again.raw_config
    assert Checkpoint(directory).provenance is None


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    model = hf(tiny_llama(tmp_path))
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", model.config.to_dict(), model_tensors(model), provenance={}, card="x")
    assert set(files(tmp_path / "out")) == {"config.json", "model.safetensors", INDEX, "secateur.json", "README.md"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    out = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError), resumable_directory(out, {}, resume=False) as (fresh, _):
        write_checkpoint(fresh, {"model_type": "llama"}, model_tensors(hf(directory)), provenance={}, card="x")
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == [directory.name]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(UserError, match="not empty"), resumable_directory(tmp_path / "full", {}, resume=False):
        pass
    assert (tmp_path / "full" / "mine").read_text() == "precious"


def test_what_is_no_directory_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with (
            pytest.raises(UserError, match=f"{name}: is a {name}; name a new directory"),
            resumable_directory(tmp_path / name, {}, resume=False),
        ):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("name", [Q, NORM, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(name: str, value: float, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    walk = BlockWalk(Checkpoint(directory), windows())
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity") as caught:
        states = walk.start()
        for block in walk.blocks():
            states = block.run(states)
        walk.loss(states)
    assert "\n" not in str(caught.value)


def test_overflow_is_found_at_the_block(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    edit_tensors(directory, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    walk = BlockWalk(Checkpoint(directory), windows())
    with pytest.raises(UserError, match="block 1 has NaN or infinity in its output"):
        states = walk.start()
        for block in walk.blocks():
            states = block.run(states)


def test_digest_follows_weights_and_config(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, shard="20KB")
    before = Checkpoint(directory).digest
    shutil.copytree(directory, tmp_path / "copy")
    assert Checkpoint(tmp_path / "copy").digest == before
    edit_config(tmp_path / "copy", rope_theta=123.0)
    assert Checkpoint(tmp_path / "copy").digest != before
    last = max(directory.glob("*.safetensors"))
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, last, {"format": "pt"})
    assert Checkpoint(directory).digest != before


def test_skeleton_holds_no_weights(tmp_path: Path) -> None:
    model = skeleton(Checkpoint(tiny_llama(tmp_path)).config, tmp_path)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"cpu"}


def test_more_layers_than_the_config_names(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(UserError, match="holds more layers than the"):
        Checkpoint(folder)


def test_the_index_names_the_weights_alone(tmp_path: Path) -> None:
    """vLLM and SGLang read every .safetensors file that the index names, and all of a directory without an index."""
    out = secateur.prune(tiny_llama(tmp_path), tmp_path / "out", method="magnitude", ratio=0.5).path
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert {path.name for path in out.glob("*.safetensors")} == {"model.safetensors", "plan.safetensors"}
    assert set(weight_map.values()) == {"model.safetensors"}
    assert set(weight_map) == set(load_file(out / "model.safetensors"))
