"""prune, eval, inspect and shapes on a checkpoint that secateur did not make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from secateur.cli import main
from secateur.data.tokenizer import train_tokenizer

TEXT = "The gardener prunes the old tree, and the tree grows new leaves in spring.\n" * 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([TEXT], 262)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["minitron-depth", "minitron-width", "wanda"])
def test_prune_eval_inspect(method: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--ratio", 0.5, "--calibration", f"text:{world / 'text.txt'}", "--seqlen", 32, "--windows", 6)
    pruned = call(capsys, "prune", world / "model", out, "--method", method, *options)
    assert (pruned["out"], pruned["method"], pruned["ratio"]["asked"]) == (str(out), method, 0.5)
    assert 0.44 < pruned["ratio"]["non_embedding"] < 0.56
    assert pruned["calibration"]["windows"] == 6

    seen = call(capsys, "inspect", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert seen["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert model.dtype == torch.bfloat16
    assert seen["sparsity"] == pytest.approx(0.5 if method == "wanda" else 0.0, abs=1e-3)
    assert seen["provenance"]["method"] == method

    answer = call(capsys, "eval", out, "--data", f"text:{world / 'text.txt'}", "--seqlen", 32)
    (measured,) = answer["results"][0]["measurements"]
    ids = AutoTokenizer.from_pretrained(out)(TEXT).input_ids
    assert measured["tokens"] == len(ids) - -(-len(ids) // 32)  # one token of each window is context only
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids), 32):
            window = torch.tensor([ids[start : start + 32]])
            if window.shape[1] > 1:
                logits = model.float()(window).logits[0, :-1]
                losses += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
    assert measured["value"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert measured["perplexity"] == pytest.approx(torch.tensor(measured["value"]).exp().item(), rel=1e-4)


def test_inspect_and_shapes_agree(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen, counted = call(capsys, "inspect", world / "model"), call(capsys, "shapes", world / "model")
    assert counted == {key: seen[key] for key in counted}
    assert set(seen) - set(counted) == {
        *("sparsity", "not_finite", "dtype", "digest", "provenance"),
        *("runs_in", "image_text", "axes", "uncut"),
    }
    assert seen["flops_per_token"]["context"] == 64  # the model's positions
    assert call(capsys, "inspect", world / "model", "--context", 8)["flops_per_token"]["context"] == 8
    assert main(["inspect", str(world / "model"), "--context", "65"]) == 0
    captured = capsys.readouterr()
    assert (
        "windows of 64:" in captured.out
        and "instead of 65: the model has no more positions (--context)" in captured.err
    )


def test_a_shape_is_what_pruning_writes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, how in enumerate([("random-depth", "--ratio", 0.5), ("random-width", "--ratio", 0.4, "--of", "total")]):
        told = call(capsys, "shapes", world / "model", "--method", *how)
        pruned = call(capsys, "prune", world / "model", tmp_path / str(number), "--method", *how)
        seen = call(capsys, "inspect", tmp_path / str(number))
        assert {key: told[key] for key in ("shape", "parameters", "family")} == {
            key: seen[key] for key in ("shape", "parameters", "family")
        }
        assert told["removed"] == pytest.approx({key: pruned["ratio"][key] for key in told["removed"]})
        assert told["drift"] == pytest.approx(pruned["ratio"]["drift"])


def test_same_inputs_same_bytes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        options = ("--method", "wanda", "--ratio", 0.5, "--calibration", f"text:{world / 'text.txt'}", "--seqlen", 32)
        call(capsys, "prune", world / "model", tmp_path / name, *options)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir()) and "plan.json" in names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ("prune {w}/model {o} --method wanda --ratio 1 --calibration text:{w}/text.txt", "between 0 and 1"),
        ("prune {w}/model {o} --method wandaa --ratio .5 --calibration text:{w}/text.txt", "did you mean 'wanda'?"),
        ("prune {w}/model {o} --method wanda --ratio .5 --calibration text:{w}/none.txt", "none.txt"),
        ("prune {w}/model {o} --method wanda --ratio .5 --calibration tex:{w}/text.txt", "tex:"),
        (
            "prune {w}/model {o} --method minitron-depth --ratio .05 --calibration text:{w}/text.txt",
            "possible: 0.25, 0.5, 0.75",
        ),
        ("prune {w}/none {o} --method wanda --ratio .5 --calibration text:{w}/text.txt", "no such directory"),
        ("prune {w}/model {w}/model --method wanda --ratio .5 --calibration text:{w}/text.txt", "already exists"),
        ("prune {w}/model {o} --method wanda --ratoi .5 --calibration text:{w}/text.txt", "--ratio"),
        ("eval {w}/model", "--data"),
        ("eval {w}/model --data text:{w}/text.txt --seqlen 1", "--seqlen"),
        ("eval {w}/model --data text:{w}/text.txt --device tpu", "--device: 'tpu' is unknown"),
        ("inspect {w}/text.txt", "not a directory"),
        ("inspect {w}/model {w}/model", "is one argument too many (see secateur inspect --help)"),
        ("shapes {w}/none", "no such directory"),
        (
            "shapes {w}/model --ratoi .5",
            "--ratoi is not an option; did you mean '--ratio'? (see secateur shapes --help)",
        ),
        ("study run {w}/none.yaml --job 3", "--job is not an option; did you mean '--jobs'? (see secateur study run"),
        ("inspct {w}/model", "did you mean 'inspect'?"),
        ("study run {w}/none.yaml", "no such file"),
        ("study report demo --out {w}/text.txt", "--out: {w}/text.txt is a file; name a folder"),
        ("study report demo smoke --other-out {w}/text.txt", "--other-out: {w}/text.txt is a file; name a folder"),
        ("study rnu x", "did you mean 'run'?"),
    ],
)
def test_bad_input(arguments: str, want: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(world.rglob("*"))
    code = main(arguments.format(w=world, o=tmp_path / "out").split())
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    assert last.startswith("secateur: error: ") and want.format(w=world) in last
    assert sorted(world.rglob("*")) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["eval {m} --data", "prune {m} {o} --method wanda --ratio .5 --calibration"])
def test_a_model_that_transformers_cannot_build(
    verb: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_act": "weird"}))
    assert main([*verb.format(m=model, o=tmp_path / "out").split(), f"text:{world / 'text.txt'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"secateur: error: {model}/config.json: transformers cannot build this model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_calibration_text_shorter_than_a_window(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    options = ["--method", "wanda", "--ratio", "0.5", "--calibration", f"text:{short}", "--seqlen", "64"]
    assert main(["prune", str(world / "model"), str(tmp_path / "new" / "out"), *options]) == 2
    assert "less than one calibration window of 64" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.parametrize(
    "verb", ["demo", "inspect", "shapes", "prune", "eval", "study plan", "study run", "study status", ""]
)
def test_help_explains(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_a_study_file_s_ratio_is_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A target speaks of options; the error of a study file does not."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\ncorpus: {source: stdlib, vocabulary: 300}\n"
        "parent: {tokens: 10k, hidden: 32, ffn: 64, layers: 4, heads: 4, kv_heads: 2}\n"
        "methods: [shortgpt]\nratios: [0.99]\nretrain: {tokens: 1k}\n"
        "recipe: {sequence: 32, tokens_per_step: 64, peak_rate: 2e-3, init_std: 0.04}\n"
    )
    assert main(["study", "plan", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"secateur: error: {file}: methods[0] (shortgpt at 0.99): ratio 0.99: of 4 layers it would keep 0; possible: 0."
    )


@pytest.mark.parametrize(
    "arguments", [("explain", "findings", "typo"), ("run", "findings", "--only", "typo", "--dry-run")]
)
def test_an_unknown_stage_gets_near_names_and_not_the_list(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action, study, *rest = arguments
    assert main(["study", action, study, *rest, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "the nearest of" in message and "`study status` lists all" in message
    assert message.count("\n") == 1 and len(message) < 300


def test_a_file_that_is_missing_gets_a_near_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    assert main(["study", "plan", str(tmp_path / "mine.yml")]) == 2
    assert f"did you mean '{tmp_path / 'mine.yaml'}'?" in capsys.readouterr().err
