"""The Python API: what the command line writes, typed; live models; errors that name the field."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from family_configs import FAMILIES
from helpers import hf, tiny_family, token_corpus, windows
from secateur.cli import main
from secateur.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
IDS = windows(8, 16)
#: (method, request), one for each kind of method
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("shortgpt", {"ratio": 0.4}),
    ("minitron-depth", {"ratio": 0.4}),
    ("minitron-width", {"ratio": 0.4}),
    ("flap", {"ratio": 0.4}),
    ("wanda", {"ratio": 0.5}),
    ("sparsegpt", {"pattern": "2:4"}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    tiny_family(folder, "llama")
    token_corpus(folder / "corpus", tokens=6000, vocabulary=61)
    return folder


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("method", "fields"), KINDS)
def test_a_live_model_is_pruned_as_its_directory_is(
    method: str, fields: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    family = FAMILIES[[kind[0] for kind in KINDS].index(method)]
    directory = tiny_family(tmp_path, family)
    written = secateur.prune(directory, tmp_path / "out", method=method, calibration=IDS, **fields)
    live = hf(directory)
    before, trained = tensors(live), live.training
    cut = secateur.prune(live, method=method, calibration=IDS, **fields)
    assert equal(tensors(live), before) and live.training == trained  # left as it was
    reopened = hf(written.path)
    assert equal(tensors(cut), tensors(reopened))
    assert torch.equal(cut(IDS).logits, reopened(IDS).logits)
    assert cut.masks.keys() == written.plan.masks.keys()
    assert all(torch.equal(cut.masks[name], written.plan.masks[name]) for name in cut.masks)
    assert cut.plan.after == written.shape and cut.report["ratio"]["total"] == written.removed["total"]
    cut.save_pretrained(tmp_path / "saved")
    assert equal(tensors(hf(tmp_path / "saved")), tensors(reopened))
    again = secateur.prune(live, tmp_path / "again", method=method, calibration=IDS, **fields)
    assert (again.path / "model.safetensors").read_bytes() == (written.path / "model.safetensors").read_bytes()


def test_a_live_model_in_bfloat16_keeps_its_type(root: Path) -> None:
    live = hf(root / "llama-0").to(torch.bfloat16)
    cut = secateur.prune(live, method="wanda", ratio=0.5, calibration=IDS)
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16} == {cut.config.dtype}


def test_results_are_what_the_command_line_prints(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    np.save(tmp_path / "ids.npy", IDS.numpy())
    source = f"tokens:{tmp_path}/ids.npy"
    pruned = secateur.prune(root / "llama-0", tmp_path / "a", method="wanda", ratio=0.5, calibration=source)
    line = ["prune", root / "llama-0", tmp_path / "b", "--method", "wanda", "--ratio", "0.5", "--calibration", source]
    capsys.readouterr()
    assert main([*map(str, line), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert pruned.record() == {k: v for k, v in answer.items() if k != "used"} | {"out": str(tmp_path / "a")}
    assert pruned.path == tmp_path / "a" and pruned.fingerprint == answer["plan"]
    assert pruned.removed["block_weights"] == 0.5 and pruned.shape.layers == 5
    assert secateur.inspect(pruned).sparsity == pytest.approx(0.5, abs=0.01)
    assert secateur.shapes(root / "llama-0", ratio=0.5).record()["targets"].keys() == {"depth", "width", "heads"}


def test_train_evaluate_and_compare(root: Path, tmp_path: Path) -> None:
    data, recipe = f"shards:{root}/corpus", secateur.Recipe(sequence=32, tokens_per_step=256, peak_rate=3e-3)
    several = secateur.prune(root / "llama-0", tmp_path / "p", method="magnitude", ratio=[0.3, 0.5])
    assert [result.path.name for result in several] == ["ratio-0.3", "ratio-0.5"]
    trained = secateur.train(
        tmp_path / "t", init=several[1], tokens="1.5k", data=data, recipe=recipe, teacher=root / "llama-0", points=2
    )
    assert trained.result["tokens"] == 1500 and trained.heldout_loss == trained.curve[-1]["loss"]
    assert os.fspath(trained) == str(tmp_path / "t")
    results = secateur.evaluate([several[1], trained], data=data, seqlen=32, suite=["cost"], out=tmp_path / "r")
    assert all(result.cost for result in results)
    comparisons = secateur.compare(*results)
    assert comparisons.verdict == "B" and [c.name for c in comparisons] == ["loss"]
    from_files = secateur.compare(tmp_path / "r" / "ratio-0.5.json", [tmp_path / "r" / "t.json"])
    assert from_files.verdict == "B"


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a tokenizer, text for it, and a small study."""
    folder = tmp_path_factory.mktemp("lettered")
    text = "".join(f"{number} foxes jump over {number * 7 % 89} lazy dogs. " for number in range(3000))
    (folder / "text").mkdir()
    for part in range(60):
        (folder / "text" / f"{part}.txt").write_text(text[part * 800 : (part + 1) * 800])
    (folder / "text.txt").write_text(text)
    model = tiny_family(folder, "llama", vocab_size=300, max_position_embeddings=128)
    train_tokenizer(iter([text]), 300).save_pretrained(model)
    (folder / "study.yaml").write_text(
        "name: small\n"
        f"corpus: {{source: 'text:{folder}/text', vocabulary: 300, holdout: 0.2}}\n"
        "parent: {tokens: 4k, hidden: 16, ffn: 48, layers: 4, heads: 4, kv_heads: 2}\n"
        "methods: [wanda]\nratios: [0.5]\nretrain: {tokens: 1k}\nsettings: [equal_training_tokens]\n"
        "calibration: {windows: 4}\nevaluation: {windows: 8, points: 2}\n"
        "recipe: {sequence: 32, tokens_per_step: 256, peak_rate: 3e-3}\n"
    )
    return folder


