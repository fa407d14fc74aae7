from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from example import (
    METHODS,
    NAMES,
    R,
    broken,
    cell,
    curve,
    evaluation,
    example,
    judged,
    judged_text,
    large,
    pruned,
    t_interval,
)

from secateur.comparison.records import Cell, StudyResults
from secateur.comparison.twins import Verdict
from secateur.report.judgement import answer_json, judge
from secateur.report.terminal import text_summary, text_table


def study(*cells: Cell) -> StudyResults:
    return dataclasses.replace(example(), cells=cells, pruned=())


def trio(p_r: float | None, s_r: float | None, s_pr: float | None, method: str = "wanda", **kw: Any) -> list[Cell]:
    losses = zip(NAMES, (p_r, s_r, s_pr), strict=True)
    return [cell(method, name, loss, salt=i, **kw) for i, (name, loss) in enumerate(losses)]


def verdict(results: StudyResults, setting: str) -> Verdict:
    (match,) = (v for v in judge(results).verdicts if v.setting == setting)
    return match


def reason(*cells: Cell) -> str:
    """Why the first comparison has no verdict at equal training tokens."""
    first = next(v for v in judge(study(*cells)).verdicts if v.setting == "training")
    assert first.winner == "not measured"
    assert (first.difference, first.low, first.high) == (None, None, None)
    return first.reason


def test_each_setting_has_its_own_winner():
    results = study(*trio(5.41, 5.86, 5.13, "minitron-depth"))
    training, total = verdict(results, "training"), verdict(results, "total")
    assert (training.winner, total.winner) == ("pruned", "scratch")
    assert training.difference == pytest.approx(0.45)
    assert total.difference == pytest.approx(-0.28)
    assert training.low and training.high and training.low < 0.45 < training.high
    assert judge(results).answer == (
        "If the parent is already there, the pruned models ended lower; if its tokens count too, the from-scratch "
        "models ended lower. One seed: this is about these runs; another seed may end differently."
    )


def test_one_seed_speaks_of_this_pair_of_runs_and_never_of_what_pays():
    judgement = judge(study(*trio(5.41, 5.86, 5.13, "minitron-depth")))
    training, total = judgement.sentences
    assert training == (
        "At equal training tokens, Minitron-depth at ratio 0.5 ends 0.45 nats below its from-scratch twin "
        "(95% interval 0.43 to 0.47), in this pair of runs."
    )
    assert total.startswith("At equal total tokens, Minitron-depth at ratio 0.5 ends 0.28 nats above its")
    assert "pays" not in " ".join((*judgement.sentences, judgement.answer, *judgement.headlines.values()))
    assert "held-out text only, since there is one seed" in " ".join(text_table(judgement).split())


def test_a_difference_within_the_noise_is_undecided():
    results = study(*trio(5.440, 5.452, 5.428))
    assert {v.winner for v in judge(results).verdicts} == {"undecided"}
    assert "is undecided (difference 0.01 nats" in judge(results).sentences[0]
    assert "it is undecided" in judge(results).answer


def test_identical_models_are_equal_within_the_margin():
    twin = [dataclasses.replace(c, evaluation=evaluation(5.4)) for c in trio(5.4, 5.4, 5.4)]
    assert verdict(study(*twin), "training").winner == "equal within margin"
    assert "is equal to its from-scratch twin within 0.02 nats" in judge(study(*twin)).sentences[0]
    assert "the two paths ended equal within the margin" in judge(study(*twin)).answer


def test_a_certain_difference_within_the_margin_is_equal_and_not_shown_as_zero():
    shared = evaluation(5.4)
    better = dataclasses.replace(shared, loss=5.399, windows=tuple(w - 0.001 for w in shared.windows))
    p_r, s_r, s_pr = trio(5.4, 5.4, 5.4)
    cells = (dataclasses.replace(p_r, evaluation=better), dataclasses.replace(s_r, evaluation=shared), s_pr)
    assert "within 0.02 nats (difference 0.001 nats" in judge(study(*cells)).sentences[0]


def test_interval_is_paired():
    """Windows vary by 0.3 for both models. Unpaired, that would hide a difference of 0.04."""
    results = study(*trio(5.40, 5.44, 5.44))
    training = verdict(results, "training")
    assert training.winner == "pruned"
    losses = {c.name: np.asarray(c.evaluation.windows) for c in results.cells if c.evaluation}
    assert (training.low, training.high) == pytest.approx(t_interval(losses["S_R"] - losses["P-R"]))
    assert training.low is not None and training.high is not None and training.high - training.low < 0.05


