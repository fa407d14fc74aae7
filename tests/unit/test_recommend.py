"""``secateur recommend``: from published figures, and from a study's own runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for benchmarks/

from benchmarks import questions

from secateur.cli import main, manual
from secateur.forecast import ratio_curves
from secateur.forecast.advice import NEAR
from secateur.forecast.crossover import REACH
from secateur.study.spec import load_study

ASK = ["recommend", "--params", "8B", "--ratio", "0.5", "--tokens", "50B"]
TRAIN = ["--parent", "must-train", "--parent-tokens", "200B"]
HEAD = "name,method,granularity,seed,ratio,ratio_total,parameters,train_tokens,loss"


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is no interval."""
    monkeypatch.setitem(ratio_curves.at_ratio.__kwdefaults__, "draws", 20)


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


def statement(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of an answer, as it is printed."""
    return run(capsys, *arguments)["recommendation"]["statement"].replace("\u00a0", " ")


def ask(size: str = "8B", ratio: float = 0.5, tokens: str = "50B") -> list[str]:
    return ["recommend", "--params", size, "--ratio", str(ratio), "--tokens", tokens]


def test_the_published_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """At equal training tokens pruning is ahead, at equal total tokens scratch is for depth: as was published."""
    answer = run(capsys, *ASK, *TRAIN)
    depth, width = answer["cases"]
    assert (depth["method"], width["method"]) == ("minitron-depth", "minitron-width")
    training, total, flops = depth["accounts"]
    assert training["winner"] == "pruned" and training["difference"]["value"] == pytest.approx(0.14, abs=0.03)
    assert total["scratch_tokens"] == 250e9 and total["difference"]["value"] < 0
    assert flops["scratch_tokens"] == pytest.approx(50e9 + 200e9 * 2)
    assert answer["recommendation"]["decided_by"] == "total" and answer["recommendation"]["basis"] == "curves"
    assert [d["outside"] for d in depth["distances"]] == [False] * 5


def test_a_parent_that_is_there_is_sunk(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *ASK)
    assert answer["recommendation"]["choice"] == "prune" and answer["recommendation"]["decided_by"] == "training"
    assert [a["name"] for a in answer["cases"][0]["accounts"]] == ["training"]
    terms = {row["name"]: row["flops"] for row in answer["costs"]["terms"]}
    assert terms["of it, sunk"] == 0 and terms["parent's training"] is None  # its tokens are not known
    assert terms["retraining"] == 6 * 4e9 * 50e9


def test_what_children_share_and_money(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run(capsys, *ASK, *TRAIN, "--granularity", "width")
    price = ["--cost-per-hour", "2", "--flops-per-second", "1e15", "--currency", "EUR"]
    four = run(capsys, *ASK, *TRAIN, "--granularity", "width", "--children", "4", *price)
    assert (alone["costs"]["account"], four["costs"]["account"]) == ("charged", "shared")
    assert four["cases"][0]["accounts"][1]["scratch_tokens"] == 100e9
    pruned, *scratch = four["costs"]["paths"]
    assert pruned["flops"] == pytest.approx(6 * (8e9 * 50e9 + 4e9 * 50e9) + 2 * 8e9 * 128 * 2048)
    assert pruned["money"] == pytest.approx(pruned["flops"] / 1e15 / 3600 * 2)
    assert [row["tokens"] for row in scratch] == pytest.approx([50e9, 100e9, 150e9])
    assert alone["costs"]["paths"][0]["money"] is None and alone["costs"]["currency"] is None
    assert four["costs"]["currency"] == "EUR"
    assert main([*ASK, *price]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  retraining  ")]
    assert rows and rows[0].endswith("666.67 EUR")


def test_the_currency_is_dollars_unless_named(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *ASK, "--parent-tokens", "15T", "--cost-per-hour", "2", "--flops-per-second", "1e15")
    assert answer["costs"]["currency"] == "USD" and "USD" in answer["recommendation"]["cheapest_pilot"]["sentence"]


@pytest.mark.parametrize(
    ("question", "want"),
    [
        (ask("70B"), "the parent has 70 B parameters, that of the evidence 8.03 B, 8.7 times less"),
        (ask("1B", tokens="10B"), "the parent has 1 B parameters"),
        ([*ask(), "--parent-tokens", "15T"], "the parent has seen 1.9 k tokens a parameter, that of the evidence 26"),
        ([*ask(), "--distill"], "the evidence is of retraining without a teacher"),
        (ask(tokens="100T"), "nothing is read beyond"),
        (ask(ratio=0.8, tokens="5B"), "the finding at ratio 0.8 is of 50 B tokens"),
        ([*ask(ratio=0.3), *TRAIN], "losses are there at ratio 0.5 only, not at 0.3"),
    ],
)
def test_far_questions_get_a_reason_and_a_pilot(
    question: list[str], want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run(capsys, *question)["recommendation"]
    assert answer["choice"] == "cannot be told from these figures" and answer["basis"] == "none"
    assert want in answer["statement"].replace("\u00a0", " ")
    pilot = answer["cheapest_pilot"]
    assert pilot["flops"] > 0 and pilot["hours"] == pytest.approx(pilot["flops"] / 4e14 / 3600)
    assert not {"prune", "train from scratch"} & set(answer["statement"].lower().split(": ")[0].split(", "))


def test_a_control_has_no_pilot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *ASK, "--method", "random-width")["recommendation"]
    assert "random-width is a control" in answer["statement"] and answer["cheapest_pilot"] is None
    assert main([*ASK, "--method", "random-width", "--pilot", str(tmp_path / "pilot.yaml")]) == 2
    assert "is a control" in capsys.readouterr().err and not (tmp_path / "pilot.yaml").exists()


def test_a_pilot_of_a_parent_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Both paths at three budgets, the largest of which reaches the question's."""
    answer = run(capsys, *ask("70B", tokens="100B"))["recommendation"]["cheapest_pilot"]
    assert answer["parent_tokens"] == 0 and answer["budgets"][-1] == pytest.approx(100e9 / REACH)
    assert answer["tokens"] == pytest.approx(2 * sum(answer["budgets"]))
    assert answer["flops"] == pytest.approx(6 * 35e9 * answer["tokens"], rel=0.01)


def test_a_pilot_of_a_parent_to_train_is_near_in_size(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *ask("70B", tokens="100B"), "--parent", "must-train", "--parent-tokens", "2T")
    pilot = answer["recommendation"]["cheapest_pilot"]
    assert pilot["parent_parameters"] * NEAR == 70e9
    assert pilot["parent_tokens"] / pilot["parent_parameters"] == pytest.approx(2e12 / 70e9)
    assert pilot["longer_scratch"] == pytest.approx((2e12 + 100e9) / NEAR / REACH)
    assert pilot["flops"] > 6 * pilot["parent_parameters"] * pilot["parent_tokens"]


def test_nothing_improves_as_more_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    """The order of the answers over ratios, for a parent that is there and for one that must be trained."""
    order = ["prune", "depends on the method", "undecided", "hardly any advantage", "train from scratch"]
    for train in ([], TRAIN):
        answers = [run(capsys, *ask(ratio=r), *train)["recommendation"] for r in (0.3, 0.5, 0.65, 0.8, 0.95)]
        ranks = [order.index(a["choice"]) for a in answers if a["basis"] != "none"]
        assert len(ranks) >= 3 and ranks == sorted(ranks)
    assert [run(capsys, *ask(ratio=r))["recommendation"]["basis"] for r in (0.3, 0.5, 0.65, 0.8)] == [
        "finding", "curves", "finding", "finding"
    ]  # fmt: skip


def test_at_a_high_ratio_the_finding_answers(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *ask(ratio=0.8))
    assert answer["recommendation"]["choice"] == "hardly any advantage" and answer["cases"] == []
    assert "nearly gone at ratio 0.8" in answer["recommendation"]["statement"]
    assert "nothing was run at 0.95" in statement(capsys, *ask(ratio=0.95))
    assert "by inference" in statement(capsys, *ask(ratio=0.8), *TRAIN)


def test_a_method_without_evidence_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    flap, wanda = (statement(capsys, *ASK, "--method", method) for method in ("flap", "wanda"))
    assert flap.startswith("No published figures for flap; the nearest, Minitron-width, says PRUNE: Minitron-width is")
    assert wanda.startswith("No published figures for wanda; the nearest, SparseGPT, says PRUNE: by the published")
    for removes in (["--granularity", "depth+width"], ["--method", "sheared"]):
        answer = statement(capsys, *ASK, *removes)
        assert answer.startswith("No losses were published for depth+width; PRUNE: by the published")
    assert "no curve is so short" in statement(capsys, *ask(tokens="1B"))


def test_unknown_tokens_of_the_parent_are_an_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    unknown, near = run(capsys, *ASK), run(capsys, *ASK, "--parent-tokens", "300B")
    assert unknown["recommendation"]["assumptions"][0].startswith("Assumes a parent that has seen about 26 tokens")
    assert near["recommendation"]["assumptions"] == [] and near["recommendation"]["choice"] == "prune"
    smaller = run(capsys, *ask("3B", tokens="20B"))["recommendation"]["assumptions"]
    assert len(smaller) == 2 and smaller[1].startswith("Read from a parent of 8.03")


def test_findings_come_by_relevance(capsys: pytest.CaptureFixture[str]) -> None:
    depth = run(capsys, *ASK, "--granularity", "depth")["findings"]
    both = run(capsys, *ask(ratio=0.6), "--granularity", "depth+width")["findings"]
    taught = run(capsys, *ASK, "--granularity", "width", "--distill")["findings"]
    assert [name for name, _ in depth[2]["figures"]] == ["50 B from scratch", "pruned", "250 B from scratch"]
    assert "arXiv:2310.06694" in [f["source"] for f in both[:3]]
    assert taught[0]["distilled"] and taught[1]["distilled"]
    assert all(f["source"].startswith("arXiv:") and f["table"] and f["conditions"] and f["tokens"] for f in depth)
    assert depth[-1]["granularities"] == ["experts"]


def test_curves_of_another_size_are_read_at_equal_tokens_a_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    own = run(capsys, *ask("8.03B"), "--method", "minitron-width")
    half = run(capsys, *ask("4.015B", tokens="25B"), "--method", "minitron-width")
    assert half["cases"][0]["scale"] == pytest.approx(0.5)
    (a,), (b,) = own["cases"][0]["accounts"], half["cases"][0]["accounts"]
    assert a["difference"]["value"] == pytest.approx(b["difference"]["value"])


def test_sparse_methods_have_no_published_losses(capsys: pytest.CaptureFixture[str]) -> None:
    have = run(capsys, *ASK, "--granularity", "sparse")
    train = run(capsys, *ASK, *TRAIN, "--method", "sparsegpt")
    assert have["cases"] == [] and have["recommendation"]["choice"] == "prune"
    assert train["recommendation"]["choice"] == "undecided" and "No losses" in train["recommendation"]["statement"]
    assert {a["method"] for a in train["evidence"]["accuracies"]} == {"sparsegpt", "sparsegpt 2:4"}
    assert train["question"]["target_parameters"] == 8e9  # zeros are multiplied like any weight


def test_lines_are_short_and_the_statement_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ask("70B"), "--parent-tokens", "15T"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and text.count("CANNOT BE TOLD") == 1
    assert "PRUNE" not in text and "Cheapest pilot:" in text and "pilot FILE" in text


def test_a_study_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, ROWS[0], "S_R,shortgpt,depth,1,0.5,0.4,60,1000,"]  # one twice, as for two comparisons; one failed
    folder = study(tmp_path / "s", rows)
    answer = run(capsys, *ask("100", tokens="2000"), "--study", str(folder))
    evidence = answer["evidence"]
    assert (evidence["runs"], evidence["runs_without_a_loss"]) == (6, 1)
    assert (evidence["parent_parameters"], evidence["parent_tokens"], evidence["parent_loss"]) == (100, 4000, 3.0)
    depth, sparse = answer["cases"]
    assert depth["budgets"] == {"scratch": [1000, 5000], "pruned": [1000]}
    assert depth["distances"][2]["factor"] == 2 and sparse["scale"] == 1