def test_texts_are_calibrated_on_with_the_models_tokenizer(lettered: Path, tmp_path: Path) -> None:
    texts = [(lettered / "text" / f"{part}.txt").read_text() for part in range(4)]
    model = lettered / "llama-0"
    fields: dict[str, Any] = {"method": "wanda", "ratio": 0.5, "seqlen": 16, "windows": 4}
    live = secateur.prune(hf(model), calibration=iter(texts), tokenizer=model, **fields)
    written = secateur.prune(model, tmp_path / "out", calibration=texts, **fields)
    sizes: dict[str, Any] = {"shape": {"ffn": 32}, "seqlen": 16, "windows": 8, "calibration": texts, "tokenizer": model}
    steps = {"steps": 120, "windows": 4, "phi": 1000.0, "multiplier_rate": 300.0}
    learned = secateur.prune(hf(model), tmp_path / "learned", method="sheared", options=steps, **sizes)
    assert learned.shape.ffn == 32 and (learned.path / "tokenizer.json").is_file()  # the tokenizer goes with the model
    with pytest.raises(secateur.UserError, match="must be str"):
        secateur.prune(hf(model), calibration=[[1, 2]], tokenizer=model, **fields)
    assert live.report["calibration"]["source"] == "texts" == written.calibration["source"]
    assert live.report["calibration"]["hash"] == written.calibration["hash"]
    assert equal(tensors(live), tensors(hf(written.path)))


