"""``secateur mask``: the masks of a pruned checkpoint, applied to what another tool has made of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from helpers import files, hf, tiny_family, windows
from secateur.cli import main
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import JSON_FILE, TENSOR_FILE, load_masks
from wrapper_models import opened_wrapper, tiny_wrapper

IDS = windows()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    source = tiny_family(folder, "llama")
    (source / "LICENSE").write_text("a licence")
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n")
    (source / "tokenizer.json").write_text("{}")
    return secateur.prune(source, folder / "out", method="magnitude", ratio=0.5).path


@pytest.fixture(scope="module")
def merged(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned checkpoint with noise on every weight, as a merge leaves it: in shards, and without a tokenizer."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    model = hf(pruned)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def parameters(folder: Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in hf(folder).named_parameters()}


def test_pruned_weights_are_zero_and_all_others_as_before(pruned: Path, merged: Path, tmp_path: Path) -> None:
    before, masks = parameters(merged), load_masks(pruned)
    merged_files = files(merged)
    result = secateur.mask(merged, pruned, tmp_path / "out")
    assert files(merged) == merged_files
    for name, tensor in parameters(result.path).items():
        assert torch.equal(tensor, before[name] * masks[name] if name in masks else before[name]), name
    dropped = torch.cat([before[name][~mask] for name, mask in masks.items()]).double()
    whole = torch.cat([before[name].flatten() for name in masks]).double()
    assert result.zeroed == result.masked == dropped.numel() == whole.numel() // 2
    assert math.isclose(result.norm_share, float(dropped.norm() / whole.norm()), rel_tol=1e-9)


def test_the_output_has_the_plan_the_companions_and_its_origin(pruned: Path, merged: Path, tmp_path: Path) -> None:
    out = secateur.mask(merged, pruned, tmp_path / "out").path
    for name in (JSON_FILE, TENSOR_FILE, "LICENSE", "tokenizer.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes(), name
    provenance = json.loads((out / "secateur.json").read_text())
    assert provenance["kind"] == "masked" and provenance["origin"]["method"] == "magnitude"
    assert provenance["plan"] == json.loads((pruned / JSON_FILE).read_text())["fingerprint"]
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "org/base" in card and "pruned with magnitude" in card
    again = secateur.mask(out, pruned, tmp_path / "again")
    assert again.zeroed == 0 and again.norm_share == 0.0
    assert files(again.path)["model.safetensors"] == files(out)["model.safetensors"]


def test_the_command_names_a_directory_itself_and_prints_counts(
    pruned: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(merged, tmp_path / "model")
    assert main(["mask", str(copy), "--plan", str(pruned)]) == 0
    out, err = capsys.readouterr()
    assert "model-masked: set 40,320 weights to zero (100.0% of the 40,320 that the masks drop" in out
    assert "has no tokenizer; the output gets that of" in err
    assert main(["mask", str(copy), "--plan", str(pruned)]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert main(["mask", str(copy), "--plan", str(pruned), "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["zeroed"] == 40320


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "smolvlm"])
def test_the_language_model_of_an_image_text_model(tmp_path: Path, name: str) -> None:
    """Both the verb and the callback find the masked weights behind the wrapper's names, and touch no others."""
    source = tiny_wrapper(tmp_path, name)
    out = secateur.prune(source, tmp_path / "out", method="magnitude", ratio=0.5).path
    around, masks = Checkpoint(out).image_text, load_masks(out)
    assert around is not None
    model = opened_wrapper(source)
    model.save_pretrained(tmp_path / "filled")
    before = load_file(tmp_path / "filled" / "model.safetensors")
    result = load_file(secateur.mask(tmp_path / "filled", out).path / "model.safetensors")
    names = {around.names[text_name]: mask for text_name, mask in masks.items()}
    assert result.keys() == before.keys() > names.keys()
    for stored, tensor in result.items():
        assert torch.equal(tensor, before[stored] * names[stored] if stored in names else before[stored]), stored
    secateur.KeepMasks(out).on_train_begin(None, None, None, model=model)
    model.save_pretrained(tmp_path / "kept")
    assert all(torch.equal(t, result[n]) for n, t in load_file(tmp_path / "kept" / "model.safetensors").items())


def test_a_stored_type_stays(pruned: Path, merged: Path, tmp_path: Path) -> None:
    hf(merged).bfloat16().save_pretrained(tmp_path / "half")
    out = secateur.mask(tmp_path / "half", pruned).path
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def _family(folder: Path, pruned: Path) -> tuple[Path, Path]:
    return tiny_family(folder, "mistral", head_dim=8, sliding_window=None), pruned


def _size(folder: Path, pruned: Path) -> tuple[Path, Path]:
    return tiny_family(folder, "llama", intermediate_size=72), pruned


def _no_masks(folder: Path, pruned: Path) -> tuple[Path, Path]:
    dense = tiny_family(folder, "llama")
    return dense, secateur.prune(dense, folder / "cut", method="random-depth", shape="layers=3").path


def _no_plan(folder: Path, pruned: Path) -> tuple[Path, Path]:
    return pruned, tiny_family(folder, "llama")


def _adapter(folder: Path, pruned: Path) -> tuple[Path, Path]:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder / "adapter", pruned


def _damage(folder: Path, pruned: Path) -> tuple[Path, Path]:
    copy = shutil.copytree(pruned, folder / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy, pruned


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_family, "the masks are of a llama .* is a mistral"),
        (_size, "FFN 64, .* FFN 72"),
        (_no_masks, "has no masks; only sparse methods"),
        (_no_plan, "has no plan.json; name the directory that"),
        (_adapter, "holds an adapter .* merge it into them"),
        (_damage, "up_proj.weight holds NaN or infinity"),
    ],
)
def test_refusals_write_nothing(pruned: Path, tmp_path: Path, make: Any, message: str) -> None:
    model, plan = make(tmp_path, pruned)
    with pytest.raises(UserError, match=message):
        secateur.mask(model, plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_the_hub_needs_a_name_for_the_output(pruned: Path) -> None:
    with pytest.raises(UserError, match="`out`: name a new directory for the masked org/model"):
        secateur.mask("org/model", pruned)