def test_verdicts_are_deterministic():
    assert judge(broken()) == judged(broken)


def test_missing_run():
    p_r, s_r, s_pr = trio(5.4, None, 5.2)
    others = trio(5.4, 5.8, 5.2, "minitron-depth")
    assert reason(p_r, s_r, s_pr, *others) == "the scratch run S_R has no held-out loss"


def test_a_twin_that_the_study_leaves_out_is_not_missing():
    """With ``exclude`` some comparisons lack a twin in a setting; the study is still complete."""
    p_r, _, s_pr = trio(5.4, 5.8, 5.2)
    judgement = judge(study(p_r, s_pr, *trio(5.4, 5.8, 5.2, "minitron-depth")))
    winners = {(v.setting, v.group.method): v.winner for v in judgement.verdicts}
    assert winners == {
        ("training", "minitron-depth"): "pruned",
        ("total", "minitron-depth"): "scratch",
        ("total", "wanda"): "scratch",
    }
    assert "as far as measured" not in judgement.answer


def test_only_settings_that_the_study_has_runs_for_are_judged():
    p_r, s_r, s_pr = trio(5.4, 5.8, 5.2)
    assert judge(study(p_r, s_pr)).settings == ("total",)
    assert judge(study(p_r, s_r)).answer.startswith("If the parent is already there, the pruned models ended lower.")
    assert judge(study(p_r, s_pr)).answer.startswith(
        "If the parent's tokens count, the from-scratch models ended lower."
    )
    flops = [cell("wanda", name, loss, salt=i) for i, (name, loss) in enumerate((("S_F", 5.8), ("S_{P+F}", 5.9)))]
    assert judge(study(p_r, *flops)).answer.startswith(
        "Counted in FLOPs: the pruned models ended lower, whether or not the parent's FLOPs are counted."
    )
    sentences = judge(study(p_r, *flops)).sentences
    assert sentences[0].startswith("At equal training FLOPs, Wanda at ratio 0.5 ends 0.40 nats below")
    assert sentences[1].startswith("At equal total FLOPs, Wanda at ratio 0.5 ends 0.50 nats below")


def test_failed_evaluation():
    assert reason(*trio(None, 5.8, 5.2)) == "the pruned run P-R has no held-out loss"
    assert reason(*trio(5.4, None, 5.2)) == "the scratch run S_R has no held-out loss"
    assert "is not measured: the scratch run S_R has" in judge(study(*trio(5.4, None, 5.2))).sentences[0]


def test_a_loss_that_is_not_finite_is_not_compared():
    p_r, s_r, s_pr = trio(5.4, 5.8, 5.2)
    wild = dataclasses.replace(evaluation(5.8), loss=math.nan)
    assert "not finite" in reason(p_r, dataclasses.replace(s_r, evaluation=wild), s_pr)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "another"}, "different protocols"),
        ({"windows": (5.8,) * 10}, "have 64 and 10 held-out windows"),
    ],
)
def test_evaluations_that_cannot_be_compared(change: dict[str, Any], words: str):
    p_r, s_r, s_pr = trio(5.4, 5.8, 5.2)
    assert s_r.evaluation
    s_r = dataclasses.replace(s_r, evaluation=dataclasses.replace(s_r.evaluation, **change))
    assert words in reason(p_r, s_r, s_pr)


@pytest.mark.parametrize(("windows", "reason"), [(1, "only 1 document of the 20"), (19, "only 19 documents of the 20")])
def test_few_documents_decide_nothing(windows: int, reason: str):
    losses = ((5.4, 0), (5.8, 1), (5.8, 2))
    few = [
        dataclasses.replace(c, evaluation=evaluation(loss, salt, windows=windows))
        for c, (loss, salt) in zip(trio(5.4, 5.8, 5.8), losses, strict=True)
    ]
    assert verdict(study(*few), "training").winner == "undecided"
    assert reason in judge(study(*few)).sentences[0]


