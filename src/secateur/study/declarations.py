"""When a study's question was declared: ``question.json`` in the folder of its stages.

The file records the question before the first stage, and every later change with the number of the study's stages
that were finished then; stages of earlier versions of the study file do not count. It holds no time and no path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from secateur.comparison.question import is_recorded
from secateur.comparison.records import Declaration, StudyQuestion
from secateur.errors import UserError
from secateur.files import read_json, write_json
from secateur.progress import notify
from secateur.study.stage import Stage, unique
from secateur.study.store import Store

__all__ = ["count_finished", "read_declarations", "record_question"]

_FILE = "question.json"
_LEASE = "question"


def read_declarations(store: Store) -> tuple[Declaration, ...]:
    """The questions that a folder records, in their order; empty if it records none.

    Raises:
        UserError: if the file is damaged.
    """
    path = store.out / _FILE
    if not path.exists():
        return ()
    try:
        return tuple(Declaration(**entry) for entry in read_json(path))
    except TypeError:
        raise UserError(f"{path}: is damaged; restore it, or delete it to declare the question anew") from None


def count_finished(store: Store, stages: Iterable[Stage]) -> int:
    """How many different ones of a study's stages are finished."""
    return sum(store.done(stage) for stage in unique(stages))


def record_question(store: Store, question: StudyQuestion | None, stages: Iterable[Stage]) -> None:
    """Record the question in the folder unless it is the last one there; None withdraws the last one.

    Several processes may call this at once: one of them writes.

    Args:
        stages: all of the study; those that are finished are counted.
    """
    if is_recorded(question, read_declarations(store)):
        return
    lease = store.leases.wait(_LEASE, lambda: notify("another process is recording the question; this one waits"))
    assert lease is not None
    with lease:
        declarations = read_declarations(store)
        if is_recorded(question, declarations):
            return
        content = question.content if question else None
        entry = Declaration(question.hash if question else None, count_finished(store, stages), content)
        lease.check()
        write_json(store.out / _FILE, [asdict(declaration) for declaration in (*declarations, entry)])