def test_a_study_is_read_between_its_ratios_and_not_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions.write_study(tmp_path)
    ends = [run(capsys, *ask("2M", r, "20M"), "--study", str(tmp_path))["cases"][0] for r in (0.4, 0.5, 0.6)]
    assert [case["ratios"] for case in ends] == [[0.4], [0.4, 0.6], [0.6]]
    low, middle, high = (case["accounts"][0]["difference"]["value"] for case in ends)
    assert low > middle > high and middle == pytest.approx((low + high) / 2, abs=0.02)
    assert ends[0]["pruned_loss"]["value"] < ends[1]["pruned_loss"]["value"] < ends[2]["pruned_loss"]["value"]
    beyond = run(capsys, *ask("2M", 0.8, "20M"), "--study", str(tmp_path))
    assert beyond["cases"] == [] and beyond["recommendation"]["basis"] == "none"
    assert "ratio 0.8 lies outside of those run, 0.4 to 0.6" in beyond["recommendation"]["statement"]


def ladder(folder: Path, losses: dict[str, tuple[float, ...]]) -> Path:
    """A study of Minitron-width at ratio 0.5 with a run of each path at 1, 2, 4, 8 M tokens."""
    rows = [
        f"{name},minitron-width,width,0,0.5,0.5,500000,{10**6 * 2**place},{loss}"
        for name, path in losses.items()
        for place, loss in enumerate(path)
    ]
    return study(folder, [row.replace("500000,", "1000000,") for row in rows])


