from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from example import METHODS, NAMES, R, broken, cell, curve, evaluation, example, judged, judged_text, large, pruned

from secateur.comparison.intervals import bootstrap_interval, pooled_interval
from secateur.comparison.records import Cell, StudyResults
from secateur.comparison.twins import Verdict
from secateur.report.judgement import answer_json, judge
from secateur.report.terminal import text_table


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
        "If the parent is already there, prune; if its tokens count too, train from scratch."
    )


def test_verdict_sentences():
    training, total = judge(study(*trio(5.41, 5.86, 5.13, "minitron-depth"))).sentences
    assert training == (
        "At equal training tokens, Minitron-depth at ratio 0.5 ends 0.45 nats below its from-scratch twin "
        "(95% interval 0.43 to 0.47): pruning pays."
    )
    assert total.startswith("At equal total tokens, Minitron-depth at ratio 0.5 ends 0.28 nats above its")
    assert total.endswith(": training from scratch pays.")


def test_a_difference_within_the_noise_is_too_close_to_call():
    results = study(*trio(5.440, 5.441, 5.439))
    assert {v.winner for v in judge(results).verdicts} == {"too close to call"}
    assert "too close to call" in judge(results).sentences[0]
    assert "the two paths are too close to call" in judge(results).answer


def test_identical_models_are_too_close_to_call():
    twin = [dataclasses.replace(c, evaluation=evaluation(5.4)) for c in trio(5.4, 5.4, 5.4)]
    assert verdict(study(*twin), "training").winner == "too close to call"


def test_a_tiny_but_certain_difference_is_not_shown_as_zero():
    shared = evaluation(5.4)
    better = dataclasses.replace(shared, loss=5.399, windows=tuple(w - 0.001 for w in shared.windows))
    p_r, s_r, s_pr = trio(5.4, 5.4, 5.4)
    cells = (dataclasses.replace(p_r, evaluation=better), dataclasses.replace(s_r, evaluation=shared), s_pr)
    assert "ends 0.001 nats below" in judge(study(*cells)).sentences[0]


def test_interval_agrees_with_a_naive_loop():
    differences = np.random.default_rng(3).normal(0.02, 0.1, 40)
    generator = np.random.default_rng(99)
    means = []
    for _ in range(4000):
        picks = [differences[generator.integers(0, 40)] for _ in range(40)]
        means.append(sum(picks) / 40)
    means.sort()
    low, high = bootstrap_interval(differences)
    assert low == pytest.approx(means[100], abs=0.003)
    assert high == pytest.approx(means[3900], abs=0.003)


def test_interval_agrees_with_the_normal_approximation():
    differences = np.random.default_rng(4).normal(0.5, 0.2, 400)
    half = 1.96 * differences.std() / math.sqrt(400)
    low, high = bootstrap_interval(differences)
    assert low == pytest.approx(differences.mean() - half, abs=0.0015)
    assert high == pytest.approx(differences.mean() + half, abs=0.0015)


