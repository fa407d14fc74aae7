"""``secateur recommend``: from published figures, and from a study's own runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from secateur.cli import main, manual
from secateur.forecast import fit
from secateur.study.spec import load_study

ASK = ["recommend", "--params", "8B", "--ratio", "0.5", "--tokens", "50B"]
TRAIN = ["--parent", "must-train", "--parent-tokens", "200B"]
HEAD = "name,method,granularity,seed,ratio,ratio_total,parameters,train_tokens,loss"


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is no interval."""
    monkeypatch.setitem(fit.fit_pair.__kwdefaults__, "draws", 20)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def study(folder: Path, rows: list[str], head: str = HEAD) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cells.csv").write_text("\n".join([head, *rows]) + "\n")
    (folder / "curves.csv").write_text("name,method,ratio,seed,tokens,loss\nparent,,,,0,6.0\nparent,,,,4000,3.0\n")
    return folder


ROWS = [
    f"{name},{method},{kind},0,0.5,{gone},{parameters},{tokens},{loss}"
    for method, kind, gone, parameters in (("shortgpt", "depth", 0.4, 60), ("wanda", "sparse", 0.4, 100))
    for name, tokens, loss in (("P-R", 1000, 4.0), ("S_R", 1000, 4.4), ("S_{P+R}", 5000, 3.8), ("redrawn", 1000, 4.5))
]


def test_the_published_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """At equal training tokens pruning is ahead, at equal total tokens scratch is for depth: as was published."""
    found = run(capsys, *ASK, *TRAIN)
    depth, width = found["cases"]
    assert (depth["method"], width["method"]) == ("minitron-depth", "minitron-width")
    training, total, flops = depth["accounts"]
    assert training["winner"] == "pruned" and training["difference"]["value"] == pytest.approx(0.14, abs=0.03)
    assert total["scratch_tokens"] == 250e9 and total["winner"] == "scratch"
    assert flops["scratch_tokens"] == pytest.approx(50e9 + 200e9 * 2)
    assert found["recommendation"]["decided_by"] == "total"
    assert found["recommendation"]["choice"] == "depends on the method"
    assert [d["outside"] for d in depth["distances"]] == [False] * 5


def test_a_parent_that_is_there_is_sunk(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, *ASK)
    assert found["recommendation"]["choice"] == "prune" and found["recommendation"]["decided_by"] == "training"
    assert [a["name"] for a in found["cases"][0]["accounts"]] == ["training"]
    terms = {row["name"]: row["flops"] for row in found["costs"]["terms"]}
    assert terms["of it, sunk"] == 0 and terms["parent's training"] is None  # its tokens are not known
    assert terms["retraining"] == 6 * 4e9 * 50e9


