"""The registry, and the rules that keep a method a formula."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import secateur
from helpers import SCORED, calibration, hf, tiny_llama, windows
from secateur.errors import UserError
from secateur.methods.base import ExpertMethod, LayerMethod, LearnedMethod, RemovalMethod, WeightMethod, WidthMethod
from secateur.methods.registry import METHODS, get_method
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target

SOURCE = Path(secateur.__file__).parent
FILES = sorted(
    {SOURCE / "methods" / f"{info.class_path.partition(':')[0].rpartition('.')[2]}.py" for info in METHODS.values()}
)
ENGINE = [
    *sorted((SOURCE / "calibration").glob("*.py")),
    *(SOURCE / f"{n}.py" for n in ("methods/selection", "pruning/scoring", "model/surgery", "model/plan")),
]
#: what a method does not know: how activations are observed, where it runs, what is read, how much is to go
UNKNOWN = (r"register_forward", r"hook", r"device", r"\bcuda\b", r"open\(", r"\bPath\b", r"\bratio\b", r"\bpattern\b")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_method_is_short_and_knows_its_formula_alone(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for word in UNKNOWN:
        assert not re.search(word, text, re.IGNORECASE), word
    allowed = {"secateur.methods.base", "secateur.calibration.statistics", "secateur.config", "secateur.errors"}
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.startswith("secateur")} <= allowed


def test_every_method_is_in_the_registry() -> None:
    shared = {"__init__", "base", "plugins", "registry", "selection"}
    assert {path for path in (SOURCE / "methods").glob("*.py") if path.stem not in shared} == set(FILES)


@pytest.mark.parametrize("file", ENGINE, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_engine_knows_no_method_by_name(file: Path) -> None:
    text = file.read_text(encoding="utf-8").lower()
    classes = {info.class_path.partition(":")[2] for info in METHODS.values()}
    names = {*METHODS, *(name.replace("-", "_") for name in METHODS), *(c.lower() for c in classes)} - {"magnitude"}
    for name in (*names, "minitron", "shortened", "pruner", "magnitude pruning"):
        assert not re.search(rf"(?<![a-z]){name}(?![a-z])", text), name


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_itself(name: str) -> None:
    method = get_method(name)
    kinds = {LayerMethod: "depth", RemovalMethod: "depth", WidthMethod: "width", WeightMethod: "sparse"}
    kinds |= {LearnedMethod: "depth+width", ExpertMethod: "experts"}
    assert [g for kind, g in kinds.items() if isinstance(method, kind)] == [method.granularity]
    assert method.source.startswith(("arXiv:", "ICLR", "a baseline")) or (
        name.startswith("random-") and "control" in method.source
    )
    assert method.calibrated or not method.needs
    assert (inspect.getdoc(type(method)) or "").strip()
    if isinstance(method, WidthMethod):
        assert set(method.axes) <= set(method.scores) <= {"hidden", "ffn", "kv", "expert_ffn"}
    if isinstance(method, LearnedMethod):
        assert set(method.axes) <= set(method.scores) <= {"layers", "hidden", "ffn", "kv"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.source = "other"


@pytest.mark.parametrize("name", METHODS)
def test_a_row_agrees_with_its_class(name: str) -> None:
    info, method = METHODS[name], get_method(name)
    assert info.granularity == method.granularity
    assert method.source.startswith(f"arXiv:{info.source}" if info.source else ("a control", "a baseline", "ICLR"))
    assert [(o.name, o.default) for o in info.options] == [(f.name, f.default) for f in dataclasses.fields(method)]
    hints = get_type_hints(type(method))
    for option in info.options:
        assert option.choices == (get_args(hints[option.name]) if get_origin(hints[option.name]) is Literal else ())
        assert get_method(name, {option.name: option.usage.partition("=")[2].partition("|")[0]})


def test_the_registry_lists_the_methods() -> None:
    """Sixteen published methods, each with its paper in the documentation; controls and baselines."""
    assert len(METHODS) == 22 and [name for name, info in METHODS.items() if not info.source] == [
        "random-depth",
        "random-width",
        "ria",  # of a conference
        "random-weight",
        "expert-frequency",
        "expert-activation",
        "random-expert",
    ]
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, info in METHODS.items():
        row = next(row for row in rows if f"`{name}`" in row.split("|")[1])
        assert info.source in row and row.count(f"arxiv.org/abs/{info.source})") == bool(info.source)


def test_unknown_methods_and_options() -> None:
    with pytest.raises(UserError, match="did you mean 'wanda'"):
        get_method("wnada")
    with pytest.raises(UserError, match=r"^`options`: sparsegpt has no option .blok. .* did you mean 'block'"):
        get_method("sparsegpt", {"blok": "64"})
    with pytest.raises(UserError, match="did you mean 'mixed'"):
        get_method("llm-pruner", {"order": "mixd"})
    for value in ("0", "-3", "half", "1.5", "[", "null"):
        with pytest.raises(UserError, match="block: should be"):
            get_method("sparsegpt", {"block": value})
    for value in ("0", "-0.1", "much", "["):
        with pytest.raises(UserError, match="damping: should be"):
            get_method("sparsegpt", {"damping": value})
    assert get_method("sparsegpt", {"block": "64", "damping": "1e-3"}).damping == 0.001


@pytest.mark.parametrize(
    ("method", "ratio", "part"), [("minitron-depth", 0.05, "possible: 0.2"), ("minitron-width", 0.001, "too small")]
)
def test_impossible_ratios_are_told_before_scoring(method: str, ratio: float, part: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_llama(tmp_path))
    with pytest.raises(UserError, match=part):
        make_plan(checkpoint, method, Target(ratio=ratio), calibration(windows()))


@pytest.mark.parametrize("method", [name for name in SCORED if get_method(name).calibrated])
def test_text_is_asked_for(method: str, tmp_path: Path) -> None:
    target = Target(ratio=0.4)
    with pytest.raises(UserError, match=f"`calibration`: {method} is scored on text"):
        make_plan(Checkpoint(tiny_llama(tmp_path)), method, target, None)


def test_blank_weights_are_pruned_by_index(tmp_path: Path) -> None:
    """All scores are equal, so ties decide: of equal weights the first go, of equal channels the first stay."""
    model = hf(directory := tiny_llama(tmp_path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if "layers" in name and "norm" not in name else 1.0)
    model.save_pretrained(directory)
    for method in ("minitron-width", "wanda-sp", "flap", "llm-pruner"):
        target = Target(sizes={"ffn": 30})
        plan = make_plan(Checkpoint(directory), method, target, calibration(windows()))
        assert all(kept.tolist() == list(range(30)) for kept in plan.keep_ffn.values()), method
    for method in ("wanda", "magnitude", "sparsegpt"):
        plan = make_plan(Checkpoint(directory), method, Target(ratio=0.4), calibration(windows()))
        for mask in plan.masks.values():
            flat = mask if method == "wanda" else mask.reshape(1, -1)
            prune = int(0.4 * flat.shape[1])
            assert not flat[:, :prune].any() and flat[:, prune:].all(), method


@pytest.mark.parametrize("method", ["llm-pruner", "shortened-llama", "flap"])
def test_scores_that_are_not_finite_are_told(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(get_method(method))
    monkeypatch.setattr(kind, "score", lambda _self, place: torch.full((place.units,), torch.nan).squeeze())
    target = Target(sizes={"layers": 4} if method == "shortened-llama" else {"ffn": 30})
    with pytest.raises(UserError, match=r"the scores of (ffn\.\d|layers) are NaN or infinite"):
        make_plan(Checkpoint(tiny_llama(tmp_path)), method, target, calibration(windows()))
