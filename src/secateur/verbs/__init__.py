"""What each verb does: arguments in; a JSON-able answer, its text for people, and the exit code out."""

from secateur.runtime import quiet
from secateur.verbs.data import data
from secateur.verbs.describe import inspect, shapes
from secateur.verbs.evaluation import compare, evaluate
from secateur.verbs.pruning import prune
from secateur.verbs.studies import demo, study_plan, study_report, study_run, study_status
from secateur.verbs.training import train

__all__ = [
    "compare",
    "data",
    "demo",
    "evaluate",
    "inspect",
    "prune",
    "shapes",
    "study_plan",
    "study_report",
    "study_run",
    "study_status",
    "train",
]

quiet()
