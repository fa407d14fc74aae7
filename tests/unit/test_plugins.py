"""Methods of other packages, found as an installed package would be; the example is the one of the documentation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from formulas import fits
from helpers import documented_package, hf, install_package, tiny_llama
from secateur.cli import main
from secateur.errors import UserError
from secateur.methods.registry import METHODS, get_method, known_methods, plugin_methods
from secateur.methods.wanda import Wanda
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.pipeline import make_plan
from secateur.pruning.target import Target

ROOT = Path(__file__).resolve().parents[2]
NAME = "magnitude-sp"


def install(folder: Path, entries: dict[str, str], **modules: str) -> None:
    """Install a package of methods."""
    install_package(folder, "secateur.methods", entries, **modules)
    plugin_methods.cache_clear()


def documented() -> tuple[dict[str, str], str, str]:
    """From docs/write-a-method.md: the entry points, the module's name and its text."""
    return documented_package("write-a-method.md", "secateur.methods")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    plugin_methods.cache_clear()
    monkeypatch.syspath_prepend(folder)
    yield folder
    plugin_methods.cache_clear()


@pytest.mark.slow
def test_the_documented_method_from_the_command_line(tmp_path: Path) -> None:
    entries, module, code = documented()
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (site := tmp_path / "site").mkdir()
    install(site, entries, **{module: code})
    model, out = tiny_llama(tmp_path), tmp_path / "out"
    command = ["prune", str(model), str(out), "--method", NAME, "--shape", "kv_heads=1,ffn=30", "--option", "power=1"]
    done = subprocess.run(
        [sys.executable, "-m", "secateur", *command, "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(site)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, plan = json.loads(done.stdout), json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert answer["method"] == NAME and answer["asked"]["options"] == {"power": 1.0}
    assert plan["calibration"] == {"source": None, "method_source": "the magnitude baseline of arXiv:2312.11983"}
    before, after = hf(model), hf(out)
    assert (after.config.num_key_value_heads, after.config.intermediate_size) == (1, 30)
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        scores = old.mlp.down_proj.weight.detach().double().abs().sum(dim=0)
        kept = scores.argsort(descending=True)[:30].sort().values
        fits(kept.tolist(), scores.tolist())
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, kept])
        heads = old.self_attn.o_proj.weight.detach().double().abs().sum(dim=0).reshape(2, 16).sum(dim=1)
        first = 16 * int(heads.argmax())
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[:, first : first + 16])


def test_it_is_known_by_its_name(site: Path, tmp_path: Path) -> None:
    entries, module, code = documented()
    install(site, entries, **{module: code})
    assert known_methods() == [*METHODS, NAME]
    plan = make_plan(Checkpoint(tiny_llama(tmp_path)), NAME, Target(ratio=0.4), None)
    assert plan.method == NAME and plan.calibration["source"] is None
    with pytest.raises(UserError, match="did you mean 'magnitude-sp'"):
        get_method("magnitude-s")
    with pytest.raises(UserError, match="did you mean 'power'"):
        get_method(NAME, {"powr": 1})


NO_CLASS = "which is no subclass of LayerMethod, RemovalMethod, WidthMethod, WeightMethod, LearnedMethod"
BROKEN = {
    "import no_such_module_anywhere": "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    "raise RuntimeError('two\\nlines')": "RuntimeError: two lines",
    "": "AttributeError: module 'broken' has no attribute 'It'",
    "It = 3": f"names 3, {NO_CLASS}",
    "class It: pass": NO_CLASS,
    "from secateur.methods import Method as It": NO_CLASS,
}
HEAD = """
from secateur.calibration.statistics import Mean, MeanGradient
from secateur.methods.base import LayerMethod, WeightMethod, WidthMethod
from secateur.config import spec
"""
#: decorator, base and body of a class that has a score -> what is wrong with it
INCOMPLETE = {
    ("", "LayerMethod", "source = 'x'"): "which is not decorated with secateur.config.spec",
    ("@spec", "WeightMethod", "pass"): "which does not define compare, source",
    ("@spec", "WidthMethod", "source = 'x'; score = WidthMethod.score"): "which does not define score",
    ("@spec", "WidthMethod", "source = 'x'; needs = (Mean, MeanGradient)"): (
        "which needs Mean and MeanGradient, but a WidthMethod can need kinds of Statistic or of GradientStatistic"
    ),
    ("@spec", "LayerMethod", "source = 'x'; needs = (Mean,)"): (
        "which needs Mean, but a LayerMethod can need kinds of StateStatistic or of GradientStatistic"
    ),
}
for (decorator, base, body), wrong in INCOMPLETE.items():
    BROKEN[f"{HEAD}\n{decorator}\nclass It({base}):\n    def score(self, *_): ...\n    {body}\n"] = wrong


@pytest.mark.parametrize("code", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_package_is_told_in_one_line(code: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install(site, {"broken": "broken:It"}, broken=code)
    with pytest.raises(UserError) as told:
        get_method("broken")
    assert BROKEN[code] in str(told.value) and str(told.value).startswith("broken: ") and "\n" not in str(told.value)
    monkeypatch.delitem(sys.modules, "broken", raising=False)


def test_a_broken_package_is_in_nobody_s_way(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, {"broken": "broken:It"}, broken="raise ImportError")
    assert isinstance(get_method("wanda"), Wanda)
    assert "broken" in known_methods()
    assert "\n  of installed packages\n    broken  (broken:It)\n\nmagnitude and the random controls " in shown(capsys)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    return capsys.readouterr().out


def test_help_lists_the_methods_of_packages(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "of installed packages" not in shown(capsys)
    install(site, {"mine": "it:Mine", "also-mine": "it:AlsoMine", "wanda": "it:Other"}, it="raise ImportError")
    lines = "\n  of installed packages\n    also-mine  (it:AlsoMine)\n    mine  (it:Mine)\n\n"
    assert f"{lines}magnitude and the random controls " in shown(capsys)


def test_an_announcement_that_cannot_be_read(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, {})
    (site / "example-1.0.dist-info" / "entry_points.txt").write_text("[secateur.methods]\nno equals sign\n")
    part = "the entry points of an installed package cannot be read: "
    assert f"\n  of installed packages\n    {part}" in shown(capsys)
    assert isinstance(get_method("wanda"), Wanda)
    with pytest.raises(UserError, match=part):
        get_method("mine")


def test_built_in_names_cannot_be_taken(site: Path) -> None:
    install(site, {"wanda": "other:Mine"}, other="raise AssertionError('is not even looked at')")
    assert known_methods() == list(METHODS)
    assert isinstance(get_method("wanda"), Wanda)
