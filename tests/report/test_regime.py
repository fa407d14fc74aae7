"""Whether a study's regime is its question's: nothing is said that the records do not show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from example import SHAPE, cell, evaluation, example, judged, judged_page, pruned

from secateur.cli import main
from secateur.comparison.index import Index
from secateur.comparison.records import Cell, Cost, Evaluation, Parent, PrunedModel, StudyResults
from secateur.comparison.regime import PUBLISHED, RateSweeps, Regime, TokenShare, regimes
from secateur.config import dump_yaml
from secateur.model.shapes import Shape
from secateur.report.judgement import answer_json, judge
from secateur.report.page import render
from secateur.report.regime_prose import regime_sentences, sweeps_sentence, tokens_sentence
from secateur.report.terminal import text_table
from secateur.study.session import Study

CAUTION = "tells little about pruning a well-trained parent"
STUDIES = Path(__file__).parents[2] / "studies"


def parent(loss: float | Evaluation | None, name: str = "parent", **changes: Any) -> Parent:
    """A parent of 20 tokens for each parameter, unless ``changes`` say otherwise."""
    measured = evaluation(loss, 99) if isinstance(loss, float) else loss
    made = example().parents[0]
    changes = {"cost": Cost(20 * made.parameters, 1e14), **changes}
    return dataclasses.replace(made, name=name, evaluation=measured, **changes)


def runs(
    method: str = "minitron-depth",
    before: float | None = 5.5,
    after: float | None = 5.4,
    twin: float | None = 5.6,
    *,
    seeds: tuple[int, ...] = (0,),
    **at: Any,
) -> tuple[list[PrunedModel], list[Cell]]:
    """A pruned model, its retrained one and its twin on P+R tokens, with a loss each; None: not measured."""
    model = pruned(method, target=at.get("target", "0.5"), parent=at.get("parent", "parent"))
    model = dataclasses.replace(model, evaluation=None if before is None else evaluation(before, 50))
    salt = hash_of(method, at.get("target", "0.5"), at.get("tokens", 0))
    cells = [
        cell(method, name, loss, seed=seed, salt=salt + 10 * seed + i, **at)
        for seed in seeds
        for i, (name, loss) in enumerate((("P-R", after), ("S_{P+R}", twin)))
    ]
    return [model], cells


def hash_of(*parts: object) -> int:
    """A number that differs between comparisons, so that no two models are the same."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(str(parts)))


def study(parents: Parent | list[Parent], *comparisons: tuple[list[PrunedModel], list[Cell]]) -> StudyResults:
    return dataclasses.replace(
        example(),
        parents=tuple(parents) if isinstance(parents, list) else (parents,),
        pruned=tuple({(m.parent, m.method, m.target): m for models, _ in comparisons for m in models}.values()),
        cells=tuple(run for _, cells in comparisons for run in cells),
    )


def regime(results: StudyResults) -> Regime:
    (only,) = regimes(Index(results))
    return only


def verdicts(checks: Any) -> list[str]:
    return [check.decision.verdict for check in checks]


def lines(results: StudyResults) -> list[str]:
    return regime_sentences(regime(results), several_parents=False)  # type: ignore[return-value]


# --- tokens for each parameter ----------------------------------------------------------------------------------------


def test_the_published_share_is_that_of_its_shape_and_steps() -> None:
    llama = Shape(4096, 14336, 32, 32, 8, 128, 128_256)
    assert (PUBLISHED.parameters, PUBLISHED.non_embedding) == (llama.total, llama.non_embedding)
    assert PUBLISHED.tokens == 50_000 * 512 * 8192
    assert (PUBLISHED.per_parameter, PUBLISHED.per_non_embedding) == pytest.approx((26.1, 30.0), abs=0.05)


def test_tokens_for_each_parameter_are_exact_and_stand_beside_the_published_ones() -> None:
    share = regime(study(parent(5.2, cost=Cost(700_000, 1e14)), runs())).share
    assert share == TokenShare(700_000, 1_712_640, 1_188_352)
    assert tokens_sentence("the parent", share) == (
        "The parent trains on 0.409 tokens for each of its parameters (0.589 for each outside the embeddings); in the "
        "published study (arXiv:2606.14150) it is 26 (30)."
    )