def test_windows_of_one_document_are_one_unit_of_the_text():
    """Four windows a document that move together leave a quarter of the evidence."""
    clusters = tuple(range(16)) * 4
    shift = np.tile(np.random.default_rng(5).normal(0.0, 0.2, 16), 4)
    p_r, s_r, s_pr = trio(5.4, 5.5, None)
    assert s_r.evaluation and p_r.evaluation
    moved = tuple(np.asarray(s_r.evaluation.windows) + shift - shift.mean())
    alone = dataclasses.replace(s_r, evaluation=dataclasses.replace(s_r.evaluation, windows=moved))
    together = dataclasses.replace(
        alone,
        evaluation=dataclasses.replace(alone.evaluation, window_documents=clusters),  # type: ignore[type-var]
    )
    wide, narrow = (verdict(study(p_r, twin, s_pr), "training") for twin in (together, alone))
    assert (narrow.decision.documents, wide.decision.documents) == (64, 16)
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert wide.high - wide.low > 1.7 * (narrow.high - narrow.low)
    assert (wide.winner, narrow.winner) == ("undecided", "pruned")


def test_flop_ratio_counts_the_whole_pipeline():
    p_r, s_r, s_pr = trio(5.4, 5.8, 5.2)
    parent = example().parents[0].cost
    assert parent and p_r.pruning
    whole = parent.flops + p_r.pruning.flops + p_r.training.flops
    assert verdict(study(p_r, s_r, s_pr), "total").flop_ratio == whole / s_pr.training.flops
    public = dataclasses.replace(example().parents[0], cost=None)
    unknown = dataclasses.replace(study(p_r, s_r, s_pr), parents=(public,))
    assert verdict(unknown, "total").flop_ratio is None
    assert "Parent: 1.71 M parameters, P unknown" in text_table(judge(unknown))


def seeded(*gaps: float | None, target: str = "0.5", salt: int = 0) -> list[Cell]:
    """A comparison with a seed for each gap at equal training tokens; None: the twin has failed."""
    return [
        dataclasses.replace(c, evaluation=None) if gap is None and c.name == "S_R" else c
        for seed, gap in enumerate(gaps)
        for i, c in enumerate(trio(5.4, 5.4 + (gap or 0.0), 5.2, target=target, seed=seed))
        for c in [dataclasses.replace(c, evaluation=evaluation(c.evaluation.loss, 31 * seed + i + salt))]
        if c.evaluation
    ]


def test_targets_and_seeds_are_compared_each_with_its_own_twin_and_pooled_over_seeds():
    cells = [*seeded(0.4, 1.4), *seeded(0.4, 1.4, target="0.75")]
    judgement = judge(study(*cells))
    by_seed = [v for v in judgement.by_seed if v.setting == "training"]
    assert [(v.group.target, v.group.seed) for v in by_seed] == [("0.5", 0), ("0.5", 1), ("0.75", 0), ("0.75", 1)]
    assert [round(v.difference or 0, 6) for v in by_seed] == [0.4, 1.4, 0.4, 1.4]
    pooled = [v for v in judgement.verdicts if v.setting == "training"]
    assert [(v.group.target, v.group.seed, v.seeds) for v in pooled] == [("0.5", None, 2), ("0.75", None, 2)]
    assert [round(v.difference or 0, 6) for v in pooled] == [0.9, 0.9]
    assert judgement.headlines["training"] == "At equal training tokens: undecided for both comparisons."
    by_seeds = "on average over two seeds, which share one parent"
    assert f"is undecided (difference 0.90 nats {by_seeds}, 95% interval" in judgement.sentences[0]


def test_several_seeds_that_agree_say_which_path_pays():
    cells = seeded(0.40, 0.41, 0.42)
    judgement = judge(study(*cells))
    assert (
        "0.41 nats below its from-scratch twins on average over three seeds, which share one" in judgement.sentences[0]
    )
    assert judgement.sentences[0].endswith(": pruning pays.")
    assert judgement.answer.startswith("If the parent is already there, prune; if its tokens count too, train")
    every = judge(dataclasses.replace(study(*cells), seeds_vary="all"))
    assert "three seeds, each with its own parent" in every.sentences[0]
    assert "Intervals cover held-out text and seeds (each with its own parent)" in " ".join(text_table(every).split())


def test_seeds_that_disagree_are_undecided():
    judgement = judge(study(*seeded(0.2, -0.2)))
    assert [v.winner for v in judgement.by_seed if v.setting == "training"] == ["pruned", "scratch"]
    assert [v.winner for v in judgement.verdicts if v.setting == "training"] == ["undecided"]


