from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import VARIANTS, calibration, edit_config, files, hf, logits, tiny_family, tiny_llama, windows
from reference import assert_same_logits, silenced
from secateur.data.tokenizer import token_hash
from secateur.errors import UserError
from secateur.files import sha256_file
from secateur.model.card import Ancestry
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import JSON_FILE, TENSOR_FILE, Plan, load_masks
from secateur.model.surgery import cut_config
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.target import Target

ASKED = {"ratio": 0.5, "of": "non_embedding"}
METHODS = {"minitron-depth": 0.4, "minitron-width": 0.4, "wanda": 0.5}


def prune(directory: Path, out: Path, method: str, ratio: float) -> Plan:
    checkpoint = Checkpoint(directory)
    plan = make_plan(checkpoint, method, Target(ratio=ratio), calibration(windows()), batch=2)
    cut(directory, out, plan)
    return plan


def cut(directory: Path, out: Path, plan: Plan) -> None:
    out.mkdir()
    write_pruned(Checkpoint(directory), plan, out, ancestry=Ancestry(("base/model",)))


def by_hand(directory: Path, **fields: object) -> Plan:
    """A plan that keeps all but what is said."""
    shape = Checkpoint(directory).shape
    record = {"summary": {"detail": "by hand"}, "calibration": calibration(windows()).record()}
    return Plan.keeping_all("hand", "width", ASKED, shape, **record, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_pruned_model_is_the_full_one_with_parts_silenced(method: str, variant: str, tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path, **VARIANTS[variant]), tmp_path / "out"
    plan = prune(directory, out, method, METHODS[method])
    pruned, full = hf(out), hf(directory)
    untouched = logits(full, windows())
    assert_same_logits(pruned, silenced(full, plan))
    assert not torch.allclose(logits(pruned, windows()), untouched, atol=1e-2)
    shape = Checkpoint(out).shape
    assert shape == plan.after
    assert sum(p.numel() for p in pruned.parameters()) == plan.after.total
    stored = Checkpoint(out)
    assert {stored.tensor(n).dtype for n in stored.tensors()} == {VARIANTS[variant].get("dtype", torch.float32)}
    config = json.loads((out / "config.json").read_text())
    assert config["head_dim"] == plan.before.head_dim
    if method == "minitron-depth":
        assert shape.layers == 3 and logits(pruned, windows()).shape == untouched.shape


@pytest.mark.parametrize("variant", ["plain", "biased"])
def test_width_against_explicit_loops(variant: str, tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path, **VARIANTS[variant]), tmp_path / "out"
    plan = prune(directory, out, "minitron-width", 0.4)
    old, new = dict(hf(directory).named_parameters()), dict(hf(out).named_parameters())
    hidden = plan.keep_hidden.tolist()
    assert set(old) == set(new)
    for name, tensor in new.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        ffn = plan.keep_ffn[layer].tolist()
        every = list(range(64))
        writes = hidden if any(k in name for k in ("o_proj", "down_proj", "norm")) else every
        rows = ffn if "gate_proj" in name or "up_proj" in name else writes
        columns = ffn if "down_proj" in name else every if "o_proj" in name else hidden
        for i in range(tensor.shape[0]):
            if tensor.dim() == 1:
                assert tensor[i] == old[name][rows[i]], name
                continue
            assert all(tensor[i, j] == old[name][rows[i], columns[j]] for j in range(0, tensor.shape[1], 5)), name


@pytest.mark.parametrize("variant", ["plain", "biased", "wide_heads"])
def test_kv_heads_go_with_their_query_heads(variant: str, tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path, **VARIANTS[variant]), tmp_path / "out"
    shape = Checkpoint(directory).shape
    plan = by_hand(
        directory,
        after=dataclasses.replace(shape, heads=2, kv_heads=1),
        keep_kv={layer: torch.tensor([layer % 2]) for layer in range(5)},
    )
    dim = shape.head_dim
    assert plan.indices("kv", 1).tolist() == list(range(dim, 2 * dim))  # type: ignore[union-attr]
    assert plan.indices("query", 1).tolist() == list(range(2 * dim, 4 * dim))  # type: ignore[union-attr]
    assert plan.indices("hidden", 1) is None and plan.indices(None, 1) is None
    cut(directory, out, plan)
    assert Checkpoint(out).shape == plan.after
    assert_same_logits(hf(out), silenced(hf(directory), plan))


def test_all_axes_at_once(tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path, **VARIANTS["biased"]), tmp_path / "out"
    shape = Checkpoint(directory).shape
    draw = torch.Generator().manual_seed(5)
    plan = by_hand(
        directory,
        after=dataclasses.replace(shape, layers=3, hidden=20, ffn=17, heads=2, kv_heads=1),
        keep_layers=torch.tensor([0, 2, 4]),
        keep_hidden=torch.randperm(32, generator=draw)[:20].sort().values,
        keep_ffn={layer: torch.randperm(48, generator=draw)[:17].sort().values for layer in range(5)},
        keep_kv={layer: torch.tensor([layer // 2 % 2]) for layer in range(5)},
    )
    cut(directory, out, plan)
    assert_same_logits(hf(out), silenced(hf(directory), plan))
    assert sum(p.numel() for p in hf(out).parameters()) == plan.after.total
    assert {n for n in load_file(out / TENSOR_FILE) if ".ffn." in n} == {f"keep.ffn.{i}" for i in (0, 2, 4)}


def test_pruning_the_pruned(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    prune(directory, tmp_path / "a", "minitron-depth", 0.4)
    first = hf(tmp_path / "a")
    plan = prune(tmp_path / "a", tmp_path / "b", "minitron-width", 0.4)
    assert_same_logits(hf(tmp_path / "b"), silenced(first, plan))
    assert plan.source == Checkpoint(tmp_path / "a").digest


def test_per_layer_keys_follow_the_layers(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    edit_config(directory, layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"])
    plan = by_hand(
        directory,
        after=dataclasses.replace(Checkpoint(directory).shape, layers=2),
        keep_layers=torch.tensor([1, 4]),
    )
    config = cut_config(Checkpoint(directory), plan)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["num_hidden_layers"] == 2
    assert config["rope_parameters"] == Checkpoint(directory).raw_config["rope_parameters"]


@pytest.mark.parametrize("method", METHODS)
def test_what_the_plan_says(method: str, tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path, **VARIANTS["tied"]), tmp_path / "out"
    plan = prune(directory, out, method, METHODS[method])
    content, tensors = json.loads((out / JSON_FILE).read_text()), load_file(out / TENSOR_FILE)
    for name, tensor in tensors.items():
        kind = name.partition(".")[0]
        assert tensor.dtype == {"keep": torch.int64, "mask": torch.bool, "score": torch.float32}[kind], name
        if kind == "keep":
            values = tensor.tolist()
            assert values == sorted(set(values)), name
    kept = plan.keep_layers.tolist()
    wanted = {"keep.layers", "keep.hidden"} | {f"keep.{a}.{i}" for a in ("ffn", "kv") for i in kept}
    wanted |= {f"mask.{n}" for n in plan.masks} | {f"score.{n}" for n in plan.scores}
    assert set(tensors) == wanted
    assert content["method"] == method and content["granularity"] == plan.granularity
    assert content["before"] == {
        "hidden": 32, "ffn": 48, "layers": 5, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocabulary": 61, "tied": True
    }  # fmt: skip
    assert content["tensors"] == sha256_file(out / TENSOR_FILE)
    assert content["source"] == Checkpoint(directory).digest
    assert content["calibration"]["hash"] == token_hash(windows().numpy())
    assert content["calibration"]["tokens"] == 60
    # The ratio reached is counted on the files: parameters that are gone, or zero.
    before, after = hf(directory), hf(out)
    left = sum(int((p != 0).sum()) for p in after.parameters())
    total = sum(p.numel() for p in before.parameters())
    assert content["ratio"]["asked"] == content["asked"]["ratio"] == METHODS[method]
    assert content["ratio"]["total"] == pytest.approx(1 - left / total)
    embedding_before, embedding_after = before.lm_head.weight.numel(), after.lm_head.weight.numel()
    non_embedding = 1 - (left - embedding_after) / (total - embedding_before)
    assert content["ratio"]["non_embedding"] == pytest.approx(non_embedding)
    provenance = Checkpoint(out).provenance
    assert provenance is not None and provenance["plan"] == content["fingerprint"] and provenance["kind"] == "pruned"
    assert method in (out / "README.md").read_text() and "base_model: base/model" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_inputs_give_the_same_bytes(method: str, tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path, **VARIANTS["sharded"])
    (directory / "tokenizer.json").write_text("{}")
    for out in ("a", "b"):
        prune(directory, tmp_path / out, method, METHODS[method])
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a == b
    assert {
        "config.json",
        "model.safetensors",
        JSON_FILE,
        TENSOR_FILE,
        "README.md",
        "secateur.json",
        "tokenizer.json",
    } <= set(a)


def test_masks_come_back_and_tampering_is_found(tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path), tmp_path / "out"
    plan = prune(directory, out, "wanda", 0.5)
    masks = load_masks(out)
    assert set(masks) == set(plan.masks) and all(torch.equal(masks[n], plan.masks[n]) for n in masks)
    parameters = dict(hf(out).named_parameters())
    for name, mask in masks.items():
        assert not parameters[name][~mask].any()
        assert bool((~mask).sum(1).eq(mask.shape[1] // 2).all())
    tensors = load_file(out / TENSOR_FILE)
    next(t for n, t in tensors.items() if n.startswith("mask.")).logical_not_()
    save_file(tensors, out / TENSOR_FILE)
    with pytest.raises(UserError, match=r"plan\.safetensors: is not the file"):
        load_masks(out)
    (out / TENSOR_FILE).unlink()
    with pytest.raises(UserError, match=r"plan\.safetensors"):
        load_masks(out)
    (out / JSON_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json"):
        load_masks(out)
    (out / JSON_FILE).unlink()
    with pytest.raises(UserError, match=r"plan\.json: no such file"):
        load_masks(out)


def test_plans_without_masks_have_none(tmp_path: Path) -> None:
    directory, out = tiny_llama(tmp_path), tmp_path / "out"
    prune(directory, out, "minitron-depth", 0.4)
    assert load_masks(out) == {}


def test_the_fingerprint_follows_the_calibration(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    prints = set()
    for ids in (windows(seed=1), windows(seed=2)):
        plan = make_plan(checkpoint, "wanda", Target(ratio=0.5), calibration(ids))
        (tmp_path / "p").mkdir(exist_ok=True)
        prints.add(plan.save(tmp_path / "p")["fingerprint"])
    assert len(prints) == 2


@pytest.mark.parametrize(("layers", "first"), [([0, 1, 3, 4], 2), ([2, 3, 4], 0), ([0, 1], 2)])
def test_max_window_layers_follows_the_layers(layers: list[int], first: int, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, "qwen2-mixed")  # layers 2 to 4 have a window
    edit_config(directory, layer_types=list(Checkpoint(directory).config.layer_types))
    config = config_without(directory, layers)
    assert config["max_window_layers"] == first
    older = type(Checkpoint(directory).config).from_dict({k: v for k, v in config.items() if k != "layer_types"})
    assert older.layer_types == config["layer_types"]


@pytest.mark.parametrize(
    ("layers", "period"), [([0, 1, 2, 3, 4], 3), ([0, 2, 3, 5], 2), ([2, 5], 1), ([0, 1, 3], 4), ([2, 3, 4], None)]
)
def test_sliding_window_pattern_follows_the_layers(
    layers: list[int], period: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_family(tmp_path, "gemma3-old")  # layers 2 and 5 have no window
    capsys.readouterr()
    config = config_without(directory, layers)
    assert config.get("sliding_window_pattern") == period
    assert ("no sliding_window_pattern describes" in capsys.readouterr().err) == (period is None)
    if period is not None:
        older = type(Checkpoint(directory).config).from_dict({k: v for k, v in config.items() if k != "layer_types"})
        assert older.layer_types == config["layer_types"]


@pytest.mark.parametrize(("layers", "interval"), [([0, 1, 2, 3], 2), ([0, 2, 3], 3), ([1, 3], 1), ([1, 2, 4], None)])
def test_no_rope_layer_interval_follows_the_layers(
    layers: list[int], interval: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_family(tmp_path, "smollm3-old")  # layers 1 and 3 have no RoPE
    capsys.readouterr()
    config = config_without(directory, layers)
    assert config.get("no_rope_layer_interval") == interval
    assert ("no no_rope_layer_interval describes" in capsys.readouterr().err) == (interval is None)
    if interval is not None:
        older = type(Checkpoint(directory).config).from_dict({k: v for k, v in config.items() if k != "no_rope_layers"})
        assert older.no_rope_layers == config["no_rope_layers"]


@pytest.mark.parametrize(("layers", "pattern"), [([0, 1, 2, 4], "LLG"), ([2, 3, 4], None), ([0, 2, 3, 4], 2)])
def test_a_pattern_of_letters_follows_the_layers(layers: list[int], pattern: object, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, "exaone4", layer_types=[KINDS[c] for c in "LLGLG"])
    edit_config(directory, sliding_window_pattern="LLG")
    assert config_without(directory, layers).get("sliding_window_pattern") == pattern


KINDS = {"L": "sliding_attention", "G": "full_attention"}


def config_without(directory: Path, keep_layers: list[int]) -> dict[str, Any]:
    """The content of config.json after a cut to some layers."""
    after = dataclasses.replace(Checkpoint(directory).shape, layers=len(keep_layers))
    return cut_config(Checkpoint(directory), by_hand(directory, after=after, keep_layers=torch.tensor(keep_layers)))