@pytest.mark.parametrize(
    ("fields", "field", "part"),
    [
        ({"ratio": 1.5}, "ratio", "between 0 and 1, got 1.5"),
        ({"ratio": [0.5, 0.5]}, "ratio", "twice"),
        ({"ratio": [0.5, "50%"]}, "ratio", "twice"),
        ({"ratio": 50}, "ratio", "such as 0.5 or 50% (got 50)"),
        ({"sparsity": 0.5}, "sparsity", "did you mean 'ratio'?"),
        ({"ratio": 0.5, "calibration": None}, "calibration", "name a source"),
        ({"ratio": 0.5, "windows": 0}, "windows", "greater than 0"),
        ({"ratio": 0.5, "options": {"a": 1}}, "options", "has no option 'a'"),
        ({"ratio": 0.5, "pattern": "2:3:4"}, "pattern", "2:3:4"),
        ({"ratio": 0.5, "axes": "ffn"}, "axes", "prunes no channels"),
        ({"ratio": 0.5, "calibration": IDS + 60}, "calibration", "the model's vocabulary is 61"),
        ({"ratio": 0.5, "calibration": IDS[0]}, "calibration", "[windows, positions]"),
        ({"ratio": 0.5, "model": "live", "calibration": ["text"]}, "tokenizer", "names none"),
        ({"ratio": []}, "ratio", "is empty"),
        ({"ratios": 0.5}, "ratios", "did you mean 'ratios_by_layer', 'ratio'"),
        ({"ratio": 0.5, "calibration": Path("x")}, "calibration", "is no source"),
        ({"ratio": 0.5, "calibration": "text:/nope"}, "calibration", "/nope"),
        ({"ratio": 0.5, "model": 5}, "model", "not int"),
        ({"ratio": 0.5, "out": 5}, "out", "should be a path"),
        ({"ratio": 0.5, "device": "tpu"}, None, "tpu"),
        ({"ratio": 0.5, "method": "wnda"}, None, "did you mean 'wanda'?"),
        ({"ratio": 0.5, "method": "sheared"}, "out", "needs a directory"),
    ],
)
def test_bad_requests_name_the_field(fields: dict[str, Any], field: str | None, part: str, root: Path) -> None:
    with pytest.raises(secateur.UserError) as error:
        model: Any = root / "llama-0"
        if fields.get("model") == "live":
            model = hf(model)
            model.name_or_path = ""
        if isinstance(fields.get("model"), int):
            model = fields["model"]
        request = {"method": "wanda", "calibration": IDS, **fields, "model": model}
        secateur.prune(**request)
    assert part in str(error.value) and "--" not in str(error.value)
    assert field is None or error.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"init": "scratch"}, "init"),
        ({"tokens": 0}, "tokens"),
        ({"alpha": 0.5}, "alpha"),
        ({"recipe": {"peak_rat": 1}}, None),
        ({"data": "text:x"}, "data"),
    ],
)
def test_bad_training_requests(fields: dict[str, Any], field: str | None, root: Path, tmp_path: Path) -> None:
    request = {"init": root / "llama-0", "tokens": 100, "data": f"shards:{root}/corpus", **fields}
    with pytest.raises(secateur.UserError) as error:
        secateur.train(tmp_path / "t", **request)
    assert field is None or error.value.field == field
    assert not (tmp_path / "t").exists()


def test_the_api_is_listed_and_imported_late() -> None:
    assert set(secateur.__all__) <= set(dir(secateur))
    assert all(getattr(secateur, name) is not None for name in secateur.__all__)
    code = (
        "import sys, secateur; print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="prun"):
        _ = secateur.prun


def test_no_message_below_the_command_line_names_a_flag() -> None:
    others = ("--nproc-per-node", "--error", "--no-", "--find-links", "--force-reinstall")  # of other programs
    for path in (ROOT / "src" / "secateur").rglob("*.py"):
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " --" in f" {node.value}":
                flags = [word for word in f" {node.value}".split() if word.startswith("--") and word.strip("-,.")]
                flags = [flag for flag in flags if not flag.startswith(others)]
                assert not flags or _is_docstring(node, path) or path.name in FOREIGN, (path, node.value)


#: modules that start other programs, or secateur itself as one
FOREIGN = {"torchrun.py", "slurm.py", "slurm_job.py", "local.py", "worker.py", "style.css"}


def _is_docstring(node: ast.Constant, path: Path) -> bool:
    tree = ast.parse(path.read_text())
    bodies = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return any(ast.get_docstring(body, clean=False) == node.value for body in bodies)


EXAMPLES = {
    "choose": ("{m}",),
    "prune": ("{m}", "{f}/text.txt", "out"),
    "retrain": ("{m}", "{f}/text", "out"),
    "study": ("{f}/study.yaml", "out"),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(
    name: str, lettered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(m=lettered / "llama-0", f=lettered) for text in EXAMPLES[name]]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 2
