"""Forecasts from constructed records: known curves, every account by hand, and what cannot be told."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example import LADDER, P, cell, evaluation, example, judged, pruned

from secateur.comparison.index import Index
from secateur.comparison.records import Cell, StudyResults
from secateur.comparison.twins import Winner
from secateur.forecast.crossover import WORTH, Crossover, NextRun
from secateur.forecast.curve import PATHS
from secateur.forecast.fit import Interval
from secateur.forecast.ladder import Allowance, Forecast, Outlook, Standing, _agreeing, _with_cost
from secateur.forecast.ratios import across_ratios
from secateur.formatting import count, scientific
from secateur.report.forecast_prose import crossover_brief, next_sentence, outlook_sentence, standing_sentence
from secateur.report.judgement import answer_json, judge
from secateur.report.latex import forecasts_tex
from secateur.report.page import build_report
from secateur.report.tables import forecast_rows
from secateur.report.terminal import text_table

METHOD = "minitron-depth"
PARENT = example().parents[0]


def scratch_law(tokens: float) -> float:
    return 4.5 + 0.8 * (tokens / 200_000) ** -0.6


def pruned_law(tokens: float) -> float:
    return 4.5 + 0.4 * (tokens / 200_000) ** -0.3


def ladder(**changes: Any) -> list[Cell]:
    """P-R and S_R at each R, and S_{P+R} at the first; losses on the laws above."""
    found = []
    for salt, tokens in enumerate(LADDER):
        found.append(cell(METHOD, "P-R", pruned_law(tokens), tokens=tokens, salt=salt, **changes))
        found.append(cell(METHOD, "S_R", scratch_law(tokens), tokens=tokens, salt=10 + salt, **changes))
    return [*found, cell(METHOD, "S_{P+R}", scratch_law(P + LADDER[0]), tokens=LADDER[0], salt=20, **changes)]


def study(cells: list[Cell], **changes: Any) -> StudyResults:
    return dataclasses.replace(example(), cells=tuple(cells), pruned=(pruned(METHOD),), **changes)


def one(results: StudyResults) -> Forecast:
    found = judge(results).forecasts
    assert not found.unfitted and len(found.fitted) == 1
    return found.fitted[0]


def by_account(found: Forecast) -> dict[str, Outlook]:
    return {outlook.allowance.account: outlook for outlook in found.outlooks}


@pytest.fixture(scope="module")
def known() -> Forecast:
    return one(study(ladder()))


def test_known_curves_and_their_crossover(known: Forecast) -> None:
    """0.8 x^-0.6 = 0.4 x^-0.3 where x = 2^(1 / 0.3)."""
    want = 200_000 * 2 ** (1 / 0.3)
    found = by_account(known)["training"].crossover
    assert found and found.leader == "pruned"
    assert found.budget.low < want < found.budget.high and 0.4 < found.budget.value / want < 2.5
    assert known.further == 2 * LADDER[-1]
    for at, truth in ((known.loss("pruned"), pruned_law), (known.loss("scratch"), scratch_law)):
        assert (
            at and at.low < truth(known.further) < at.high and at.value == pytest.approx(truth(known.further), abs=0.03)
        )


def test_the_twins_tokens_on_every_account(known: Forecast) -> None:
    """By hand: both models have the same FLOPs a token, the parent's are in its record."""
    run = ladder()[0]
    assert run.pruning and PARENT.cost
    each = run.training.flops / run.training.tokens
    extra = {
        "training": 0.0,
        "total": P,
        "training-flops": run.pruning.flops / each,
        "shared-flops": (run.pruning.flops + PARENT.cost.flops / PARENT.children) / each,
        "total-flops": (run.pruning.flops + PARENT.cost.flops) / each,
    }
    assert {a: o.allowance.extra for a, o in by_account(known).items()} == pytest.approx(extra)
    for account, outlook in by_account(known).items():
        assert outlook.allowance.rate == 1.0
        assert [s.tokens for s in outlook.standings] == [*LADDER, known.further]
        assert outlook.last.scratch_tokens == pytest.approx(LADDER[-1] + extra[account])


def test_a_teacher_makes_the_twins_tokens_dearer_by_a_rate() -> None:
    cells = [dataclasses.replace(c, objective="distillation") for c in ladder()]
    dear = [
        dataclasses.replace(c, training=dataclasses.replace(c.training, flops=1.5 * c.training.flops))
        if c.name == "P-R"
        else c
        for c in cells
    ]
    found = by_account(one(study(dear)))
    assert found["training"].allowance.rate == 1.0
    assert found["training-flops"].allowance.rate == pytest.approx(1.5)
    assert found["training-flops"].last.scratch_tokens > 1.5 * LADDER[-1]


