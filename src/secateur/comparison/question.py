"""Which comparisons decide a study's question, and whether it is the question that was declared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from secateur.comparison.decision import MARGIN
from secateur.comparison.index import Group
from secateur.comparison.records import Declaration, StudyQuestion
from secateur.comparison.twins import SCRATCH, Setting

__all__ = ["changed_keys", "decisive", "first_declaration", "is_recorded", "later_changes", "margin_of"]


def decisive(question: StudyQuestion | None) -> tuple[tuple[Setting, Group], ...]:
    """Setting and group, without a seed, of each comparison that decides a question; none without a question."""
    settings: dict[str, Setting] = {twin: setting for setting, twin in SCRATCH.items()}
    return tuple(
        (settings[c.twin], Group(c.parent, c.method, c.target, c.retrain_tokens, c.objective, None))
        for c in (question.comparisons if question else ())
    )


def margin_of(question: StudyQuestion | None) -> float:
    """The margin within which losses count as equal, in nats per token: the question's, or the default."""
    return MARGIN if question is None else question.margin


def first_declaration(declarations: Sequence[Declaration]) -> Declaration | None:
    """The question that was recorded first; of several from before the first stage, the last one."""
    early = [entry for entry in declarations if entry.stages_done == 0]
    return next(iter([*early[-1:], *declarations]), None)


def later_changes(declarations: Sequence[Declaration]) -> tuple[tuple[Declaration, Declaration], ...]:
    """Every change of the question after the first stage: what it was, and what it became."""
    return tuple((old, new) for old, new in itertools.pairwise(declarations) if new.stages_done)


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