def test_many_comparisons_need_a_smaller_p():
    """One comparison of p = 0.04 is a verdict; among ten of no difference it is none."""
    one = trio(5.400, 5.4186, 5.2)
    alone = verdict(study(*one), "training")
    assert alone.decision.p is not None and 0.005 < alone.decision.p < 0.05
    no_margin = judge(study(*one)).verdicts[0].decision
    others = [c for n in range(1, 10) for c in trio(5.4, 5.401, 5.2, target=f"0.{n}5")]
    crowded = next(v for v in judge(study(*one, *others)).verdicts if v.group.target == "0.5")
    assert crowded.decision.comparisons == 10 and no_margin.comparisons == 1
    assert crowded.decision.adjusted_p == pytest.approx(min(1.0, 10 * alone.decision.p))
    assert crowded.winner == "undecided" and "among 10 comparisons (Holm)" in crowded.reason


def test_a_failed_seed_is_left_out_and_reported():
    judgement = judge(study(*seeded(0.2, None, 0.4)))
    pooled = judgement.verdicts[0]
    assert (pooled.seeds, pooled.planned) == (2, 3)
    assert pooled.difference == pytest.approx(0.3)
    assert "on average over two of three seeds" in judgement.sentences[0]
    assert "5.700*" in text_table(judgement)
    none = judge(study(*seeded(None, None)))
    assert none.verdicts[0].reason == "the scratch run S_R has no held-out loss"


def test_names_are_the_shortest_unambiguous_ones():
    def names(*cells: Cell) -> list[str]:
        return [text.split(", ", 1)[1].split(" ends ")[0] for text in judge(study(*cells)).sentences]

    losses = {"P-R": 5.4, "S_R": 5.8}
    runs = [cell("wanda", name, loss, salt=i) for i, (name, loss) in enumerate(losses.items())]
    assert names(*runs) == ["Wanda at ratio 0.5"]
    assert names(*[dataclasses.replace(c, target="2:4") for c in runs]) == ["Wanda at 2:4"]
    assert names(*[dataclasses.replace(c, target="4b-depth") for c in runs]) == ["Wanda to 4b-depth"]
    longer = [dataclasses.replace(c, retrain_tokens=2 * R) for c in runs]
    assert names(*runs, *longer) == ["Wanda at ratio 0.5 (R = 200\u00a0k)", "Wanda at ratio 0.5 (R = 400\u00a0k)"]
    distilled = [dataclasses.replace(c, objective="distillation", parent="big") for c in runs]
    assert names(*runs, *distilled) == [
        "Wanda at ratio 0.5 (parent parent)",
        "Wanda at ratio 0.5 (parent big, distillation)",
    ]


def test_an_objective_without_its_own_twin_leaves_the_study_complete():
    distilled = dataclasses.replace(trio(5.3, 5.8, 5.2)[0], objective="distillation")
    judgement = judge(study(*trio(5.4, 5.8, 5.2), distilled))
    assert [v.group.objective for v in judgement.verdicts] == ["", ""]
    assert "not measured, or not in the study" in " ".join(text_table(judgement).split())


def test_the_answer_as_json_names_every_comparison():
    answer = answer_json(judged(large))
    first = answer["verdicts"][0]
    assert (first["method"], first["target"], first["retrain_tokens"], first["seed"]) == (
        "minitron-depth",
        "0.5",
        50_000,
        None,
    )
    assert first["interval"][0] < first["difference"] < first["interval"][1]
    assert {v["setting"] for v in answer["verdicts"]} == {"training", "total", "training-flops", "total-flops"}
    assert {v["seed"] for v in answer["verdicts"]} == {None, 0, 1}
    assert {part["with"] for part in answer["inherited"]} == {"redrawn", "pruned", "shuffled-weights"}
    assert {row["second"]["objective"] for row in answer["objectives"]} == {"distillation"}
    assert {f["finding"] for f in answer["findings"]} == {"equal-tokens", "tokens", "ratio", "granularity"}
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_a_pruned_model_without_runs_is_not_measured():
    results = dataclasses.replace(study(*trio(5.4, 5.8, 5.2)), pruned=(pruned("wanda"), pruned("minitron-width")))
    missing = [v for v in judge(results).verdicts if v.group.method == "minitron-width"]
    assert [v.winner for v in missing] == ["not measured"] * 2


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([(5.4, 5.8)] * 3, "the pruned model ended lower in its pair of runs for all three methods"),
        ([(5.8, 5.4)] * 3, "the from-scratch model ended lower in its pair of runs for all three methods"),
        (
            [(5.4, 5.8), (5.8, 5.4), (5.4, 5.415)],
            "the pruned model ended lower in its pair of runs for Minitron-depth; the from-scratch model ended lower "
            "in its pair of runs for Minitron-width; undecided for Wanda",
        ),
        (
            [(5.4, 5.8), (5.4, 5.9), (5.4, None)],
            "the pruned model ended lower in its pair of runs for Minitron-depth and Minitron-width; not measured for",
        ),
        ([(None, None)] * 3, "not measured for all three methods"),
    ],
)
def test_headlines(losses: list[tuple[float | None, float | None]], words: str):
    cells = [c for m, (p_r, s_r) in zip(METHODS, losses, strict=True) for c in trio(p_r, s_r, None, m)]
    assert judge(study(*cells)).headlines["training"].startswith(f"At equal training tokens: {words}")