def test_a_measured_run_stands_in_the_place_of_the_fit(known: Forecast) -> None:
    judgement = judge(study(ladder()))
    (again,) = judgement.forecasts.fitted
    assert again.name == known.name and [again.loss(p) for p in PATHS] == [known.loss(p) for p in PATHS]
    verdict = next(v for v in judgement.verdicts if v.setting == "total" and v.difference is not None)
    total = by_account(known)["total"].standings
    assert total[0].basis == "measured" and total[0].difference
    assert (total[0].difference.value, total[0].difference.low) == (verdict.difference, verdict.low)
    assert {s.basis for s in by_account(known)["training"].standings[:-1]} == {"measured"}
    assert by_account(known)["shared-flops"].standings[1].basis == "between the budgets run"
    assert total[2].basis == by_account(known)["total"].further.basis == "beyond the budgets run"


def test_interpolated_differences_are_those_of_the_laws(known: Forecast) -> None:
    outlook = by_account(known)["shared-flops"]
    standing = outlook.standings[1]
    truth = scratch_law(standing.scratch_tokens) - pruned_law(standing.tokens)
    assert standing.difference and standing.difference.low < truth < standing.difference.high
    assert standing.difference.value == pytest.approx(truth, abs=0.03)
    told = standing_sentence(standing, "shared-flops")
    assert "by the fitted curves, between the budgets run" in told and "FLOPs, the parent shared" in told


def test_what_needs_an_unknown_cost_is_left_out() -> None:
    public = dataclasses.replace(PARENT, cost=None)
    assert set(by_account(one(study(ladder(), parents=(public,))))) == {"training", "training-flops"}
    unscored = [dataclasses.replace(c, pruning=None) for c in ladder()]
    assert set(by_account(one(study(unscored)))) == {"training", "total"}


def test_a_parent_that_cost_too_much_is_out_of_reach() -> None:
    assert PARENT.cost
    dear = dataclasses.replace(PARENT, cost=dataclasses.replace(PARENT.cost, flops=1000 * PARENT.cost.flops))
    outlook = by_account(one(study(ladder(), parents=(dear,))))["total-flops"]
    assert outlook.crossover is None and crossover_brief(None) == "no forecast"
    assert outlook.last.basis == "out of reach" and outlook.last.difference is None
    assert outlook.last.winner == "not measured"
    for told in (outlook_sentence(outlook), standing_sentence(outlook.last, "total-flops")):
        assert "out of reach, because" in told and "beyond 4 times the largest" in told


def test_paths_that_tie_are_undecided() -> None:
    cells = [
        dataclasses.replace(c, evaluation=evaluation(scratch_law(c.training.tokens), salt))
        for salt, c in enumerate(ladder())
    ]
    further = by_account(one(study(cells)))["training"].further
    assert further.winner == "undecided" and "undecided" in standing_sentence(further, "training")


def test_figures_of_runs_far_off_any_curve_are_withheld(tmp_path: Path) -> None:
    """No number of a bad fit is anywhere, and one sentence says why; measured comparisons stay."""
    rising = {"P-R": 5.0, "S_R": 6.0, "S_{P+R}": 4.2}
    cells = [
        dataclasses.replace(c, evaluation=evaluation(rising[c.name] + 0.3 * (c.retrain_tokens == LADDER[1]), salt))
        for salt, c in enumerate(ladder())
    ]
    judgement = judge(study(cells))
    assert not judgement.forecasts.fitted and not forecast_rows(judgement)
    (reason,) = judgement.forecasts.unfitted
    assert reason.startswith("Minitron-depth at ratio 0.5: its runs scatter by 0.") and "withheld" in reason
    page = build_report(judgement, tmp_path).read_text()
    assert page.count("around any curve") == 1 and not list(tmp_path.glob("forecasts.*"))
    assert not list((tmp_path / "figures").glob("forecast-*"))
    text = " ".join(text_table(judgement).split())
    assert text.count("around any curve") == 1 and "catches up" not in text
    answer = answer_json(judgement)
    assert answer["forecasts"] == [] and answer["not_forecast"] == [reason]
    assert any(verdict["winner"] == "pruned" for verdict in answer["verdicts"])