def test_the_next_run_has_a_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {"P-R": (0.5, -0.35), "S_R": (0.8, -0.5)}
    folder = ladder(tmp_path / "s", {n: tuple(3.2 + a * m**b for m in (1, 2, 4, 8)) for n, (a, b) in curves.items()})
    price = ["--cost-per-hour", "2", "--flops-per-second", "1e12"]
    answer = run(capsys, *ask("2M", tokens="4M"), "--study", str(folder), *price)
    best = answer["cases"][0]["next_runs"][0]
    assert best["width"] <= 0.9 and best["flops"] == 6 * 10**6 * best["tokens"]
    assert best["money"] == pytest.approx(best["flops"] / 1e12 / 3600 * 2)
    assert main([*ask("2M", tokens="4M"), "--study", str(folder), *price]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What would tell most: one more run" in text and "USD); it should leave" in text


def test_runs_that_fit_no_curve_have_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ladder(tmp_path / "s", {"P-R": (4.0, 4.9, 3.4, 4.6), "S_R": (4.4, 5.2, 3.6, 4.9)})
    answer = run(capsys, *ask("2M", tokens="4M"), "--study", str(folder))
    advice = answer["recommendation"]
    assert answer["cases"] == [] and advice["basis"] == "none" and advice["cheapest_pilot"] is None
    assert "Minitron-width: its runs scatter by" in advice["statement"]


