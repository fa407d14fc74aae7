"""What each verb does: arguments in; a JSON-able answer, its text for people, and the exit code out."""

from secateur.runtime import quiet
from secateur.verbs.data import data
from secateur.verbs.describe import inspect, shapes
from secateur.verbs.evaluation import compare, evaluate
from secateur.verbs.planning import study_plan
from secateur.verbs.pruning import prune
from secateur.verbs.recommend import recommend
from secateur.verbs.studies import (
    demo,
    study_explain,
    study_report,
    study_run,
    study_stage,
    study_status,
)
from secateur.verbs.training import train

__all__ = [
    "compare",
    "data",
    "demo",
    "evaluate",
    "inspect",
    "prune",
    "recommend",
    "shapes",
    "study_explain",
    "study_plan",
    "study_report",
    "study_run",
    "study_stage",
    "study_status",
    "train",
]

quiet()