def test_answers():
    lower = "models ended lower, whether or not the parent's tokens are counted."
    assert judge(study(*trio(5.4, 5.8, 5.9))).answer.startswith(f"The pruned {lower} One seed:")
    assert judge(study(*trio(5.4, 5.2, 5.1))).answer.startswith(f"The from-scratch {lower} One seed:")
    assert judge(study(*trio(None, 5.2, 5.1))).answer.startswith("There is no answer yet")
    assert judge(study()).answer.startswith("There is no answer yet")
    assert "there is no answer yet, as far as measured." in judge(study(*trio(5.4, 5.8, None))).answer
    assert "the from-scratch models ended lower where a path is named" in judged(example).answer


@pytest.mark.parametrize("make", [example, broken, large])
def test_text_table_is_plain_and_narrow(make: Any):
    text = judged_text(make)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    if make is not large:  # whose forecasts take seconds; that they are the same again: test_forecast.py
        assert text == text_table(judge(make()))


@pytest.mark.parametrize("make", [example, broken, large])
def test_a_summary_begins_with_the_answer_and_has_at_most_40_lines(make: Any):
    judgement = judged(make)
    text = text_summary(judgement)
    lines = text.splitlines()
    assert text.isascii() and len(lines) <= 40 and max(map(len, lines)) <= 100
    assert " ".join(text.split()).startswith(judgement.answer)
    rows = [line for line in lines if line.split(" ")[0] in METHODS]
    comparisons = judgement.index.comparisons
    assert len(rows) == min(12, len(comparisons))
    assert (f"and {len(comparisons) - 12} more" in text) is (len(comparisons) > 12)
    assert "Cost: " in text and "trained models" in text


def test_text_table_shows_losses_and_winners():
    text = judged_text(example)
    row = next(line for line in text.splitlines() if line.startswith("minitron-depth"))
    assert row.split() == ["minitron-depth", "0.5", "5.470", "5.410", "5.860", "5.130", "pruned", "scratch"]
    assert "held-out loss 5.440" in text
    assert judged(example).answer in " ".join(text.split())


def test_text_table_shows_missing_values_as_a_dash():
    row = next(line for line in judged_text(broken).splitlines() if line.startswith("minitron-depth"))
    assert row.split()[3:7] == ["5.405", "5.860*", "5.130", "not"]


def test_text_table_of_several_parents_objectives_and_settings_stays_narrow():
    big = [dataclasses.replace(c, parent="llama-3.1-8b-instruct") for c in large().cells]
    parents = (*large().parents, dataclasses.replace(large().parents[0], name="llama-3.1-8b-instruct", cost=None))
    text = text_table(judge(dataclasses.replace(large(), cells=(*large().cells, *big), parents=parents)))
    assert max(map(len, text.splitlines())) <= 100
    assert "Parent llama-3.1-8b-instruct: 1.71 M parameters, P unknown" in text


def test_text_table_shows_controls_and_objectives():
    text = " ".join(judged_text(large).split())
    assert "What is inherited, by controls at equal training tokens Wanda at ratio 0.5 (R = 200 k)" in text
    assert "at equal tokens: distillation on 50 k tokens ends 0.05 nats below the language-model loss on 50 k" in text
    assert "What is inherited" not in judged_text(example)


def test_text_table_shortens_a_long_method_name():
    long = [dataclasses.replace(c, method="m" * 80, curve=curve(6, 5, R)) for c in trio(5.4, 5.8, 5.2)]
    assert max(map(len, text_table(judge(study(*long))).splitlines())) <= 100


def test_answer_of_a_study_without_twins():
    cells = tuple(cell for cell in example().cells if cell.path == "pruned")
    judgement = judge(dataclasses.replace(example(), cells=cells))
    assert judgement.answer.startswith("No model of this study was trained from scratch") and not judgement.verdicts
