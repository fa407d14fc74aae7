"""Sentences about the question of a study. ASCII, except for the minus sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.comparison.decision import LEVEL
from secateur.comparison.question import changed_keys, decisive, first_declaration, is_recorded, later_changes
from secateur.comparison.records import Declaration, StudyResults
from secateur.comparison.twins import Verdict
from secateur.formatting import join_words, plural, probability, spelled

__all__ = ["EXPLORATORY", "QuestionText", "question_json", "question_text"]

#: Below the heading "Exploratory", which stands above everything that does not decide the question.
EXPLORATORY = (
    "What follows does not decide the question; the comparisons that do appear again among the others. It suggests "
    "questions for another study."
)
_UNDECLARED = "This study declared no question before it ran, so all of its comparisons are exploratory."


@dataclass(frozen=True)
class QuestionText:
    """A study's question as a report shows it.

    Attributes:
        ask: the question; None if the study declares none.
        history: when it was declared and changed, in sentences.
        is_late: whether it was declared or changed after the first stage, or is not the recorded one.
        rule: what its verdicts need, in a sentence; empty without a question.
        verdicts: those that decide, each with its sentence.
        criteria: what would count as yes and as no, as name and text.
    """

    ask: str | None
    history: tuple[str, ...]
    is_late: bool
    rule: str = ""
    verdicts: tuple[tuple[Verdict, str], ...] = ()
    criteria: tuple[tuple[str, str], ...] = ()


def question_text(results: StudyResults, verdicts: Sequence[Verdict], sentences: Sequence[str]) -> QuestionText:
    """Describe the question of a study with the verdicts that decide it.

    Args:
        verdicts: all of the study's, corrected for their number.
        sentences: one for each verdict.
    """
    question, declarations = results.question, results.declarations
    late = not is_recorded(question, declarations) or any(entry.stages_done for entry in declarations)
    if question is None:
        return QuestionText(None, _history(results) or (_UNDECLARED,), late)
    names = set(decisive(question))
    pairs = zip(verdicts, sentences, strict=True)
    rows = [(verdict, text) for verdict, text in pairs if (verdict.setting, verdict.group.pooled) in names]
    return QuestionText(
        ask=question.ask or "Which path ends with the lower held-out loss?",
        history=_history(results),
        is_late=late,
        rule=_rule(len(names), question.margin),
        verdicts=tuple((verdict, f"{text} {_p_sentence(verdict)}".strip()) for verdict, text in rows),
        criteria=tuple((name, text) for name, text in (("Yes", question.yes), ("No", question.no)) if text),
    )


def _rule(comparisons: int, margin: float) -> str:
    decide = "One comparison decides" if comparisons == 1 else f"{spelled(comparisons).capitalize()} comparisons decide"
    holm = "each needs p < 0.05 after Holm's correction for their number"
    equal = f"Losses within {margin:g} nats count as equal." if margin else "No difference counts as equal."
    return f"{decide}: {holm if comparisons > 1 else 'it needs p < 0.05'}. {equal}"


def _p_sentence(verdict: Verdict) -> str:
    """The p of a verdict, by itself and corrected; empty where it has none, or where its reason has both."""
    decision = verdict.decision
    p, corrected = decision.p, decision.adjusted_p
    if p is None or (corrected is not None and p < LEVEL <= corrected):
        return ""
    if corrected is None or decision.comparisons == 1:
        return f"p {_equals(p)}."
    return f"p {_equals(p)} by itself, {probability(corrected)} corrected."


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def _history(results: StudyResults) -> tuple[str, ...]:
    """When the question was declared, every change after the first stage, and whether the file still has it."""
    question, declarations = results.question, results.declarations
    first, texts = first_declaration(declarations), []
    if first is not None:
        when = (
            f"after {plural(first.stages_done, 'stage')} had finished"
            if first.stages_done
            else "before the first stage"
        )
        texts.append(f"{_recorded_name(results, first)} was declared {when}.")
    for old, new in later_changes(declarations):
        keys = changed_keys(old, new)
        verb = "withdrawn" if new.hash is None else "changed" if old.hash else "declared again"
        texts.append(
            f"It was {verb} after {plural(new.stages_done, 'stage')}{f' ({join_words(keys)})' if keys else ''}."
        )
    if not is_recorded(question, declarations):
        texts.append(_unrecorded(results))
    return tuple(texts)


def _recorded_name(results: StudyResults, first: Declaration) -> str:
    """What a sentence calls the first recorded question, beside that of the study file."""
    question = results.question
    if is_recorded(question, results.declarations):
        return "The question"
    if question is None:
        return "A question"
    return "This question" if first.hash == question.hash else "Another question"


def _unrecorded(results: StudyResults) -> str:
    """How the question of the study file differs from the recorded one."""
    question, declarations = results.question, results.declarations
    last = declarations[-1] if declarations else None
    if last is None or last.question is None:
        if results.stages_done:
            finished = f"{plural(results.stages_done, 'stage')} {'is' if results.stages_done == 1 else 'are'} finished"
            return f"This question was not recorded before the runs: {finished}. Running the study records it as late."
        return "The question is not recorded in the study's folder; running the study records it."
    if question is None:
        return f"The study file declares none, and is not the one recorded: {last.question.get('ask') or last.hash}"
    now, before = question.content, last.question
    keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    return f"This is not the question recorded: {join_words(keys)} differ{'s' if len(keys) == 1 else ''}."


def question_json(results: StudyResults, text: QuestionText) -> dict[str, Any] | None:
    """The question as plain values; None if the study neither declares nor records one."""
    question = results.question
    if question is None and not results.declarations:
        return None
    return {
        "hash": question.hash if question else None,
        **(question.content if question else {}),
        "history": list(text.history),
        "late": text.is_late,
        "declarations": [{"hash": d.hash, "stages_done": d.stages_done} for d in results.declarations],
        "verdicts": [sentence for _, sentence in text.verdicts],
    }
