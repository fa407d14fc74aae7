"""Families of other packages, and the error for a model of no family; the package is the one of docs/families.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import documented_package, edit_config, install_package, random_model, tiny_family
from proofs import PlainTransformers, Prover
from reference import Zoo
from secateur.cli import main
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import FAMILIES, Family, plugin_families
from secateur.model.weight_files import describe_block

DOCS = Path(__file__).resolve().parents[2] / "docs"
GROUP = "secateur.families"
TINY = {
    "model_type": "vaultgemma",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "sliding_window": 6,
    "final_logit_softcapping": 5.0,
    "attention_bias": True,
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    plugin_families.cache_clear()
    monkeypatch.syspath_prepend(folder)
    yield folder
    plugin_families.cache_clear()


def install(folder: Path, entries: dict[str, str], **modules: str) -> None:
    install_package(folder, GROUP, entries, **modules)
    plugin_families.cache_clear()


@pytest.fixture
def documented(site: Path) -> None:
    entries, module, code = documented_package("families.md", GROUP)
    install(site, entries, **{module: code})


@pytest.mark.usefixtures("documented")
def test_the_documented_row_is_proved(tmp_path: Path) -> None:
    (root := tmp_path / "zoo").mkdir()
    zoo = Zoo(root)
    zoo.add("vaultgemma", random_model(TINY))
    plain = PlainTransformers(tmp_path)
    for kind, proof in Prover(zoo, plain, "vaultgemma", "wanda-sp").each_kind().items():
        assert proof.difference <= 1e-5, kind
    plain.close()


@pytest.mark.usefixtures("documented")
def test_the_documented_row_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = Zoo(tmp_path)
    zoo.add("vaultgemma", random_model(TINY))
    model, out = zoo.directory("vaultgemma"), tmp_path / "out"
    assert main(["prune", str(model), str(out), "--method", "magnitude", "--ratio", "0.5"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "vaultgemma"


def test_the_page_explains_every_column() -> None:
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    assert [field.name for field in dataclasses.fields(Family) if f"`{field.name}`" not in text] == []


BROKEN = {
    "import no_such_module_anywhere": "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    "raise RuntimeError('two\\nlines')": "RuntimeError: two lines",
    "ROW = 3": "its entry point names 3, which is no Family",
}


@pytest.mark.parametrize("code", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_package_is_reported_in_one_line(code: str, site: Path, tmp_path: Path) -> None:
    name = f"broken_{list(BROKEN).index(code)}"
    install(site, {"broken": f"{name}:ROW"}, **{name: code})
    directory = tiny_family(tmp_path, "llama")
    assert Checkpoint(directory).family.name == "llama"  # a row of the table needs no package
    edit_config(directory, model_type="vaultgemma")
    with pytest.raises(UserError) as caught:
        Checkpoint(directory)
    assert str(caught.value).startswith("broken: ") and BROKEN[code] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_names_the_tensors_of_a_block(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path)
    zoo.add("vaultgemma", random_model(TINY))
    directory = zoo.directory("vaultgemma")
    with pytest.raises(UserError) as caught:
        Checkpoint(directory)
    message = str(caught.value)
    assert "'vaultgemma'" in message and "docs/families.md" in message and "\n" not in message
    assert "model.layers.0: input_layernorm.weight [48], mlp.down_proj.weight [48, 64], " in message
    assert "self_attn.q_proj.bias [72]" in message and "layers.1" not in message
    for family in FAMILIES:
        assert all(model_type in message for model_type in family.model_types)


def test_of_several_stacks_the_largest_is_described(tmp_path: Path) -> None:
    names = {f"vision.blocks.{n}.mlp.weight": torch.ones(4, 4) for n in range(2)}
    names |= {f"model.layers.{n}.experts.{e}.up.weight": torch.ones(8, 4) for n in range(2) for e in range(3)}
    save_file(names, tmp_path / "model.safetensors")
    assert describe_block(tmp_path) == "model.layers.0: experts.*.up.weight [8, 4]"


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"a.0.b": 3}', b'{"a.0.b": {}}', b'{"a.0.b": {"shape": 3}}', b"{"])
def test_a_damaged_header_describes_nothing(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert describe_block(tmp_path) == ""


def test_an_unknown_family_without_weights(tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, "llama")
    edit_config(directory, model_type="vaultgemma")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'vaultgemma' is not a known family .*docs/families\.md") as caught:
        Checkpoint(directory)
    assert "input_layernorm" not in str(caught.value)
