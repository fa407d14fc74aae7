"""Which comparisons decide a study's question, and whether it is the question that was declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from secateur.comparison.decision import MARGIN
from secateur.comparison.records import DecisiveComparison, Declaration, StudyQuestion
from secateur.comparison.twins import SCRATCH, Verdict

__all__ = ["changed_keys", "decisive", "first_declaration", "is_decisive", "is_recorded", "later_changes", "margin_of"]


def margin_of(question: StudyQuestion | None) -> float:
    """The margin within which losses count as equal, in nats per token: the question's, or the default."""
    return MARGIN if question is None else question.margin


def is_decisive(question: StudyQuestion | None, verdict: Verdict) -> bool:
    """Whether a verdict is of a comparison that decides the question."""
    group = verdict.group
    key = (group.parent, group.method, group.target, group.retrain_tokens, group.objective)
    return question is not None and DecisiveComparison(SCRATCH[verdict.setting], *key) in question.comparisons


def decisive(question: StudyQuestion | None, verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts that decide the question, in their order; none without a question."""
    return tuple(verdict for verdict in verdicts if is_decisive(question, verdict))


def first_declaration(declarations: Sequence[Declaration]) -> Declaration | None:
    """The question that was recorded first; of several from before the first stage, the last one."""
    early = [entry for entry in declarations if entry.stages_done == 0]
    return next(iter([*early[-1:], *declarations]), None)


def later_changes(declarations: Sequence[Declaration]) -> tuple[tuple[Declaration, Declaration], ...]:
    """Every change of the question after the first stage: what it was, and what it became."""
    pairs = itertools.pairwise(declarations)
    return tuple((old, new) for old, new in pairs if new.stages_done)


def changed_keys(old: Declaration, new: Declaration) -> list[str]:
    """The keys in which two questions differ; empty if either declares none."""
    if old.question is None or new.question is None:
        return []
    keys = dict.fromkeys((*old.question, *new.question))
    return [key for key in keys if old.question.get(key) != new.question.get(key)]


def is_recorded(question: StudyQuestion | None, declarations: Sequence[Declaration]) -> bool:
    """Whether the study's folder records this question as its last one."""
    last = declarations[-1].hash if declarations else None
    return last == (question.hash if question else None)