def test_unknown_tokens_are_no_number() -> None:
    results = study(parent(5.2, cost=None, curve=()), runs())
    share = regime(results).share
    assert (share.tokens, share.per_parameter, share.per_non_embedding) == (None, None, None)
    assert tokens_sentence("the parent", share).startswith("How many tokens the parent was trained on for each")
    assert json.loads(json.dumps(answer_json(judge(results))))["regime"][0]["tokens_per_parameter"] is None


# --- the parent beside its twins --------------------------------------------------------------------------------------


def test_a_parent_that_loses_to_its_smaller_twin_is_the_first_thing_said() -> None:
    """Directly under the answer, in the terminal and on the page, and in the data."""
    results = study(parent(5.4), runs(twin=5.2))
    judgement = judge(results)
    caution = (
        f"This study {CAUTION}: the parent has a higher loss than its twin S_{{P+R}} of Minitron-depth at ratio 0.5, "
        "so it has learned less than its size allows."
    )
    assert judgement.caution == caution
    words = " ".join(text_table(judgement).split())
    assert f"{judgement.answer} {caution}" in words.replace("from- scratch", "from-scratch")
    html = render(judgement)
    first_screen = html[html.index('<p class="answer">') : html.index('<nav id="contents"')]
    assert f'<p class="caution"><b>Regime.</b> This study {CAUTION}' in first_screen
    assert answer_json(judgement)["caution"] == caution


def test_a_parent_that_beats_its_twins_has_no_caution() -> None:
    results = study(parent(5.0), runs(twin=5.2), runs("wanda", twin=5.1))
    assert verdicts(regime(results).twins) == ["first", "first"]
    assert judge(results).caution == ""
    assert 'class="caution"' not in render(judge(results)) and CAUTION not in text_table(judge(results))
    assert answer_json(judge(results))["caution"] is None
    assert lines(results)[1] == "The parent's held-out loss, beside that of its twins S_{P+R}: lower for both."


@pytest.mark.parametrize(
    ("own", "twin", "reason"),
    [
        (None, 5.0, "a held-out loss is missing"),
        (5.4, None, "a held-out loss is missing"),
        (5.4, float("nan"), "not finite"),
    ],
)
def test_a_loss_that_is_missing_is_not_measured(own: float | None, twin: float | None, reason: str) -> None:
    results = study(parent(own), runs(twin=twin))
    (check,) = regime(results).twins
    assert check.decision.verdict == "not measured" and reason in check.decision.reason
    assert "not measured for Minitron-depth at ratio 0.5" in lines(results)[1]
    assert not judge(results).caution


def test_losses_under_several_protocols_are_not_compared() -> None:
    foreign = dataclasses.replace(evaluation(5.0), protocol="another")
    models, cells = runs()
    cells[1] = dataclasses.replace(cells[1], evaluation=foreign)
    (check,) = regime(study(parent(5.4), (models, cells))).twins
    assert check.decision.verdict == "not measured" and "protocols" in check.decision.reason


def test_a_study_without_twins_says_so() -> None:
    models, cells = runs()
    results = study(parent(5.4), (models, cells[:1]))
    assert regime(results).twins == ()
    assert lines(results)[1].endswith("is not measured: the study has no run S_{P+R}.")
    results = study(parent(5.4), (models, cells[1:]))
    assert regime(results).retraining == ()
    assert lines(results)[2].endswith("is not measured: the study has no run P-R.")


def test_few_documents_show_no_weak_parent() -> None:
    """However large the difference is."""
    models, cells = runs()
    cells[1] = dataclasses.replace(cells[1], evaluation=evaluation(3.0, 1, windows=19))
    results = study(parent(evaluation(6.0, 2, windows=19)), (models, cells))
    assert verdicts(regime(results).twins) == ["undecided"]
    assert not judge(results).caution


def test_a_level_parent_does_not_lose() -> None:
    """A twin that is certainly better, by less than the margin."""
    shared = evaluation(5.4)
    better = dataclasses.replace(shared, loss=5.39, windows=tuple(w - 0.01 for w in shared.windows))
    models, cells = runs()
    cells[1] = dataclasses.replace(cells[1], evaluation=better)
    results = study(parent(shared), (models, cells))
    assert verdicts(regime(results).twins) == ["equal within margin"]
    assert "equal within 0.02 nats for Minitron-depth" in lines(results)[1]
    assert not judge(results).caution


