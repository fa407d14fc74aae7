"""Where a checkpoint runs: each rule of the table, and the line that people and programs read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import secateur
from helpers import tiny_family, windows
from secateur.cli import main
from secateur.model.families import FAMILIES as TABLE
from secateur.model.families import Family, family_of
from secateur.model.runtimes import RUNTIMES, UNEVEN, Runtime, Support, Traits, check_runtimes, describe_runtimes
from secateur.model.shapes import Shape

BEFORE = Shape(hidden=2048, ffn=8192, layers=12, heads=16, kv_heads=8, head_dim=128, vocabulary=1000)
PERIOD = tuple((layer + 1) % 6 == 0 for layer in range(12))
CHECKED = ("transformers", "llama.cpp", "mlx-lm", "ONNX Runtime", "CTranslate2")


def supports(model_type: str, kinds: tuple[bool, ...] = (), **changes: Any) -> dict[str, Support]:
    before = dataclasses.replace(BEFORE, family=family_of(model_type, where="test"))
    after = dataclasses.replace(before, **changes)
    return {support.runtime: support for support in check_runtimes(Traits(after, kinds, before))}


def test_a_plain_llama_runs_wherever_it_was_checked() -> None:
    entries = supports("llama")
    assert list(entries) == ["transformers", "llama.cpp", "mlx-lm", "vLLM", "ONNX Runtime", "CTranslate2"]
    assert {name: support.runs for name, support in entries.items()} == {
        **dict.fromkeys(CHECKED, "yes"),
        "vLLM": "not checked",
    }
    assert all(support.version for name, support in entries.items() if name != "vLLM")


@pytest.mark.parametrize(
    ("model_type", "changes", "refusing", "reason", "remedy"),
    [
        ("qwen3", {"switches": ("attention_bias",)}, {"llama.cpp", "mlx-lm"}, "biases of its linears", "bias=none"),
        (
            "gemma3_text",
            {"switches": ("attention_bias",)},
            {"llama.cpp", "mlx-lm"},
            "biases of its linears",
            "bias=none",
        ),
        ("olmo2", {"switches": ("attention_bias",)}, {"llama.cpp"}, "biases of its linears", "bias=none"),
        ("llama", {"switches": ("attention_bias", "mlp_bias")}, set(), "", ""),
        ("olmo2", {"heads": 8, "kv_heads": 4}, {"llama.cpp"}, "heads * head_dim", "`axes` ffn"),
        ("olmo2", {"hidden": 1536}, {"llama.cpp"}, "heads * head_dim", "`axes` ffn"),
        ("phi3", {"hidden": 1536}, {"llama.cpp", "mlx-lm"}, "heads * head_dim", "`axes` ffn"),
        ("qwen2", {"hidden": 1536}, {"llama.cpp", "mlx-lm", "CTranslate2"}, "head", "`axes` ffn"),
        ("llama", {"hidden": 1536}, {"CTranslate2"}, "head_dim is not read", "`axes` ffn"),
        ("qwen3", {"hidden": 1536, "heads": 8, "kv_heads": 4}, set(), "", ""),
        ("mistral", {"hidden": 1536}, set(), "", ""),
        ("gemma", {"switches": ("attention_bias",)}, {"llama.cpp", "mlx-lm", "CTranslate2"}, "biases", "bias=none"),
        ("seed_oss", {"switches": ("attention_bias",)}, set(), "", ""),
        ("seed_oss", {"switches": ("attention_bias", "mlp_bias")}, {"llama.cpp"}, "biases", "bias=none"),
        ("granite", {"heads": 8, "kv_heads": 4}, {"llama.cpp", "mlx-lm"}, "heads * head_dim", "`axes` ffn"),
        ("phi3", {"ffn": 4096, "layers": 6}, set(), "", ""),
    ],
)
def test_the_rules_on_shapes(
    model_type: str, changes: dict[str, Any], refusing: set[str], reason: str, remedy: str
) -> None:
    entries = supports(model_type, **changes)
    refused = {name: s for name, s in entries.items() if s.runs == "no" and s.reason != "the family is not known there"}
    assert set(refused) == refusing
    assert all(reason in support.reason and remedy in support.remedy for support in refused.values())


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (PERIOD, ""),
        (PERIOD[:8], ""),
        (PERIOD[1:], "layer kinds are derived from layer numbers"),
        (PERIOD[:4] + PERIOD[5:], "layer kinds are derived from layer numbers"),
        ((True, True), "layer kinds are derived from layer numbers"),
        ((False,) * 5, "no layer has full attention"),
    ],
)
def test_the_rules_on_layer_kinds(kinds: tuple[bool, ...], reason: str) -> None:
    support = supports("gemma3_text", kinds, layers=len(kinds))["llama.cpp"]
    assert support.runs == ("no" if reason else "yes") and (not reason or support.reason.startswith(reason))


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, "yes"),
        ({"ffn": 4096}, "yes"),
        ({"kv_heads": 4, "heads": 8}, "yes"),
        ({"layers": 60}, "no"),
        ({"hidden": 1792}, "no"),
    ],
)
def test_gemma_3_of_62_layers_keeps_its_layers_and_hidden_channels(changes: dict[str, int], runs: str) -> None:
    before = dataclasses.replace(BEFORE, layers=62, family=family_of("gemma3_text", where="test"))
    traits = Traits(dataclasses.replace(before, **changes), before=before)
    (support,) = [entry for entry in check_runtimes(traits) if entry.runtime == "llama.cpp"]
    assert support.runs == runs and ("62 layers" in support.reason) == (runs == "no")


@pytest.mark.parametrize(
    ("changes", "quantisation", "reason", "remedy"),
    [
        ({}, "K-quants", "", ""),
        ({"hidden": 1664, "ffn": 6784}, "no K-quants", "rows of 1664, 6784 weights are no multiples of 256", "step"),
        ({"ffn": 688}, "none", "rows of 688 weights are no multiples of 32", "step"),
        ({"heads": 10, "kv_heads": 5, "head_dim": 64}, "no K-quants", "rows of 640 weights", ""),
    ],
)
def test_quantisation_by_rows(changes: dict[str, Any], quantisation: str, reason: str, remedy: str) -> None:
    """The lengths of rows are those of the matrices: hidden, FFN, and heads * head_dim for the output projection."""
    support = supports("mistral", **changes)["llama.cpp"]
    assert support.runs == "yes" and support.quantisation == quantisation
    assert support.reason.startswith(reason) and support.remedy == (f"`{remedy}` 256" if remedy else "")


def test_a_step_remedies_only_what_the_cut_did() -> None:
    odd = dataclasses.replace(BEFORE, ffn=688)
    (support,) = [s for s in check_runtimes(Traits(odd, (), odd)) if s.runtime == "llama.cpp"]
    assert support.quantisation == "none" and not support.remedy


@pytest.mark.parametrize(
    ("model_type", "changes", "kinds"),
    [
        ("olmo2", {"hidden": 1024}, ()),
        ("qwen3", {"switches": ("attention_bias",)}, ()),
        ("gemma3_text", {}, PERIOD[1:]),
    ],
)
def test_an_option_remedies_only_what_the_cut_did(
    model_type: str, changes: dict[str, Any], kinds: tuple[bool, ...]
) -> None:
    """A model that did not run before the cut gets the reason, and no option."""
    odd = dataclasses.replace(BEFORE, family=family_of(model_type, where="test"), **changes)
    cut = dataclasses.replace(odd, ffn=4096)
    (support,) = [s for s in check_runtimes(Traits(cut, kinds, odd, False, kinds)) if s.runtime == "llama.cpp"]
    assert support.runs == "no" and support.reason and not support.remedy


def test_what_was_not_checked_is_never_a_yes() -> None:
    """A family, or a trait of one, that the table lacks."""
    stranger = dataclasses.replace(BEFORE, family=dataclasses.replace(BEFORE.family, name="stranger"))
    entries = {support.runtime: support.runs for support in check_runtimes(Traits(stranger))}
    assert entries.pop("transformers") == "yes" and set(entries.values()) == {"not checked"}
    biased = supports("phi3", switches=("attention_bias",))  # which no Phi-3 has
    assert biased["llama.cpp"].runs == biased["mlx-lm"].runs == "not checked"


def test_the_table_names_families_that_exist_and_says_why_and_what_instead() -> None:
    names = {family.name for family in TABLE}
    for runtime in RUNTIMES:
        assert bool(runtime.runs) == bool(runtime.version)
        assert {*runtime.runs} - {"*"} <= names
        for rule in runtime.rules:
            assert {*rule.families} <= names and rule.reason and "\n" not in rule.reason + rule.remedy
    rules = [rule for runtime in RUNTIMES for rule in runtime.rules]
    assert {rule.reason for rule in rules if not rule.remedy} == {"the family is not known there"}


def test_the_line() -> None:
    line = describe_runtimes(list(supports("qwen3", switches=("attention_bias",)).values()), sparse=False)
    assert line == (
        "transformers 5.23, ONNX Runtime 1.32, CTranslate2 4.8.5; not in llama.cpp b9190 and mlx-lm 0.32.2 (biases "
        "of its linears are not read; instead: flap: `options` bias=none); not checked: vLLM"
    )


def test_sparse_outputs_say_what_their_zeros_are_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny_family(tmp_path, "llama"), tmp_path / "out"
    assert main(["prune", str(model), str(out), "--method", "magnitude", "--pattern", "2:4"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runs in")]
    assert "zeros are for research" in line and "have removed their 2:4 kernels" in line
    assert line.removeprefix("runs in      ") in (out / "README.md").read_text()
    assert main(["inspect", str(out)]) == 0
    assert line in capsys.readouterr().out
    assert main(["inspect", str(model)]) == 0
    assert "zeros are for research" not in capsys.readouterr().out


def test_pruned_models_carry_the_table_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_family(tmp_path, "olmo2")
    fields: dict[str, Any] = {"method": "flap", "ratio": 0.4, "calibration": windows()}
    pruned, live = secateur.prune(model, tmp_path / "out", **fields), secateur.prune(model, **fields)
    records = {record["runtime"]: record for record in pruned.record()["runs_in"]}
    assert records["llama.cpp"]["runs"] == "no" and records["vLLM"]["runs"] == "not checked"
    assert list(records.values()) == live.report["runs_in"] == [s.record() for s in pruned.runs_in]
    assert main(["inspect", str(pruned.path), "--json"]) == 0
    inspected = {record["runtime"]: record["runs"] for record in json.loads(capsys.readouterr().out)["runs_in"]}
    assert inspected == {name: record["runs"] for name, record in records.items()}


def test_a_llama_written_as_a_mistral_is_judged_as_one(tmp_path: Path) -> None:
    model = tiny_family(tmp_path, "llama")
    pruned = secateur.prune(model, tmp_path / "out", method="random-width", shape={"hidden": 44})
    assert pruned.shape.family.name == "mistral"
    assert {support.runtime for support in pruned.runs_in if support.runs == "yes"} == set(CHECKED)


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys; from secateur.model.runtimes import *; from secateur.model.shapes import Shape; "
        "print(describe_runtimes(check_runtimes(Traits(Shape(256, 512, 2, 4, 2, 64, 100))), sparse=True)); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def table_rows() -> list[str]:
    """The rows of the table in docs/what-runs-where.md."""
    runtimes = [runtime for runtime in RUNTIMES if runtime.version and runtime.name != "transformers"]
    rows = []
    for family in TABLE:
        cells = [cell(runtime, family) for runtime in runtimes]
        if {*cells} - {"not checked"}:
            rows.append(f"| {family.name} | {' | '.join(cells)} |")
    return rows


def cell(runtime: Runtime, family: Family) -> str:
    """What a runtime computes of a family."""
    plain = Traits(dataclasses.replace(BEFORE, family=family))
    (support,) = [entry for entry in check_runtimes(plain) if entry.runtime == runtime.name]
    if support.runs != "yes":
        return support.runs
    traits, period = runtime.runs[family.name], tuple(layer == 0 for layer in range(family.pattern))
    broken = [rule for rule in runtime.rules if not rule.families or family.name in rule.families]
    limit = ", on its period" if any(rule.applies(Traits(plain.shape, period)) for rule in broken) else ""
    cuts = "every cut" if "*" in traits else "every cut without new biases" if UNEVEN in traits else "FFN, depth, zeros"
    return cuts + limit


def test_the_page_has_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "what-runs-where.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == table_rows()  # behind the head