VERDICTS = "setting,method,target,retrain_tokens,seed,seeds,difference,low,high,winner"


def compare(folder: Path, *rows: str) -> Path:
    (folder / "comparisons.csv").write_text("\n".join([VERDICTS, *rows]) + "\n")
    return folder


def lines(names: tuple[str, ...], method: str = "minitron-width") -> list[str]:
    """Smooth curves with pruning ahead, of a parent of 2 M parameters; a row each for 1, 2, 4, 8 M tokens."""
    curves = {"P-R": (0.5, -0.35), "S_R": (0.8, -0.35)}
    return [
        f"{name},{method},width,0,0.5,0.5,1000000,{m * 10**6},{3.2 + curves[name][0] * m ** curves[name][1]},0.5"
        for name in names
        for m in (1, 2, 4, 8)
    ]


def test_measured_comparisons_win_over_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the budgets that were run the answer is the study's verdict, with its interval; elsewhere the curves'."""
    folder = study(tmp_path / "s", lines(("P-R", "S_R")), f"{HEAD},target")
    arguments = [*ask("2M", tokens="4M"), "--study", str(folder)]
    assert run(capsys, *arguments)["recommendation"]["choice"] == "prune"
    assert ", one seed)" in statement(capsys, *arguments)
    compare(
        folder,
        "training,minitron-width,0.5,4000000,,2,0.2,-0.3,0.7,undecided",
        "training,minitron-width,0.5,4000000,0,1,0.2,0.1,0.3,pruned",
        "training,minitron-width,0.5,8000000,,1,-0.2,-0.3,-0.1,scratch",
        "total,minitron-width,0.5,4000000,,1,-0.4,-0.5,-0.3,scratch",
    )
    answer = run(capsys, *arguments)
    (account,) = answer["cases"][0]["accounts"]
    assert account["difference"] == {"value": 0.2, "low": -0.3, "high": 0.7} and account["crossover"] is None
    assert (answer["recommendation"]["choice"], answer["recommendation"]["basis"]) == ("undecided", "measured")
    assert "measured over 2 seeds, Minitron-width against training from scratch is undecided" in statement(
        capsys, *arguments
    )
    one = statement(capsys, *ask("2M", tokens="8M"), "--study", str(folder))
    assert one.startswith("TRAIN FROM SCRATCH: measured in one pair of runs, training from scratch is ahead")
    between = run(capsys, *ask("2M", tokens="3M"), "--study", str(folder))["recommendation"]
    assert (between["choice"], between["basis"]) == ("prune", "curves")
    total = ["--parent", "must-train", "--parent-tokens"]
    assert run(capsys, *arguments, *total, "4k")["recommendation"]["basis"] == "measured"
    assert run(capsys, *arguments, *total, "5k")["recommendation"]["basis"] == "curves"
    gap = run(capsys, *ask("3M", tokens="6M"), "--study", str(folder))["cases"][0]["accounts"][0]["difference"]
    assert gap["value"] - gap["low"] >= 0.5 and gap["high"] - gap["value"] >= 0.5  # as wide as what was measured


def test_a_shipped_study_is_answered_as_its_report_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    """What Holm's method leaves undecided stays so; the parent's loss is that beside its pruned models', of 4.73."""
    folder = Path(__file__).parents[2] / "docs" / "results" / "findings"
    arguments = ["recommend", "--params", "2247424", "--ratio", "0.5", "--tokens", "150k", "--study", str(folder)]
    answer = run(capsys, *arguments, "--method", "minitron-depth")
    assert answer["recommendation"]["choice"] == "undecided" and "Holm" in answer["recommendation"]["statement"]
    assert answer["evidence"]["parent_loss"] == pytest.approx(4.7336, abs=1e-4)
    total = run(capsys, *arguments, "--method", "minitron-depth", "--parent", "must-train", "--parent-tokens", "600k")
    assert total["recommendation"]["choice"] == "train from scratch"