def test_seeds_decide_together() -> None:
    """A parent that one seed's twin beats and another's does not is undecided; each seed alone would decide."""

    def seeded(*twins: float) -> StudyResults:
        each = [runs(twin=loss, seeds=(seed,)) for seed, loss in enumerate(twins)]
        return study(parent(5.4), *each)

    assert verdicts(regime(seeded(5.0, 5.8)).twins) == ["undecided"]
    assert not judge(seeded(5.0, 5.8)).caution
    both = regime(seeded(5.1, 5.11, 5.12)).twins
    assert verdicts(both) == ["second"] and both[0].decision.seeds == 3
    assert judge(seeded(5.1, 5.11, 5.12)).caution


def test_each_seed_has_its_own_parent_and_pruned_model() -> None:
    """Seed 0's parent and pruned model are paired with seed 0's runs, and never with another seed's."""
    losses = {0: (5.4, 5.5, 5.3, 5.1), 1: (6.4, 6.5, 6.3, 6.1), 2: (4.4, 4.5, 4.3, 4.1)}
    parents, models, cells = [], [], []
    for seed, (own, before, after, twin) in losses.items():
        parents.append(parent(evaluation(own, seed), seed=seed))
        (model,), each = runs(before=before, after=after, twin=twin, seeds=(seed,))
        models.append(dataclasses.replace(model, seed=seed))
        cells += each
    results = dataclasses.replace(study(parents, ([], cells)), pruned=tuple(models), seeds_vary="all")
    (twin,), (retrained,) = regime(results).twins, regime(results).retraining
    assert (twin.decision.verdict, twin.decision.seeds) == ("second", 3)
    assert twin.decision.value == pytest.approx(-0.3) and retrained.decision.value == pytest.approx(0.2)
    incomplete = dataclasses.replace(results, parents=(parents[0], parents[2]))
    (twin,) = regime(incomplete).twins
    assert twin.decision.seeds == 2
    assert twin.decision.value == pytest.approx(-0.3), "seed 1 has no parent, and no other's is taken"


def test_each_parent_has_its_own_twins() -> None:
    parents = [parent(5.0, "strong"), parent(5.4, "weak")]
    results = study(parents, runs(twin=5.2, parent="strong"), runs("wanda", twin=5.2, parent="weak"))
    strong, weak = regimes(Index(results))
    assert (verdicts(strong.twins), verdicts(weak.twins)) == (["first"], ["second"])
    caution = judge(results).caution
    assert caution.startswith(f"This study with parent weak {CAUTION}") and "strong" not in caution
    assert "Parent strong trains on" in text_table(judge(results))


def test_a_sparse_twin_counts_and_is_named_as_one_of_the_parents_shape() -> None:
    caution = judge(study(parent(5.4), runs(twin=5.6), runs("wanda", twin=5.2))).caution
    assert "its twin S_{P+R} of Wanda at ratio 0.5 (sparse, of the parent's shape), so" in caution


def test_many_better_twins_are_counted_by_kind() -> None:
    comparisons = [
        runs(method, twin=5.2, target=target) for method in ("minitron-depth", "wanda") for target in ("0.5", "0.6")
    ]
    assert "than all 4 of its twins S_{P+R} (2 smaller; 2 sparse, of its own shape)" in (
        judge(study(parent(5.4), *comparisons)).caution
    )
    better = judge(study(parent(5.4), *comparisons, runs("minitron-width", twin=5.6))).caution
    assert "than 4 of its 5 twins S_{P+R} (2 smaller" in better


def test_a_twin_of_several_comparisons_counts_once() -> None:
    """Two ratios of one shape share it."""
    models, cells = runs(twin=5.2)
    others, again = runs(twin=5.2, target="0.55")
    again[1] = dataclasses.replace(again[1], evaluation=cells[1].evaluation)
    (check,) = regime(study(parent(5.4), (models, cells), (others, again))).twins
    assert check.group.target == "0.5"


def test_several_twins_hide_none_that_is_better() -> None:
    """A twin that is better by an amount that a single comparison calls certain, p = .03, among six."""
    alone, among = regime(one_sided(0.0254, 0)), regime(one_sided(0.0254, 5))
    assert verdicts(alone.twins) == ["second"] and alone.twins[0].decision.p == pytest.approx(0.03, abs=0.002)
    assert verdicts(among.twins)[0] == "second" and judge(one_sided(0.0254, 5)).caution


