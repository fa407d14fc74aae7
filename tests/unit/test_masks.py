"""Masks through everything that is done to a sparse checkpoint, and zeros that no mask protects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import secateur
from helpers import hf, learned, tiny_family, tiny_llama, token_corpus, windows
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import JSON_FILE, TENSOR_FILE, load_masks
from secateur.model.zeros import linear_names
from secateur.pruning.pipeline import write_pruned
from secateur.pruning.target import Target

IDS = windows()
WIDTH = ("llm-pruner", "minitron-width", "wanda-sp", "flap", "random-width")
DEPTH = ("shortgpt", "minitron-depth", "shortened-llama", "shortened-llama-ppl", "random-depth")
SPARSE = ("magnitude", "wanda", "ria", "sparsegpt", "alps", "random-weight")
RECIPE = {"sequence": 16, "tokens_per_step": 256, "peak_rate": 1e-2}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with half of its weights masked, and no other zero."""
    folder = tmp_path_factory.mktemp("sparse")
    dense = tiny_llama(folder)
    return Path(secateur.prune(dense, folder / "out", method="wanda", ratio=0.5, calibration=IDS).path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_corpus(tmp_path_factory.mktemp("corpus"), tokens=4000, vocabulary=61)


def again(model: Any, out: Path | None, method: str, **fields: Any) -> Any:
    fields = {"ratio": 0.4, **fields} if "pattern" not in fields else fields
    return secateur.prune(model, out, method=method, calibration=IDS, batch=2, **fields)


def parameters(directory: Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in hf(directory).named_parameters()}


def foreign(source: Path, out: Path) -> Path:
    """The checkpoint as another tool leaves it: the zeros without the masks."""
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, out / name)
    return out


def train(out: Path, init: Path, corpus: Path, **fields: Any) -> Path:
    fields = {"tokens": 512, "recipe": RECIPE, "points": 1, "heldout_windows": 4, **fields}
    return secateur.train(out, init=init, data=f"shards:{corpus}", **fields).path


def share_of_zeros(directory: Path) -> float:
    weights = parameters(directory)
    linears = [weights[name] for name in linear_names(Checkpoint(directory).shape)]
    return sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)


@pytest.mark.parametrize("method", [*DEPTH, *WIDTH])
def test_a_cut_slices_the_masks_as_it_does_the_weights(method: str, sparse: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = again(sparse, out, method)
    weights, masks = parameters(out), load_masks(out)
    assert set(masks) == set(linear_names(result.shape))
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name
        assert torch.equal(result.plan.masks[name], mask), name
    removed = again(Path(shutil.copytree(sparse, tmp_path / "twin")), tmp_path / "other", method).removed
    assert result.removed == removed and "block_weights" not in removed  # the cut alone is counted
    content = json.loads((out / JSON_FILE).read_text())
    assert "masks of" in content["summary"]["detail"] and "masks" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["phi3", "gemma3", "qwen2-mixed", "olmo2"])
def test_masks_of_every_family(family: str, tmp_path: Path) -> None:
    again(tiny_family(tmp_path, family), tmp_path / "a", "magnitude", pattern="2:4")
    again(tmp_path / "a", tmp_path / "b", "minitron-width", ratio=0.3)
    again(tmp_path / "b", tmp_path / "c", "shortgpt", ratio=0.4)
    weights, masks = parameters(tmp_path / "c"), load_masks(tmp_path / "c")
    assert set(masks) == set(linear_names(Checkpoint(tmp_path / "c").shape))
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


