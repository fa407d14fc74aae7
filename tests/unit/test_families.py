"""Every family with every kind of method: outputs open with plain transformers and are the model cut in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from family_configs import FAMILIES, FAMILY_CONFIGS, cut_axes
from helpers import SCORED, edit_config, logits, windows
from reference import Pruned, Zoo, assert_same_logits, calibration_means, close, opened, reference
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import FAMILIES as TABLE

SOME = ("minitron-width", "flap")  #: tried on the families' variants: every axis is cut by one of them
VARIANTS = tuple(name for name in FAMILY_CONFIGS if name not in FAMILIES)
IN_FRESH = ("minitron-depth", "minitron-width", "flap", "wanda")  #: on every family, each kind among them
REST = [method for method in SCORED if method not in IN_FRESH]
CASES = [(family, method) for family in FAMILIES for method in IN_FRESH]
CASES += [(f, REST[3 * (3 * n + k) % len(REST)]) for n, f in enumerate(FAMILIES) for k in range(3)]
CASES += [(variant, method) for variant in VARIANTS for method in SOME]


def test_every_family_and_every_method_are_here() -> None:
    alone = [family for family in TABLE if not set(family.model_types).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    # The rest only exist within image-text models; mixtures have tests of their own.
    assert set(FAMILIES) == {family.name for family in alone if not family.experts}
    assert {method for _, method in CASES} == set(SCORED)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_output_is_the_model_cut_in_memory(name: str, method: str, zoo: Zoo) -> None:
    pruned = zoo.pruned(name, method)
    got, plan = opened(pruned.out), pruned.plan
    filled = calibration_means(pruned) if method == "flap" else None
    assert_same_logits(got, reference(pruned, filled=filled))
    assert float((logits(got, windows()) - zoo.untouched(name)).abs().max()) > 0.05
    assert Checkpoint(pruned.out).shape == plan.after
    assert sum(p.numel() for p in got.parameters()) == plan.after.total
    check = {"depth": depth_is_cut, "width": width_is_cut, "sparse": weights_are_zeroed}[plan.granularity]
    check(pruned)


def depth_is_cut(pruned: Pruned) -> None:
    before, after, kept = pruned.plan.before, pruned.plan.after, pruned.plan.keep_layers.tolist()
    assert len(kept) == after.layers == {5: 3, 6: 4}[before.layers]
    old, new = load_file(pruned.directory / "model.safetensors"), load_file(pruned.out / "model.safetensors")
    for position, layer in enumerate(kept):
        name = f"{pruned.plan.before.family.reader('ffn')}.weight"
        assert torch.equal(new[f"model.layers.{position}.{name}"], old[f"model.layers.{layer}.{name}"])


def width_is_cut(pruned: Pruned) -> None:
    plan = pruned.plan
    assert plan.after.layers == plan.before.layers
    assert plan.removed()["non_embedding"] == pytest.approx(0.4, abs=0.05)
    narrower = {s for s in ("hidden", "ffn", "kv") if plan.after.units(s) < plan.before.units(s)}
    axes = cut_axes(
        pruned.name, *(("hidden", "ffn") if plan.method in ("minitron-width", "random-width") else ("ffn", "kv"))
    )
    assert narrower <= set(axes) and narrower & (set(axes) - {"ffn"} or {"ffn"})


def weights_are_zeroed(pruned: Pruned) -> None:
    plan = pruned.plan
    old, new = load_file(pruned.directory / "model.safetensors"), load_file(pruned.out / "model.safetensors")
    linears = {name for name, tensor in new.items() if ".layers." in name and tensor.dim() == 2}
    assert set(plan.masks) == linears and len(linears) == sum(
        len(plan.before.linears(layer)) for layer in range(plan.before.layers)
    )
    for name in linears:
        assert float((new[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
    updated = any(bool((new[name] != old[name])[plan.masks[name]].any()) for name in linears)
    assert updated == (plan.method == "sparsegpt")


FRESH = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
assert not any(name.startswith("secateur") for name in sys.modules)
work = sys.argv[1]
ids, found = load_file(work + "/ids.safetensors")["ids"], {}
for key, directory in json.load(open(work + "/outs.json")).items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), (key, info)
    with torch.no_grad():
        found[key] = model.eval()(input_ids=ids).logits.contiguous()
save_file(found, work + "/logits.safetensors")
"""


@pytest.fixture(scope="module")
def fresh(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of outputs from a process that knows transformers alone; one for all, since its start takes longest."""
    work = tmp_path_factory.mktemp("fresh")
    outs = {f"{name} {method}": str(zoo.pruned(name, method).out) for name in FAMILIES for method in IN_FRESH}
    (work / "outs.json").write_text(json.dumps(outs))
    save_file({"ids": windows(2, 20, seed=4)}, work / "ids.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, str(work)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(work / "logits.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_process_with_transformers_alone_opens_it(name: str, fresh: dict[str, torch.Tensor], zoo: Zoo) -> None:
    for method in IN_FRESH:
        pruned = zoo.pruned(name, method)
        filled = calibration_means(pruned) if method == "flap" else None
        wanted = logits(reference(pruned, filled=filled), windows(2, 20, seed=4))
        close(fresh[f"{name} {method}"], wanted)


SLIDING, FULL = "sliding_attention", "full_attention"
#: (name, list by layer) -> its values for layers 1, 2 and 4
LISTS: dict[tuple[str, str], list[Any]] = {
    ("gemma3", "layer_types"): [SLIDING, FULL, SLIDING],
    ("gemma3-old", "layer_types"): [SLIDING, FULL, SLIDING],
    ("qwen2-mixed", "layer_types"): [FULL, SLIDING, SLIDING],
    ("ministral", "layer_types"): [SLIDING, FULL, FULL],
    ("gemma2", "layer_types"): [FULL, FULL, FULL],
    ("gemma2-uncapped", "layer_types"): [FULL, SLIDING, SLIDING],
    ("olmo3", "layer_types"): [SLIDING, FULL, FULL],
    ("exaone4", "layer_types"): [SLIDING, FULL, FULL],
    ("smollm3", "layer_types"): [FULL, FULL, SLIDING],
    ("smollm3", "no_rope_layers"): [0, 1, 0],
    ("smollm3-old", "no_rope_layers"): [0, 1, 1],
}


@pytest.mark.parametrize(("name", "key"), LISTS)
def test_lists_by_layer_follow_the_layers(name: str, key: str, zoo: Zoo) -> None:
    kept, values = torch.tensor([1, 2, 4]), LISTS[name, key]
    after = dataclasses.replace(Checkpoint(zoo.directory(name)).shape, layers=3)
    pruned = zoo.cut(name, zoo.keeping_all(name, after=after, keep_layers=kept))
    assert getattr(Checkpoint(pruned.out).config, key) == values
    assert json.loads((pruned.out / "config.json").read_text())[key] == values
    assert_same_logits(opened(pruned.out), reference(pruned))
    # The order matters: with the values of the first three layers the logits are others.
    edit_config(pruned.out, **{key: getattr(Checkpoint(pruned.directory).config, key)[:3]})
    difference = logits(opened(pruned.out), windows(2, 20)) - logits(reference(pruned), windows(2, 20))
    assert float(difference.abs().max()) > 1e-2
