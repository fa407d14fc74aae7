"""``secateur shapes``: from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from family_configs import FAMILY_CONFIGS, FAMILY_SIZES
from secateur.cli import main

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["shapes", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["shapes", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["shapes", *map(str, arguments), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("secateur: error: ")
    return captured.err


def flops(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, *, context: int) -> float:
    """Two for each weight that a token is multiplied by, and two products of each head with each position seen."""
    query, kv = 128 * heads, 128 * kv_heads
    weights = layers * (hidden * query + 2 * hidden * kv + query * hidden + 3 * hidden * ffn) + 128_256 * hidden
    seen = sum(range(1, context + 1)) / context
    return 2 * weights + layers * heads * 2 * 2 * 128 * seen


# The published shapes: what is asked, billions of parameters, removed of all and of those outside the embeddings,
# layers, hidden, FFN, heads, KV heads.
PUBLISHED = [
    ("", 8.03, None, None, (32, 4096, 14336, 32, 8)),
    ("layers=16", 4.54, 0.435, 0.500, (16, 4096, 14336, 32, 8)),
    ("layers=8", 2.80, 0.652, 0.750, (8, 4096, 14336, 32, 8)),
    ("layers=4", 1.92, 0.761, 0.875, (4, 4096, 14336, 32, 8)),
    ("layers=2", 1.49, 0.815, 0.938, (2, 4096, 14336, 32, 8)),
    ("hidden=3072,ffn=9216", 4.51, 0.438, 0.466, (32, 3072, 9216, 32, 8)),
    ("hidden=2432,ffn=6272", 2.89, 0.641, 0.676, (32, 2432, 6272, 32, 8)),
    ("hidden=1792,ffn=6016", 2.08, 0.741, 0.768, (32, 1792, 6016, 32, 8)),
    ("hidden=3456,ffn=7808", 4.61, 0.426, 0.467, (32, 3456, 7808, 32, 8)),
    ("heads=20,kv_heads=5,ffn=6528", 4.46, 0.445, 0.512, (32, 4096, 6528, 20, 5)),
]


@pytest.mark.parametrize(("asked", "billions", "total", "non_embedding", "sizes"), PUBLISHED, ids=lambda v: str(v))
def test_the_published_shapes(
    asked: str,
    billions: float,
    total: float | None,
    non_embedding: float | None,
    sizes: tuple[int, int, int, int, int],
    config: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = call(capsys, config, *(["--shape", asked] if asked else []))
    layers, hidden, ffn, heads, kv_heads = sizes
    assert found["model"] == str(config)
    assert found["shape"] == {
        "hidden": hidden,
        "ffn": ffn,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 128,
        "vocabulary": 128_256,
        "tied": False,
    }
    assert round(found["parameters"]["total"] / 1e9, 2) == billions
    assert found["parameters"]["total"] - found["parameters"]["non_embedding"] == 2 * 128_256 * hidden
    assert found["kv_cache_bytes_per_token"] == 2 * layers * kv_heads * 128 * 2
    assert found["flops_per_token"]["context"] == 2048
    assert found["flops_per_token"]["forward"] == pytest.approx(flops(*sizes, context=2048), rel=1e-12)
    if not asked:
        assert "before" not in found and "removed" not in found and "targets" not in found
        return
    # Half a unit of the last printed digit, and a hair: 0.9374994 is printed as .938 there.
    assert found["removed"]["total"] == pytest.approx(total, abs=0.00051)
    assert found["removed"]["non_embedding"] == pytest.approx(non_embedding, abs=0.00051)
    assert found["asked"] == {name: int(size) for name, size in (part.split("=") for part in asked.split(","))}
    assert (found["of"], found["drift"]) == (None, None)
    own = call(capsys, config)
    assert found["before"] == {key: value for key, value in own.items() if key != "model"}
    if heads == 20:
        assert found["family"] == "mistral" and "written with model_type mistral" in found["note"]
    else:
        assert found["family"] == "llama" and found["note"] is None


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_counts_are_those_of_the_library(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | FAMILY_SIZES | FAMILY_CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(said))
    for place in (tmp_path, tmp_path / "config.json"):
        found = call(capsys, place)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
        outside = {id(p): p.numel() for n, p in model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
        assert found["parameters"]["non_embedding"] == found["parameters"]["total"] - sum(outside.values())
        assert found["shape"]["tied"] == model.config.tie_word_embeddings
        assert found["flops_per_token"]["context"] == 64  # no more positions than it has


def test_a_file_of_any_name_will_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = config.rename(config.with_name("llama-8b.json"))
    assert call(capsys, other)["parameters"]["total"] == 8_030_261_248


@pytest.mark.parametrize("of", ["total", "non-embedding"])
@pytest.mark.parametrize(
    "how", [("--axes", "hidden,ffn"), ("--axes", "kv,ffn"), ("--method", "shortgpt"), ("--method", "flap")]
)
def test_one_target(how: tuple[str, str], of: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, config, "--ratio", 0.5, "--of", of, *how)
    key = of.replace("-", "_")
    assert (found["asked"], found["of"]) == (0.5, key)
    before, after = found["before"]["parameters"], found["parameters"]
    assert found["removed"] == {k: pytest.approx(1 - after[k] / before[k]) for k in before}
    assert found["drift"] == pytest.approx(found["removed"][key] - 0.5) and abs(found["drift"]) < 0.02
    if how[1] == "shortgpt":
        assert found["shape"]["layers"] == (14 if of == "total" else 16)


def test_the_ways_to_a_ratio(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, config, "--ratio", 0.5)
    assert found["shape"]["layers"] == 32 and (found["asked"], found["of"]) == (0.5, "non_embedding")
    assert list(found["targets"]) == ["depth", "width", "heads"]
    assert found["targets"]["depth"]["shape"]["layers"] == 16
    for way, options in {"width": ["--axes", "hidden,ffn"], "heads": ["--axes", "kv,ffn"]}.items():
        alone = call(capsys, config, "--ratio", 0.5, *options)
        assert found["targets"][way] == {k: v for k, v in alone.items() if k not in ("model", "before")}
    shown = text(capsys, config, "--ratio", 0.5)
    assert [line.split() for line in shown.splitlines() if "own" in line] == [["own", "depth", "width", "heads"]]
    for part in ("8.03\N{NO-BREAK SPACE}B", "4.54\N{NO-BREAK SPACE}B", "131,072", "65,536", "43.5%", "50.0%"):
        assert part in shown
    assert "asked: 50% of the parameters outside the embeddings" in shown


@pytest.mark.parametrize("how", [(), ("--axes", "kv,ffn"), ("--method", "shortgpt"), ("--method", "wanda")])
def test_several_ratios(how: tuple[str, ...], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = ("0.25", "0.5", "0.75")
    alone = [call(capsys, config, "--ratio", ratio, *how) for ratio in ratios]
    assert all(found.pop("model") == str(config) for found in alone)
    assert call(capsys, config, "--ratio", ",".join(ratios), *how) == {"model": str(config), "outputs": alone}
    shown = text(capsys, config, "--ratio", ",".join(ratios), *how)
    title, *_, basis = shown.splitlines()
    sections = [text(capsys, config, "--ratio", ratio, *how).splitlines()[1:-1] for ratio in ratios]
    assert shown.splitlines() == [title, *(line for section in sections for line in section), basis]


def test_a_way_that_is_closed_does_not_close_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 1}))
    found = call(capsys, path, "--ratio", 0.5)
    assert "possible: none" in found["targets"]["depth"]["error"]
    assert found["targets"]["width"]["removed"]["non_embedding"] == pytest.approx(0.5, abs=0.01)
    assert "depth: of 1 layer " in text(capsys, path, "--ratio", 0.5)


def test_sparse_methods_keep_the_shape(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, config, "--ratio", 0.5, "--method", "wanda")
    assert found["shape"] == found["before"]["shape"] and found["flops_per_token"] == found["before"]["flops_per_token"]
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert found["removed"]["total"] == pytest.approx(0.5 * linears / 8_030_261_248)
    assert found["of"] == "block_weights" and "zeroed" in found["note"]


def test_a_note_where_no_config_takes_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B | {"attention_bias": True}))
    found = call(capsys, path, "--shape", "heads=20,ffn=6528")
    assert found["shape"]["heads"] == 20 and found["family"] == "llama"
    assert found["note"].startswith("transformers refuses a llama of hidden size 4096 with 20 heads")
    assert "note: transformers refuses" in text(capsys, path, "--shape", "heads=20,ffn=6528")


@pytest.mark.parametrize(("context", "used"), [(512, 512), (4096, 4096), (10**6, 131_072)])
def test_the_context(context: int, used: int, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", str(config), "--context", str(context), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["flops_per_token"]
    assert found == {"context": used, "forward": pytest.approx(flops(32, 4096, 14336, 32, 8, context=used))}
    assert ("instead of 1000000: the model has no more positions (--context)" in captured.err) == (context != used)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--ratio", "0.999"], "--ratio 0.999: depth: of 32 layers it would keep 0"),
        (["--ratio", "0.999", "--axes", "kv"], "--ratio 0.999: too large; narrowing this model in steps of 1 KV head"),
        (["--ratio", "0.5", "--shape", "layers=3"], "--shape and --ratio both say how much to remove; leave one out"),
        (["--shape", "heads=21"], "--shape: heads=21 splits a KV group"),
        (["--shape", "hidden=5000"], "--shape: hidden=5000 is not between 1 and the model's 4096"),
        (["--shape", "hidden=4096"], "--shape: is the model's own shape"),
        (["--of", "total"], "--of says what a --ratio counts, and there is no ratio; leave it out"),
        (["--axes", "kv"], "--axes: goes with a --ratio"),
        (["--method", "wanda"], "--method: goes with a --ratio"),
        (["--method", "wnda", "--ratio", "0.5"], "'wnda' is not a known method; did you mean 'wanda'?"),
        (["--method", "flap", "--ratio", "0.5", "--axes", "hidden"], "--axes: flap scores ffn, kv, not hidden"),
        (["--method", "wanda", "--ratio", "0.5", "--of", "total"], "--of: a ratio for wanda always counts"),
        (["--ratio", "1.5"], "--ratio: '1.5' is not a ratio between 0 and 1"),
        (["--ratio", "0.5,"], "--ratio: '' is not a ratio between 0 and 1"),
        (["--ratio", "0.5,0.50"], "--ratio: '0.5,0.50' names a ratio twice"),
        (["--ratio", "0.5,0.999"], "--ratio 0.999: depth: of 32 layers it would keep 0"),
        (["--ratio", "1e-9"], "--ratio 1e-09: depth: of 32 layers it would keep 32; possible: 0.0312"),
        (
            ["--ratio", "1e-9", "--method", "wanda"],
            "--ratio 1e-09: removes nothing: wanda compares 14,336 weights",
        ),
        (["--ratio", "0.5", "--axes", "ffn,ffn"], "--axes: ffn,ffn names an axis twice"),
        (["--of", "all", "--ratio", "0.5"], "--of: 'all' is not known"),
        (["--of", "non_embedding", "--ratio", "0.5"], "'non_embedding' is not known; did you mean 'non-embedding'?"),
        (["--context", "0"], "--context: '0' is not a whole number above zero"),
    ],
)
def test_bad_input(arguments: list[str], part: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in error(capsys, config, *arguments)


def test_configs_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in error(capsys, tmp_path / "none.json")
    assert f"{tmp_path}/config.json: no such file" in error(capsys, tmp_path)
    path = tmp_path / "config.json"
    for content, part in (
        ("{", "not valid JSON"),
        ("[]", "has no model_type"),
        (json.dumps(LLAMA_8B | {"model_type": "gpt2"}), "model_type 'gpt2' is not a known family (known: llama"),
        (json.dumps(LLAMA_8B | {"num_attention_heads": 24}), "multiple of the number of attention heads"),
        (json.dumps(LLAMA_8B | {"num_key_value_heads": 5}), "32 query heads cannot share 5 KV heads evenly"),
    ):
        path.write_text(content)
        assert part in error(capsys, path)