def test_layers_of_different_widths_are_padded_without_a_mask(sparse: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = again(sparse, out, "flap", allocation="global", axes="ffn", ratio=0.2).plan
    name, weights = "model.layers.{}.mlp.up_proj.weight", parameters(out)
    counts = {layer: len(kept) for layer, kept in plan.keep_ffn.items()}
    assert len(set(counts.values())) > 1
    for layer, count in counts.items():
        mask = load_masks(out)[name.format(layer)]
        assert mask[count:].all() and torch.equal(mask[:count], weights[name.format(layer)][:count] != 0)


def test_gates_are_learned_under_the_masks(sparse: Path, tmp_path: Path) -> None:
    plan, dense = learned(Checkpoint(sparse), "sheared", Target(sizes={"layers": 4, "ffn": 32}), IDS, tmp_path)
    (tmp_path / "out").mkdir()
    write_pruned(dense, plan, tmp_path / "out")
    weights, masks = parameters(tmp_path / "out"), load_masks(tmp_path / "out")
    assert len(masks) == 4 * 7 and all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("amount", [{"ratio": 0.7}, {"ratio": 0.3}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", SPARSE)
def test_weights_pruned_again(method: str, amount: dict[str, Any], sparse: Path, tmp_path: Path) -> None:
    """What was pruned stays so and counts towards the ratio; weights between a pattern's zeros go on being pruned."""
    out = tmp_path / "out"
    result = again(sparse, out, method, **amount)
    weights, before, after = parameters(out), load_masks(sparse), load_masks(out)
    for name, mask in after.items():
        assert torch.equal(weights[name] != 0, mask), name
        assert not (mask & ~before[name]).any(), name
        if "pattern" in amount:
            assert bool((mask.reshape(-1, 4).sum(1) <= 2).all()), name
        elif amount["ratio"] < 0.5:
            assert torch.equal(mask, before[name]), name
        else:
            assert 0.65 < 1 - float(mask.float().mean()) <= 0.7, name
    dropped = sum(int((~mask).sum()) for mask in after.values())
    assert result.plan.zeroed == dropped
    assert "by the masks of the checkpoint" in result.plan.summary["detail"]


def test_the_order_of_two_prunings_in_memory(sparse: Path) -> None:
    """A live model carries the masks of the pruning that made it, or of the directory that it was read from."""
    once = again(hf(sparse), None, "shortgpt")
    twice = again(once, None, "minitron-width", ratio=0.3)
    for model in (once, twice):
        weights = dict(model.named_parameters())
        assert set(model.masks) == set(linear_names(model.plan.after))
        assert all(torch.equal(weights[name] != 0, mask) for name, mask in model.masks.items())


def test_a_live_model_that_has_changed_leaves_its_directory_s_masks(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: PreTrainedModel = hf(sparse)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert again(model, None, "shortgpt").masks == {}
    assert "do not apply: the model in memory has changed" in capsys.readouterr().err


def test_training_and_measuring_see_the_masks_that_were_carried(sparse: Path, corpus: Path, tmp_path: Path) -> None:
    again(sparse, tmp_path / "cut", "shortgpt")
    out = train(tmp_path / "trained", tmp_path / "cut", corpus)
    weights, masks = parameters(out), load_masks(out)
    assert len(masks) == 3 * 7 and not any(weights[name][~mask].any() for name, mask in masks.items())
    again(out, tmp_path / "narrow", "random-width", axes="ffn", ratio=0.2)
    assert share_of_zeros(tmp_path / "narrow") == pytest.approx(0.5, abs=0.05)
    (results,) = secateur.evaluate(tmp_path / "narrow", suite=("cost",))
    assert '"pattern": "unstructured"' in json.dumps(results.record())


def test_masks_of_another_model_are_refused(sparse: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path, intermediate_size=32)
    for name in (JSON_FILE, TENSOR_FILE):
        shutil.copyfile(sparse / name, other / name)
    with pytest.raises(
        UserError, match=r"mask of .*down_proj.* of size \(32, 48\), but the model's tensor is \(32, 32\)"
    ):
        again(other, tmp_path / "out", "shortgpt")
    (other / TENSOR_FILE).unlink()
    with pytest.raises(UserError, match="remove both to go on without masks"):
        again(other, tmp_path / "out", "shortgpt")


# --- zeros without masks


def test_padding_is_no_sparsity(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again(tiny_llama(tmp_path), tmp_path / "a", "flap", allocation="global", axes="ffn", ratio=0.3)
    assert share_of_zeros(tmp_path / "a") > 0.01
    share = share_of_zeros(train(tmp_path / "b", tmp_path / "a", corpus))
    again(tmp_path / "a", tmp_path / "c", "shortgpt")
    assert share == pytest.approx(share_of_zeros(tmp_path / "a")), "it stays zero by itself"
    assert "no mask" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["shortgpt", "minitron-width", "sparsegpt"])
def test_pruning_says_that_it_does_not_protect_zeros(
    method: str, sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(foreign(sparse, tmp_path / "foreign"), tmp_path / "out", method, ratio=0.3)
    notices = [line for line in capsys.readouterr().err.splitlines() if "no mask protects them" in line]
    assert len(notices) == 1 and "keep-zeros" in notices[0]
    again(foreign(sparse, tmp_path / "again"), None, method, ratio=0.3)
    assert "no mask protects them" in capsys.readouterr().err
    again(sparse, tmp_path / "known", method, ratio=0.3)
    assert "no mask" not in capsys.readouterr().err


def test_training_says_that_it_fills_zeros(
    sparse: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path / "filled", foreign(sparse, tmp_path / "foreign"), corpus)
    assert share_of_zeros(out) < 0.01
    notices = [line for line in capsys.readouterr().err.splitlines() if "no mask protects them" in line]
    assert (
        len(notices) == 1
        and "50.0% of the block linears' weights are zero" in notices[0]
        and "`keep_zeros`" in notices[0]
    )
    train(tmp_path / "held", sparse, corpus)
    assert "no mask" not in capsys.readouterr().err


def test_zeros_that_are_kept(sparse: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks are made once, hold in training, lie beside the result, and give what the true masks give."""
    out = train(tmp_path / "out", foreign(sparse, tmp_path / "foreign"), corpus, keep_zeros=True)
    assert "no mask" not in capsys.readouterr().err
    truth = train(tmp_path / "truth", sparse, corpus)
    assert (out / "model.safetensors").read_bytes() == (truth / "model.safetensors").read_bytes()
    masks = load_masks(out)
    assert masks.keys() == load_masks(sparse).keys()
    assert all(torch.equal(masks[name], mask) for name, mask in load_masks(sparse).items())
    assert share_of_zeros(train(tmp_path / "later", out, corpus)) == pytest.approx(0.5, abs=1e-3)


def test_zeros_beside_masks_are_kept_as_well(sparse: Path, corpus: Path, tmp_path: Path) -> None:
    more = Path(shutil.copytree(sparse, tmp_path / "more"))
    tensors = load_file(more / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][:4] = 0
    save_file(tensors, more / "model.safetensors", {"format": "pt"})
    out = train(tmp_path / "out", more, corpus, keep_zeros=True)
    assert not parameters(out)[name][:4].any() and not load_masks(out)[name][:4].any()
    assert parameters(train(tmp_path / "free", more, corpus))[name][:4].any()


def test_weights_that_masks_drop_and_that_are_not_zero(
    sparse: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = Path(shutil.copytree(sparse, tmp_path / "filled"))
    tensors = load_file(filled / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1.0
    save_file(tensors, filled / "model.safetensors", {"format": "pt"})
    message = "weights that its masks drop are not zero, and are set to zero"
    train(tmp_path / "out", filled, corpus)
    assert message in capsys.readouterr().err
    for method in ("shortgpt", "minitron-width", "magnitude"):  # not the weights that the second pruning drops
        again(filled, tmp_path / method, method)
        assert capsys.readouterr().err.count(message) == 1
        again(sparse, tmp_path / f"{method}-2", method)
        assert message not in capsys.readouterr().err


def test_zeros_that_cannot_be_kept(corpus: Path, tmp_path: Path) -> None:
    dense = tiny_llama(tmp_path)
    with pytest.raises(UserError, match=r"`keep_zeros`: no weight of .* is zero; leave it out"):
        train(tmp_path / "out", dense, corpus, keep_zeros=True)
    with pytest.raises(UserError, match="`keep_zeros`: fresh weights have no zeros"):
        secateur.train(
            tmp_path / "out", init="scratch", like=dense, tokens=512, data=f"shards:{corpus}", keep_zeros=True
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