def test_a_measured_budget_needs_no_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in lines(("P-R", "S_R")) if ",4000000," in row]
    folder = study(tmp_path / "s", rows, f"{HEAD},target")
    compare(folder, "training,minitron-width,0.5,4000000,,3,0.01,0.001,0.019,equal within margin")
    arguments = [*ask("2M", tokens="4M"), "--study", str(folder)]
    text = statement(capsys, *arguments)
    assert text.startswith("HARDLY ANY ADVANTAGE: measured over 3 seeds, Minitron-width and training from scratch are")
    assert main(arguments) == 0 and "measured against" in capsys.readouterr().out
    assert main([*ask("2M", tokens="5M"), "--study", str(folder)]) == 2


@pytest.mark.parametrize("column", ["total_tokens", "pruning_tokens"])
def test_a_pruning_that_learns_gives_its_twin_as_many_tokens(
    column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for row in lines(("P-R", "S_R"), "sheared"):
        fields = row.split(",")
        tokens = int(fields[7])
        scratch = fields[0] == "S_R"
        fields[7] = str(tokens + 500_000 * scratch)
        rows.append(",".join([*fields, "" if scratch else str(500_000 + (tokens + 4000) * (column == "total_tokens"))]))
    folder = study(tmp_path / "s", rows, f"{HEAD},target,{column}")
    arguments = ["--study", str(folder), "--parent-tokens", "4k"]
    answer = run(capsys, *ask("2M", tokens="1M"), *arguments)
    training, total, _ = answer["cases"][0]["accounts"]
    assert (training["scratch_tokens"], total["scratch_tokens"]) == (1_500_000, 1_504_000)
    assert training["winner"] == "pruned"
    assert answer["costs"]["paths"][1]["tokens"] == 1_500_000
    short = run(capsys, *ask("2M", tokens="500k"), *arguments)["recommendation"]["statement"].replace("\u00a0", " ")
    assert "not run far enough" not in short and "nothing is read below that" in short


def test_a_method_that_a_study_has_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions.write_study(tmp_path)
    own = [*ask("2M", 0.4, "20M"), "--study", str(tmp_path)]
    assert statement(capsys, *own, "--method", "flap").startswith("No runs for flap; the nearest, Minitron-width, says")
    assert "no losses of wanda are there" in statement(capsys, *own, "--method", "wanda")


def test_a_method_without_enough_runs_is_told_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path / "s", ROWS[:6])  # of wanda, P-R and S_R alone
    own = [*ask("100", tokens="2000"), "--study", str(folder)]
    answer = run(capsys, *own)
    assert [case["method"] for case in answer["cases"]] == ["shortgpt"]
    assert answer["not_fitted"] == ["wanda: no ratio has runs of both paths and three budgets in all; finish more runs"]
    assert main([*own, "--method", "wanda"]) == 2
    assert "no ratio has runs of both paths" in capsys.readouterr().err