def test_what_children_share_and_money(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run(capsys, *ASK, *TRAIN, "--granularity", "width")
    price = ["--cost-per-hour", "2", "--flops-per-second", "1e15"]
    four = run(capsys, *ASK, *TRAIN, "--granularity", "width", "--children", "4", *price)
    assert (alone["costs"]["account"], four["costs"]["account"]) == ("charged", "shared")
    assert four["cases"][0]["accounts"][1]["scratch_tokens"] == 100e9
    pruned, *scratch = four["costs"]["paths"]
    assert pruned["flops"] == pytest.approx(6 * (8e9 * 50e9 + 4e9 * 50e9) + 2 * 8e9 * 128 * 2048)
    assert pruned["money"] == pytest.approx(pruned["flops"] / 1e15 / 3600 * 2)
    assert [row["tokens"] for row in scratch] == pytest.approx([50e9, 100e9, 150e9])
    assert alone["costs"]["paths"][0]["money"] is None


def test_extrapolation_is_said_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--params", "1B", "--ratio", "0.8", "--tokens", "500B", "--granularity", "depth"]) == 0
    text = capsys.readouterr().out
    assert "CANNOT BE TOLD (outside of what was run: see the distances)" in text
    assert "minitron-depth: beyond what these runs can tell" in " ".join(text.lower().split())
    assert re.search(r"parameters of the parent +asked +1e\+09 +run +8\.03e\+09 +/8", text)
    assert re.search(r"ratio +asked +0\.8 +run +0\.5 +x1\.6", text)
    assert re.search(r"retraining, tokens a parameter +asked +2\.5e\+03 +run +2\.61 to 131 +x19", text)
    assert max(map(len, text.splitlines())) <= 100


def test_curves_of_another_size_are_read_at_equal_tokens_a_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    own = run(
        capsys, "recommend", "--params", "8.03B", "--ratio", "0.5", "--tokens", "50B", "--method", "minitron-width"
    )
    tenth = run(
        capsys, "recommend", "--params", "803M", "--ratio", "0.5", "--tokens", "5B", "--method", "minitron-width"
    )
    assert tenth["cases"][0]["scale"] == pytest.approx(0.1)
    (a,), (b,) = own["cases"][0]["accounts"], tenth["cases"][0]["accounts"]
    assert a["difference"]["value"] == pytest.approx(b["difference"]["value"])
    assert a["crossover"]["low"] == pytest.approx(10 * b["crossover"]["low"])


def test_sparse_methods_have_no_published_losses(capsys: pytest.CaptureFixture[str]) -> None:
    have = run(capsys, *ASK, "--granularity", "sparse")
    train = run(capsys, *ASK, *TRAIN, "--method", "sparsegpt")
    assert have["cases"] == [] and have["recommendation"]["choice"] == "prune"
    assert train["recommendation"]["choice"] == "cannot be told" and "no losses" in train["recommendation"]["why"]
    assert {a["method"] for a in train["evidence"]["accuracies"]} == {"sparsegpt", "sparsegpt 2:4"}
    assert train["question"]["target_parameters"] == 8e9  # zeros are multiplied like any weight


def test_a_study_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, ROWS[0], "S_R,shortgpt,depth,1,0.5,0.4,60,1000,"]  # one twice, as for two comparisons; one failed
    folder = study(tmp_path / "s", rows)
    found = run(capsys, "recommend", "--params", "100", "--ratio", "0.5", "--tokens", "2000", "--study", str(folder))
    evidence = found["evidence"]
    assert (evidence["runs"], evidence["runs_without_a_loss"]) == (6, 1)
    assert (evidence["parent_parameters"], evidence["parent_tokens"], evidence["parent_loss"]) == (100, 4000, 3.0)
    depth, sparse = found["cases"]
    assert depth["budgets"] == {"scratch": [1000, 5000], "pruned": [1000]}
    assert depth["distances"][2]["factor"] == 2 and sparse["scale"] == 1
    assert len(depth["next_runs"]) == 3


def test_a_method_without_enough_runs_is_told_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path / "s", ROWS[:6])  # of wanda, P-R and S_R alone
    ask = ["recommend", "--params", "100", "--ratio", "0.5", "--tokens", "2000", "--study", str(folder)]
    found = run(capsys, *ask)
    assert [case["method"] for case in found["cases"]] == ["shortgpt"]
    assert found["not_fitted"] == [
        "wanda at ratio 0.5: two finished runs tell no curve; run one of the paths at another budget as well"
    ]
    assert main([*ask, "--method", "wanda"]) == 2
    assert "two finished runs tell no curve" in capsys.readouterr().err


