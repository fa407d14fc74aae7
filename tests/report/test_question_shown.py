"""A study's question in the report: what decides it, when it was declared, and what is exploratory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from example import R, example, large

from secateur.comparison.decision import adjust
from secateur.comparison.question import decisive
from secateur.comparison.records import DecisiveComparison, Declaration, StudyQuestion, StudyResults
from secateur.report.judgement import Judgement, answer_json, judge
from secateur.report.page import render
from secateur.report.terminal import text_summary, text_table


def asking(content: dict[str, Any], *methods: str, margin: float = 0.02) -> StudyQuestion:
    comparisons = tuple(DecisiveComparison("S_{P+R}", "parent", method, "0.5", R, "") for method in methods)
    return StudyQuestion(
        hash="now",
        content=content,
        comparisons=comparisons,
        metric="loss",
        margin=margin,
        ask="Does depth lose to its twin?",
        yes="the twin is lower",
        no="pruned is lower, or equal",
    )


def declared(results: StudyResults, question: StudyQuestion | None, *entries: tuple[str | None, int, Any]) -> Judgement:
    declarations = tuple(Declaration(*entry) for entry in entries)
    return judge(dataclasses.replace(results, question=question, declarations=declarations))


def test_only_the_comparisons_of_the_question_are_corrected_together_and_answer_it() -> None:
    plain = judge(large())
    one = declared(large(), asking({}, "minitron-depth"), ("now", 0, {}))
    (verdict,) = [v for v in one.verdicts if (v.setting, v.group.pooled) in decisive(one.results.question)]
    assert verdict.decision.comparisons == 1 and verdict.decision.adjusted_p == verdict.decision.p
    assert [v for v, _ in one.question.verdicts] == [verdict]
    before = next(v for v in plain.verdicts if (v.setting, v.group) == (verdict.setting, verdict.group))
    assert before.decision.comparisons > 1
    rest = [v for v in one.verdicts if v.setting == verdict.setting and v is not verdict]
    assert {v.decision.comparisons for v in rest} == {before.decision.comparisons - 1}

    both = declared(large(), asking({}, "minitron-depth", "wanda"), ("now", 0, {}))
    pair = [v for v, _ in both.question.verdicts]
    raw = [next(v.decision for v in plain.verdicts if (v.setting, v.group) == (d.setting, d.group)) for d in pair]
    expected = [d.adjusted_p for d in adjust([dataclasses.replace(d, adjusted_p=None) for d in raw])]
    assert [v.decision.adjusted_p for v in pair] == expected
    assert one.answer == "If the parent's tokens count, train from scratch."
    assert "it depends" in both.answer


def test_the_margin_of_the_question_is_that_of_the_verdicts() -> None:
    wide = declared(example(), asking({}, "minitron-width", margin=0.05), ("now", 0, {}))
    ((verdict, sentence),) = wide.question.verdicts
    assert verdict.winner == "equal within margin" and "within 0.05 nats" in sentence
    off = declared(example(), asking({}, "minitron-width", margin=0.0), ("now", 0, {}))
    assert off.question.verdicts[0][0].winner == "undecided"
    assert "No difference counts as equal." in off.question.rule


CONTENT = {"margin": 0.02, "yes": "a"}


@pytest.mark.parametrize(
    ("entries", "text", "late"),
    [
        ([("now", 0, CONTENT)], "declared before the first stage.", False),
        ([("old", 0, {}), ("now", 0, CONTENT)], "declared before the first stage.", False),
        ([("now", 3, CONTENT)], "declared after 3 stages had finished.", True),
        (
            [("old", 0, {"margin": 0.1, "yes": "a"}), ("now", 1, CONTENT)],
            "declared before the first stage. It was changed after 1 stage (margin).",
            True,
        ),
        (
            [("old", 0, {"margin": 0.1, "yes": "a"})],
            "Another question was declared before the first stage. This is not the question recorded: margin differs.",
            True,
        ),
        (
            [("now", 0, CONTENT), ("old", 2, {"margin": 0.1, "yes": "a"})],
            "This question was declared before the first stage. It was changed after 2 stages (margin). This is not",
            True,
        ),
        ([("old", 0, {"margin": 0.1, "yes": "b"})], "This is not the question recorded: margin and yes differ.", True),
        ([], "not recorded in the study's folder", True),
        (
            [("now", 0, CONTENT), (None, 4, None), ("now", 9, CONTENT)],
            "It was withdrawn after 4 stages. It was declared again after 9 stages.",
            True,
        ),
    ],
)
def test_it_says_when_the_question_was_declared_and_changed(entries: Any, text: str, late: bool) -> None:
    judgement = declared(example(), asking(CONTENT, "wanda"), *entries)
    assert text in " ".join(judgement.question.history)
    assert judgement.question.is_late is late
    assert ('class="caution"><b>Declared.' in render(judgement)) is late


def test_a_question_that_finished_stages_precede_is_not_recorded_before_the_runs() -> None:
    results = dataclasses.replace(example(), question=asking(CONTENT, "wanda"), stages_done=41)
    assert judge(results).question.history == (
        "This question was not recorded before the runs: 41 stages are finished. Running the study records it as late.",
    )
    recorded = dataclasses.replace(results, declarations=(Declaration("now", 0, CONTENT),))
    assert judge(recorded).question.history == ("The question was declared before the first stage.",)


def test_the_question_comes_first_and_the_rest_is_exploratory() -> None:
    judgement = declared(example(), asking(CONTENT, "minitron-depth"), ("now", 0, CONTENT))
    page, text = render(judgement), text_table(judgement)
    places = [page.index(f'id="{name}"') for name in ("question", "exploratory", "verdict", "ledger")]
    assert places == sorted(places)
    assert text.startswith(judgement.answer[:60])
    begins = ("Question: Does depth lose to its twin?\n", "Yes would be: the twin is lower")
    lines = (*begins, "No would be: pruned is lower, or equal", "Exploratory. ", "Parent: ")
    assert [text.index(line) for line in lines] == sorted(text.index(line) for line in lines)
    answer = answer_json(judgement)["question"]
    assert answer["hash"] == "now" and answer["margin"] == 0.02 and len(answer["verdicts"]) == 1
    assert answer["declarations"] == [{"hash": "now", "stages_done": 0}] and not answer["late"]


def test_a_study_without_a_question_says_so() -> None:
    judgement = declared(example(), None)
    for text in (text_table(judgement), text_summary(judgement)):
        assert text.startswith(judgement.answer[:60])
        assert text.index("This study declared no question before it ran") < text.index("method ")
    page = render(judgement)
    assert "declared no question" in page and 'id="exploratory"' not in page
    assert answer_json(judgement)["question"] is None
    removed = declared(example(), None, ("old", 0, {"ask": "Which one?"}))
    assert "The study file declares none, and is not the one recorded: Which one?" in removed.question.history[-1]