def test_missing_runs_are_left_out_and_never_zero() -> None:
    cells = ladder()
    cells[0] = dataclasses.replace(cells[0], evaluation=None)
    cells[3] = dataclasses.replace(cells[3], evaluation=dataclasses.replace(evaluation(5.0), loss=math.nan))
    found = one(study(cells))
    assert found.fit.budgets("pruned") == [*LADDER[1:]]
    assert found.fit.budgets("scratch") == [LADDER[0], P + LADDER[0], LADDER[2]]
    training = by_account(found)["training"].standings
    assert training[0].tokens == LADDER[1] and training[0].basis == "between the budgets run"


def test_no_ladder_no_forecast() -> None:
    judgement = judged(example)
    assert not judgement.forecasts.fitted and not judgement.forecasts.unfitted and not judgement.laws
    assert "Forecasts" not in text_table(judgement) and answer_json(judgement)["forecasts"] == []


def test_ladders_that_cannot_be_fitted_say_why() -> None:
    alone = [c for c in ladder() if c.path == "pruned"]
    assert "no finished scratch run" in judge(study(alone)).forecasts.unfitted[0]
    cells = ladder()
    other = dataclasses.replace(evaluation(5.0), protocol="another")
    cells[0] = dataclasses.replace(cells[0], evaluation=other)
    (reason,) = judge(study(cells)).forecasts.unfitted
    assert reason == "Minitron-depth at ratio 0.5: its runs were evaluated under different protocols"


def grid() -> list[Cell]:
    """A ladder at ratio 0.5 and one budget at three others: the gap grows with the ratio, by a law."""
    found = []
    for ratio in ("0.5", "0.6", "0.7", "0.8"):
        for tokens in LADDER if ratio == "0.5" else LADDER[1:2]:
            loss = 5.3 + float(ratio) ** 1.5 * (0.5 + 0.6 * (tokens / 200_000) ** -0.4)
            found.append(cell(METHOD, "P-R", loss, target=ratio, tokens=tokens))
    return found


def records(cells: list[Cell], parent_loss: float) -> StudyResults:
    parent = dataclasses.replace(PARENT, evaluation=evaluation(parent_loss, 99))
    targets = dict.fromkeys(c.target for c in cells)
    return dataclasses.replace(
        example(), cells=tuple(cells), pruned=tuple(pruned(METHOD, target=t) for t in targets), parents=(parent,)
    )


def test_one_law_across_ratios_predicts_a_ratio_that_was_left_out() -> None:
    (found,) = across_ratios(Index(records(grid(), 5.3)))
    assert found.law and found.law.error < 1e-3 and set(found.law.folded) == {"delta", "alpha", "K"}
    assert found.refused == (0.5,) and {run.run.ratio for run in found.left_out} == {0.6, 0.7, 0.8}
    assert found.left_out_error is not None and found.left_out_error < 0.01
    at = {(p.ratio, p.tokens): p for p in found.predictions}
    want = 5.3 + 0.7**1.5 * (0.5 + 0.6 * 8.0**-0.4)
    assert at[0.7, 2 * LADDER[-1]].loss == pytest.approx(want, abs=0.02)
    assert at[0.7, 2 * LADDER[-1]].measured is None and at[0.5, LADDER[0]].measured is not None


def test_a_pattern_is_another_law_and_another_ladder() -> None:
    """2:4 removes half as well; its runs are not those of the ratio 0.5."""
    patterned = [dataclasses.replace(c, target="2:4", ratio=0.5) for c in ladder()]
    found = judge(study([*ladder(), *patterned])).forecasts
    assert [one.name for one in found.fitted] == ["Minitron-depth at ratio 0.5", "Minitron-depth at 2:4"]
    higher = [dataclasses.replace(c, target="2:4", ratio=0.5, evaluation=evaluation(9.0)) for c in grid()[:3]]
    (law,) = across_ratios(Index(records([*grid(), *higher], 5.3)))
    assert law.law and len(law.law.runs) == len(grid())


def test_the_figures_of_a_law_far_from_its_runs_are_withheld() -> None:
    """Losses that go up and down with the ratio are on no law; no number of it is left."""
    cells = [
        dataclasses.replace(
            c, evaluation=evaluation(c.evaluation.loss + (0.3 if c.target in ("0.6", "0.8") else 0), salt)
        )
        for salt, c in enumerate(grid())
        if c.evaluation
    ]
    (row,) = across_ratios(Index(records(cells, 5.3)))
    assert row.law is None and "withheld" in row.reason and not row.predictions and row.left_out_error is None