def test_a_pilot_is_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the question's proportions: ratio, tokens for each parameter, R beside P."""
    file = tmp_path / "pilot.yaml"
    answer = run(capsys, *ASK, *TRAIN, "--granularity", "depth", "--pilot", str(file))
    pilot = load_study(file)
    assert (
        answer["pilot"]["file"] == str(file)
        and [entry.method for entry in pilot.methods] == ["minitron-depth"]
        and pilot.ratios == (0.5,)
    )
    assert pilot.parent and pilot.parent.tokens and len(pilot.retrain.tokens) == 3
    assert pilot.question and pilot.question.comparisons[0].setting == ("equal_total_tokens",)
    assert pilot.corpus.holdout == 0.3
    assert pilot.parent.tokens / pilot.retrain.tokens[-1] == pytest.approx(4, rel=0.01)
    shape = pilot.parent.shape(pilot.corpus.vocabulary)
    share = 250e9 / 8e9
    assert (pilot.parent.tokens + pilot.retrain.tokens[-1]) / shape.non_embedding == pytest.approx(share, rel=0.02)
    assert main(["study", "plan", str(file)]) == 0
    assert main([*ASK, "--pilot", str(file)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_pilot_says_where_its_proportions_are_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near = run(capsys, *ASK, *TRAIN, "--pilot", str(tmp_path / "near.yaml"))["pilot"]["says"]
    far = run(capsys, *ASK, "--parent-tokens", "15T", "--pilot", str(tmp_path / "far.yaml"))["pilot"]["says"]
    assert "not the proportions" in far and "not the proportions" not in near
    assert main([*ask(), "--parent-tokens", "15T"]) == 0
    assert "same proportions" not in capsys.readouterr().out


def test_a_pilot_of_depth_and_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pilot.yaml"
    run(capsys, *ASK, "--granularity", "depth+width", "--pilot", str(file))
    assert [entry.method for entry in load_study(file).methods] == ["sheared"]


def test_a_pilot_like_one_s_own_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps corpus, parent and recipe, and takes the budget that would tell most."""
    own = Path(__file__).parents[2] / "studies" / "smoke.yaml"
    file, folder = tmp_path / "next.yaml", study(tmp_path / "s", ROWS)
    answer = run(
        capsys, *ask("100", tokens="2000"), "--study", str(folder), "--method", "shortgpt", "--like", str(own),
        "--pilot", str(file),
    )  # fmt: skip
    mine, pilot = load_study(own), load_study(file)
    assert (pilot.corpus, pilot.parent, pilot.recipe) == (mine.corpus, mine.parent, mine.recipe)
    runs = answer["cases"][0]["next_runs"]
    assert pilot.retrain.tokens[0] == (runs[0]["tokens"] if runs else 5000)
    assert all(run["flops"] > 0 for run in runs)
    assert pilot.retrain.peak_rate == mine.retrain.peak_rate
    assert [entry.method for entry in pilot.methods] == ["shortgpt"]


def test_a_pilot_like_a_study_has_its_methods_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(__file__).parents[2] / "studies" / "smoke.yaml"
    for ratio, want in ((0.5, (0.5,)), (0.4, (0.4,))):
        file = tmp_path / f"{ratio}.yaml"
        run(capsys, *ask(ratio=ratio), "--like", str(own), "--pilot", str(file))
        pilot, mine = load_study(file), load_study(own)
        assert (pilot.methods, pilot.settings, pilot.ratios) == (mine.methods, mine.settings, want)


def test_a_config_gives_exact_flops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_shapes_verb import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    ask = ["recommend", "--model", str(tmp_path), "--ratio", "0.5", "--tokens", "50B", *TRAIN, "--granularity", "depth"]
    answer = run(capsys, *ask)
    assert answer["question"]["parameters"] == 8_030_261_248
    block = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert answer["question"]["target_parameters"] == 8_030_261_248 - 16 * (block + 2 * 4096)
    linears = 16 * block + 128_256 * 4096
    a_token = 6 * linears + 12 * 16 * 4096 * (2048 + 1) / 2
    assert {row["name"]: row["flops"] for row in answer["costs"]["terms"]}["retraining"] == pytest.approx(
        a_token * 50e9
    )
    terms, flops = answer["costs"]["terms"], answer["cases"][0]["accounts"][2]
    assert flops["scratch_tokens"] == pytest.approx(50e9 + terms[0]["flops"] / a_token)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (["--parent", "must-train"], "needs its tokens: --parent-tokens"),
        (["--children", "3"], "which is sunk unless --parent is must-train"),
        (["--method", "minitron-dept"], "did you mean 'minitron-depth', "),
        (["--method", "wanda", "--granularity", "width"], "wanda is of granularity sparse, not width"),
        (["--cost-per-hour", "2"], "--flops-per-second: is missing"),
        (["--noise", "0"], "'0' is not a number above zero"),
        (["--like", "x.yaml"], "--like: goes with --pilot"),
        (["--currency", "EUR"], "--currency: is that of a price; set --cost-per-hour as well"),
        (["--cost-per-hour", "2", "--flops-per-second", "1e15", "--currency", "two words"], "--currency"),
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


def test_the_page_has_the_findings_and_answers_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the answers those that need no fit; ``python benchmarks/questions.py --write`` renews the page."""
    page = (Path(__file__).parents[2] / "docs" / "prediction.md").read_text(encoding="utf-8")
    assert "\n".join(questions.findings_table()) in page
    section = page.split("<!-- questions -->")[1].split("<!-- /questions -->")[0]
    answers = dict(zip(*[iter(section.strip().splitlines())] * 2, strict=True))
    assert len(answers) == len(questions.QUESTIONS) >= 20
    for line, (_, fields) in zip(answers, questions.QUESTIONS, strict=True):
        assert f"`{questions.command(fields)}`" in line
        answer = answers[line].strip().removeprefix("> ")
        if "study" not in fields and "nats" not in answer:
            assert answer.startswith(statement(capsys, "recommend", *questions.command(fields).split()))


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
        output = capsys.readouterr().out
        assert "cost" in output and ("EUR" in output) == ("EUR" in example)
    assert load_study(Path("pilot.yaml")) and load_study(Path("next.yaml"))


def test_a_pattern_is_a_case_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs at 2:4 and at a ratio of 0.5 have the same ratio, method, budget and seed, and are other curves."""
    rows = [
        f"{name},sparsegpt,sparse,0,0.5,0.4,100,{tokens},{loss + worse},{target}"
        for target, worse in (("0.5", 0.0), ("2:4", 0.3))
        for name, tokens, loss in (("P-R", 1000, 4.0), ("S_R", 1000, 4.4), ("S_{P+R}", 5000, 3.8))
    ]
    folder = study(tmp_path / "run", rows, f"{HEAD},target")
    answer = run(capsys, *ask("100", tokens="2000"), "--study", str(folder))
    assert [case["method"] for case in answer["cases"]] == ["sparsegpt", "sparsegpt 2:4"]
    assert answer["cases"][1]["pruned_loss"]["value"] > answer["cases"][0]["pruned_loss"]["value"] + 0.1