def one_sided(difference: float, others: int) -> StudyResults:
    """A twin below the parent by ``difference`` and noise of 0.09 nats a window; others are level."""
    base = evaluation(5.4)

    def noisy(shift: float) -> Evaluation:
        windows = tuple(w - shift + (0.09 if i % 2 else -0.09) for i, w in enumerate(base.windows))
        return dataclasses.replace(base, loss=5.4 - shift, windows=windows)

    comparisons = []
    for number in range(others + 1):
        models, cells = runs(target=f"0.{number + 1}")
        twin = noisy(difference if number == 0 else number * 1e-6)
        comparisons.append((models, [cells[0], dataclasses.replace(cells[1], evaluation=twin)]))
    return study(parent(base), *comparisons)


# --- retraining -------------------------------------------------------------------------------------------------------


def test_retraining_that_raises_the_loss_is_said_at_once() -> None:
    results = study(
        parent(5.0), runs(before=5.2, after=5.4), runs("wanda", before=5.4, after=5.2), runs("minitron-width", None)
    )
    assert verdicts(regime(results).retraining) == ["second", "first", "not measured"]
    assert lines(results)[2] == (
        "The loss after retraining, beside that which pruning left: higher for Minitron-depth at ratio 0.5; lower for "
        "Wanda at ratio 0.5; not measured for Minitron-width at ratio 0.5."
    )
    assert judge(results).caution == (
        f"This study {CAUTION}: retraining raised the loss that pruning left in 1 of 3 comparisons, so P-R measures "
        "the retraining as much as the pruning."
    )


def test_both_reasons_stand_in_one_sentence() -> None:
    caution = judge(study(parent(5.4), runs(before=5.2, after=5.4, twin=5.1))).caution
    assert caution.count("This study") == 1 and "its size allows; and retraining raised" in caution
    assert "left of Minitron-depth at ratio 0.5, so" in caution


def test_each_budget_of_a_ladder_is_a_comparison() -> None:
    """The shortest retraining may raise a loss that the longest lowers."""
    ladder = [runs(before=5.4, after=loss, tokens=tokens) for tokens, loss in ((50_000, 5.6), (200_000, 5.2))]
    results = study(parent(5.0), *ladder)
    assert verdicts(regime(results).retraining) == ["second", "first"]
    assert "higher for Minitron-depth at ratio 0.5 (R = 50\u00a0k)" in lines(results)[2]


def test_many_comparisons_are_counted_by_method() -> None:
    ladder = [
        runs(method, before=5.2, after=5.5 if method == "wanda" or tokens < 3000 else 5.0, tokens=tokens)
        for method in ("minitron-depth", "wanda")
        for tokens in range(1000, 6000, 1000)
    ]
    assert "higher for 7 of 10 (Minitron-depth: 2, Wanda: 5)" in lines(study(parent(4.9), *ladder))[2]


def test_a_parent_of_few_tokens_is_said_to_be_undertrained_though_no_twin_was_run() -> None:
    few = study(parent(5.0, cost=Cost(700_000, 1e14)), runs(before=5.6, after=5.4, twin=None))
    assert judge(few).caution == (
        f"This study {CAUTION}: the parent read 0.409 tokens for each of its parameters, where that of the published "
        "study read 26."
    )
    assert judge(study(parent(5.0), runs(before=5.6, after=5.4, twin=None))).caution == ""


def test_the_page_has_every_comparison_with_its_interval() -> None:
    results = study(parent(5.4), runs(before=5.2, after=5.4, twin=5.1), runs("wanda", None, twin=None))
    html = render(judge(results))
    section = html[html.index('<section class="part" id="regime"') :].split("</section>")[0]
    assert section.count("<tr><th scope=") == 4 + 1
    assert section.count("a held-out loss is missing") == 2
    assert "\u22120.300" in section and "None" not in section