def of(winner: Winner, tokens: int) -> Standing:
    return Standing(tokens, tokens, "measured", winner, Interval(0.1, 0.05, 0.15))


CROSSING = Crossover("pruned", Interval(400.0, 200.0, math.inf), 100.0, 4000.0, np.array([200.0, 400.0, math.inf]))


@pytest.mark.parametrize(
    ("standings", "want"),
    [
        ([], (400, 200, math.inf)),
        ([of("undecided", 300), of("equal within margin", 500)], (400, 200, math.inf)),
        ([of("pruned", 300)], (400, 300, math.inf)),
        ([of("pruned", 300), of("scratch", 800)], (400, 300, 800)),
        ([of("pruned", 500)], (math.inf, 500, math.inf)),  # the curves say 400, and 500 was measured
        ([of("scratch", 300)], (300, 200, 300)),
        ([of("scratch", 300), of("pruned", 800)], None),
        ([of("scratch", 100)], None),
    ],
)
def test_measured_comparisons_bound_the_crossover(
    standings: list[Standing], want: tuple[float, float, float] | None
) -> None:
    agreeing = _agreeing(CROSSING, standings)
    assert (dataclasses.astuple(agreeing.budget) if agreeing else None) == want


def test_curves_that_measured_comparisons_contradict_have_no_crossover() -> None:
    """One statement: the measured verdict stays, and the sentence says why there is no crossover."""
    outlook = Outlook(Allowance("training"), _agreeing(CROSSING, [of("scratch", 100)]), (of("scratch", 100),) * 2)
    assert outlook_sentence(outlook) == (
        "At equal training tokens: no crossover, because the fitted curves disagree with the measured comparisons."
    )
    assert "training from scratch is ahead" in standing_sentence(outlook.last, "training")


def test_a_next_run_has_its_cost_and_tells_something(known: Forecast) -> None:
    """Its FLOPs are those of a token in the runs of its path; a run that would tell little is not named."""
    run = NextRun("scratch", 1000, 0.5)
    cells = ladder()
    flops = next(c.training.flops / c.training.tokens for c in cells if c.path == "scratch")
    assert _with_cost(run, cells).flops == pytest.approx(1000 * flops)
    named = dataclasses.replace(known, next_run=dataclasses.replace(run, flops=3e12))
    assert f"from scratch on {count(1000)} tokens, {scientific(3e12)} FLOPs" in next_sentence(named)
    assert "No single further run is worth naming" in next_sentence(dataclasses.replace(known, next_run=None))
    assert known.next_run is None or known.next_run.width <= WORTH


def test_a_law_without_its_parents_loss_says_so() -> None:
    results = records(grid(), 5.3)
    unknown = dataclasses.replace(results, parents=(dataclasses.replace(PARENT, evaluation=None),))
    (found,) = across_ratios(Index(unknown))
    assert found.law is None and "parent's held-out loss is not measured" in found.reason


def test_the_report_tells_and_writes_its_forecasts(tmp_path: Path) -> None:
    tokens = LADDER[1]
    others = [
        cell(METHOD, "P-R", pruned_law(tokens) + float(ratio) - 0.5, target=ratio, tokens=tokens)
        for ratio in ("0.6", "0.7", "0.8")
    ]
    judgement = judge(records([*ladder(), *others], 4.4))
    page = build_report(judgement, tmp_path).read_text()
    assert 'id="forecast"' in page and "forecast-01-title" in page and "Across ratios" in page
    assert (tmp_path / "figures" / "forecast-01.pdf").is_file()
    with (tmp_path / "forecasts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(forecast_rows(judgement)) == 5 * (len(LADDER) + 1)
    assert {row["basis"] for row in rows} == {"measured", "between the budgets run", "beyond the budgets run"}
    assert not {"inf", "nan"} & {value for row in rows for value in row.values()}
    assert "Minitron-depth at ratio 0.5 & training tokens & pruned" in forecasts_tex(judgement)
    assert (tmp_path / "across_ratios.csv").is_file()
    text = text_table(judgement)
    assert "Forecasts, by curves fitted" in text and "a ratio that was left out" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    build_report(judged(example), tmp_path)
    assert not list(tmp_path.glob("forecasts.*")) and not list((tmp_path / "figures").glob("forecast-*"))