def test_interval_is_paired():
    """Windows vary by 0.3 for both models. Unpaired, that would hide a difference of 0.02."""
    results = study(*trio(5.40, 5.42, 5.42))
    training = verdict(results, "training")
    assert training.winner == "pruned"
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
    assert judge(study(p_r, s_r)).answer == "If the parent is already there, prune."
    assert judge(study(p_r, s_pr)).answer == "If the parent's tokens count, train from scratch."
    flops = [cell("wanda", name, loss, salt=i) for i, (name, loss) in enumerate((("S_F", 5.8), ("S_{P+F}", 5.9)))]
    assert judge(study(p_r, *flops)).answer == (
        "Counted in FLOPs: prune, whether or not the parent's FLOPs are counted."
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


def test_one_window_has_no_interval():
    single = [dataclasses.replace(c, evaluation=evaluation(5.4, windows=1)) for c in trio(5.4, 5.4, 5.4)]
    assert "fewer than two" in reason(*single)


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
    assert judgement.headlines["training"] == "At equal training tokens, pruning wins for both comparisons."
    assert "ends 0.90 nats below its from-scratch twins on average over two seeds" in judgement.sentences[0]


def test_seeds_that_disagree_are_too_close_to_call():
    judgement = judge(study(*seeded(0.2, -0.2)))
    assert [v.winner for v in judgement.by_seed if v.setting == "training"] == ["pruned", "scratch"]
    assert [v.winner for v in judgement.verdicts if v.setting == "training"] == ["too close to call"]


def test_a_failed_seed_is_left_out_and_reported():
    judgement = judge(study(*seeded(0.2, None, 0.4)))
    pooled = judgement.verdicts[0]
    assert (pooled.seeds, pooled.planned) == (2, 3)
    assert pooled.difference == pytest.approx(0.3)
    assert "on average over two of three seeds" in judgement.sentences[0]
    assert "5.700*" in text_table(judgement)
    none = judge(study(*seeded(None, None)))
    assert none.verdicts[0].reason == "the scratch run S_R has no held-out loss"


def test_pooled_interval_agrees_with_a_naive_loop():
    differences = np.random.default_rng(5).normal(0.1, 0.3, (3, 20)) + np.array([[0.0], [0.3], [0.6]])
    generator = np.random.default_rng(98)
    means = []
    for _ in range(6000):
        seeds, windows = generator.integers(0, 3, 3), generator.integers(0, 20, 20)
        means.append(sum(differences[seed, window] for seed in seeds for window in windows) / 60)
    means.sort()
    low, high = pooled_interval(differences)
    assert low == pytest.approx(means[150], abs=0.02)
    assert high == pytest.approx(means[5850], abs=0.02)


def test_pooled_interval_of_one_seed_is_the_paired_bootstrap():
    differences = np.random.default_rng(6).normal(0.02, 0.1, 50)
    assert pooled_interval(differences[None]) == pytest.approx(bootstrap_interval(differences), abs=1e-12)


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
        ([(5.4, 5.8)] * 3, "pruning wins for all three methods"),
        ([(5.8, 5.4)] * 3, "training from scratch wins for all three methods"),
        (
            [(5.4, 5.8), (5.8, 5.4), (5.4, 5.4)],
            "pruning wins for Minitron-depth; training from scratch wins for Minitron-width; "
            "Wanda is too close to call",
        ),
        ([(5.4, 5.8), (5.4, 5.9), (5.4, None)], "pruning wins for Minitron-depth and Minitron-width; Wanda is not"),
        ([(None, None)] * 3, "all three methods are not measured"),
    ],
)
def test_headlines(losses: list[tuple[float | None, float | None]], words: str):
    cells = [c for m, (p_r, s_r) in zip(METHODS, losses, strict=True) for c in trio(p_r, s_r, None, m)]
    assert judge(study(*cells)).headlines["training"].startswith(f"At equal training tokens, {words}")


def test_answers():
    assert judge(study(*trio(5.4, 5.8, 5.9))).answer == "Prune, whether or not the parent's tokens are counted."
    assert judge(study(*trio(5.4, 5.2, 5.1))).answer.startswith("Train from scratch, whether or not")
    assert judge(study(*trio(None, 5.2, 5.1))).answer.startswith("There is no answer yet")
    assert judge(study()).answer.startswith("There is no answer yet")
    assert judge(study(*trio(5.4, 5.8, None))).answer.endswith("there is no answer yet, as far as measured.")
    assert "wins or is too close to call" in judged(example).answer


@pytest.mark.parametrize("make", [example, broken, large])
def test_text_table_is_plain_and_narrow(make: Any):
    text = judged_text(make)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    if make is not large:  # whose forecasts take seconds; that they are the same again: test_forecast.py
        assert text == text_table(judge(make()))


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