def test_data_name_what_was_compared() -> None:
    answer = answer_json(judge(study(parent(5.4), runs(before=5.2, after=5.4, twin=5.1), runs("wanda", None))))
    (row,) = json.loads(json.dumps(answer, allow_nan=False))["regime"]
    assert row["tokens_per_parameter"] == 20.0
    assert row["published"]["tokens"] == PUBLISHED.tokens
    first = row["twins"][0]
    assert (first["method"], first["verdict"], first["sparse"]) == ("minitron-depth", "second", False)
    assert first["difference"] == pytest.approx(-0.3) and first["interval"][0] < -0.3 < first["interval"][1]
    assert 0 < first["p"] < 0.05
    missing = row["retraining"][1]
    assert (missing["verdict"], missing["difference"], missing["interval"]) == ("not measured", None, None)


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweeps", "sentence"),
    [
        (RateSweeps(False, False, False), "Learning rates are not swept."),
        (RateSweeps(None, None, None), "Learning rates are not swept."),
        (
            RateSweeps(False, True, True),
            "Learning rates are swept for training from scratch and retraining, not for the parent.",
        ),
        (RateSweeps(None, True, True), "Learning rates are swept for training from scratch and retraining."),
        (RateSweeps(True, False, None), "Learning rates are swept for the parent, not for training from scratch."),
    ],
)
def test_swept_rates_are_named_by_path(sweeps: RateSweeps, sentence: str) -> None:
    assert sweeps_sentence(sweeps) == sentence


def test_a_path_is_swept_where_all_its_runs_are() -> None:
    models, cells = runs()
    (others, more) = runs("wanda")
    sweep = Cost(1000, 1e9)
    swept = [dataclasses.replace(cells[0], sweep=sweep), dataclasses.replace(cells[1], sweep=sweep)]
    part = [dataclasses.replace(more[0], sweep=sweep), more[1]]
    assert regime(study(parent(5.0), (models, swept), (others, part))).sweeps == RateSweeps(False, False, True)
    assert regime(study(parent(5.0, curve=(), cost=None), (models, swept))).sweeps == RateSweeps(None, True, True)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_known_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "plan", str(STUDIES / "demo.yaml")]) == 0
    text = capsys.readouterr().out
    plan = Study.load(STUDIES / "demo.yaml").plan()
    (share,) = plan.parents.values()
    assert share.tokens == 3_235_840
    assert tokens_sentence("the parent", share) in text and "Learning rates are not swept." in text
    assert main(["study", "plan", str(STUDIES / "demo.yaml"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parents"]["parent"]["tokens_per_parameter"] == 3_235_840 / share.parameters
    assert data["sweeps"] == {"parent": False, "scratch": False, "retraining": False}


def test_the_plan_of_the_published_study_is_the_published_share() -> None:
    plan = Study.load(STUDIES / "paper-llama31-8b.yaml").plan()
    assert plan.parents["own"] == PUBLISHED
    assert plan.parents["public"].per_parameter == pytest.approx(1868, abs=1)


def test_the_plan_of_a_sweep_and_of_a_checkpoint_without_tokens(tmp_path: Path) -> None:
    sizes = {"hidden": 16, "ffn": 48, "layers": 4, "heads": 4, "kv_heads": 2}
    content = {
        "name": "micro",
        "corpus": {"vocabulary": 280},
        "parents": {"own": {"tokens": "16k", **sizes}, "public": {"checkpoint": "a/b", "vocabulary": 280, **sizes}},
        "methods": [
            "minitron-depth",
            {"method": "wanda", "parent": "public", "settings": "equal_training_tokens"},
        ],
        "ratios": 0.5,
        "retrain": {"tokens": 4096},
        "sweep": {"rates": [1e-3, 3e-3]},
        "calibration": {"windows": 8},
        "recipe": {"sequence": 32, "tokens_per_step": 64},
    }
    path = tmp_path / "micro.yaml"
    path.write_text(dump_yaml(content), encoding="utf-8")
    plan = Study.load(path).plan()
    assert plan.sweeps == RateSweeps(parent=False, scratch=True, retraining=True)
    assert plan.parents["public"].tokens is None
    text = str(plan)
    assert "Parent own trains on" in text and "How many tokens parent public was trained on" in text


def test_the_example_is_the_smallest_of_such_studies() -> None:
    """The examples of all other tests: their parent is weak, and each of their pages says so first."""
    assert SHAPE["layers"] == 6
    assert CAUTION in judged(example).caution and 'class="caution"' in judged_page(example)