def test_a_pilot_is_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the question's proportions: ratio, tokens for each parameter, R beside P."""
    file = tmp_path / "pilot.yaml"
    found = run(capsys, *ASK, *TRAIN, "--granularity", "depth", "--pilot", str(file))
    pilot = load_study(file)
    assert (
        found["pilot"]["file"] == str(file)
        and [entry.method for entry in pilot.methods] == ["minitron-depth"]
        and pilot.ratios == (0.5,)
    )
    assert pilot.parent and pilot.parent.tokens and len(pilot.retrain.tokens) == 3
    assert pilot.parent.tokens / pilot.retrain.tokens[-1] == pytest.approx(4, rel=0.01)
    shape = pilot.parent.shape(pilot.corpus.vocabulary)
    asked = 250e9 / 8e9
    assert (pilot.parent.tokens + pilot.retrain.tokens[-1]) / shape.non_embedding == pytest.approx(asked, rel=0.02)
    assert main(["study", "plan", str(file)]) == 0
    assert main([*ASK, "--pilot", str(file)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_pilot_like_one_s_own_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps corpus, parent and recipe, and takes the budget that would tell most."""
    own = Path(__file__).parents[2] / "studies" / "smoke.yaml"
    file, folder = tmp_path / "next.yaml", study(tmp_path / "s", ROWS)
    ask = ["recommend", "--params", "100", "--ratio", "0.5", "--tokens", "2000", "--study", str(folder)]
    found = run(capsys, *ask, "--method", "shortgpt", "--like", str(own), "--pilot", str(file))
    mine, pilot = load_study(own), load_study(file)
    assert (pilot.corpus, pilot.parent, pilot.recipe) == (mine.corpus, mine.parent, mine.recipe)
    assert pilot.retrain.tokens[0] == found["cases"][0]["next_runs"][0]["tokens"]
    assert pilot.retrain.peak_rate == mine.retrain.peak_rate


def test_a_config_gives_exact_flops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_shapes_verb import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    ask = ["recommend", "--model", str(tmp_path), "--ratio", "0.5", "--tokens", "50B", *TRAIN, "--granularity", "depth"]
    found = run(capsys, *ask)
    assert found["question"]["parameters"] == 8_030_261_248
    block = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert found["question"]["target_parameters"] == 8_030_261_248 - 16 * (block + 2 * 4096)
    linears = 16 * block + 128_256 * 4096
    a_token = 6 * linears + 12 * 16 * 4096 * (2048 + 1) / 2
    assert {row["name"]: row["flops"] for row in found["costs"]["terms"]}["retraining"] == pytest.approx(a_token * 50e9)
    terms, flops = found["costs"]["terms"], found["cases"][0]["accounts"][2]
    assert flops["scratch_tokens"] == pytest.approx(50e9 + terms[0]["flops"] / a_token)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (["--parent", "must-train"], "needs its tokens: --parent-tokens"),
        (["--children", "3"], "which is sunk unless --parent is must-train"),
        (["--method", "minitron-dept"], "did you mean 'minitron-depth'?"),
        (["--method", "wanda", "--granularity", "width"], "wanda is of granularity sparse, not width"),
        (["--cost-per-hour", "2"], "--flops-per-second: is missing"),
        (["--noise", "0"], "'0' is not a number above zero"),
        (["--like", "x.yaml"], "--like: goes with --pilot"),
        (["--study", "no/such"], "no such file; --study takes a folder"),
        (["--model", "x"], "not allowed with argument"),
        (["--granularity", "layers"], "'layers' is not known"),
        (["--pilot", "p.yaml", "--like", "no.yaml"], "no.yaml"),
    ],
)
def test_bad_input(change: list[str], want: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, *change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("secateur: error: ") and want in error


@pytest.mark.parametrize(
    ("rows", "head", "want"),
    [
        ([], HEAD, "none of its runs has a held-out loss"),
        (["P-R,x,depth,0,0.5,0.4,60,1000,much"], HEAD, "line 2: loss is 'much', not a number"),
        ([*ROWS[:4], ROWS[0].replace("4.0", "4.1")], HEAD, "two pruned runs of 1000 tokens have seed 0; keep one"),
        ([ROWS[0], ROWS[1].replace(",60,", ",90,")], HEAD, "parents of different sizes"),
        (ROWS, HEAD.replace("ratio_total", "rato_total"), "has no column 'ratio_total'; did you mean 'rato_total'?"),
    ],
)
def test_folders_that_hold_no_study(
    rows: list[str], head: str, want: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path / "s", rows, head)
    assert main(["recommend", "--params", "100", "--ratio", "0.5", "--tokens", "2k", "--study", str(folder)]) == 2
    assert want in capsys.readouterr().err


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["recommend", "--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and "equal training tokens" in told and "examples:" in told


def test_the_examples_of_the_manual_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_shapes_verb import LLAMA_8B

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "runs").mkdir()
    study(tmp_path / "runs" / "mine", ROWS)
    (tmp_path / "mine.yaml").write_text((Path(__file__).parents[2] / "studies" / "smoke.yaml").read_text())
    examples = re.findall(r"^  secateur (recommend .*)$", manual.RECOMMEND_EPILOG, re.MULTILINE)
    assert len(examples) == 8
    for example in examples:
        assert main(example.split()) == 0, example
        assert "cost" in capsys.readouterr().out
    assert load_study(Path("pilot.yaml")) and load_study(Path("next.yaml"))


def test_a_pattern_is_a_case_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs at 2:4 and at a ratio of 0.5 have the same ratio, method, budget and seed, and are other curves."""
    rows = [
        f"{name},sparsegpt,sparse,0,0.5,0.4,100,{tokens},{loss + worse},{target}"
        for target, worse in (("0.5", 0.0), ("2:4", 0.3))
        for name, tokens, loss in (("P-R", 1000, 4.0), ("S_R", 1000, 4.4), ("S_{P+R}", 5000, 3.8))
    ]
    folder = study(tmp_path / "run", rows, f"{HEAD},target")
    found = run(capsys, *ASK[:-1], "2000", "--study", str(folder))
    assert [case["method"] for case in found["cases"]] == ["sparsegpt", "sparsegpt 2:4"]
    assert found["cases"][1]["pruned_loss"]["value"] > found["cases"][0]["pruned_loss"]["value"] + 0.1
