"""Prune a language model, or train a small one from scratch? Secateur measures both and reports which pays.

The functions and classes named here are the Python API; see :mod:`secateur.api`. Each is imported on first use, so that
``import secateur`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.api import (
        build_corpus,
        compare,
        evaluate,
        inspect,
        mask,
        prune,
        recommend,
        search,
        shapes,
        teach,
        train,
    )
    from secateur.comparison.items import Comparisons
    from secateur.data.job import Corpus
    from secateur.errors import RunError, UserError
    from secateur.evaluation.results import EvaluationResults
    from secateur.model.plan import Plan
    from secateur.pruning.job import Pruned
    from secateur.study.session import Study
    from secateur.training.job import Trained
    from secateur.training.keep_masks import KeepMasks
    from secateur.training.recipe import Recipe
    from secateur.training.teach import SavedLogits

__all__ = [
    "Comparisons",
    "Corpus",
    "EvaluationResults",
    "KeepMasks",
    "Plan",
    "Pruned",
    "Recipe",
    "RunError",
    "SavedLogits",
    "Study",
    "Trained",
    "UserError",
    "__version__",
    "build_corpus",
    "compare",
    "evaluate",
    "inspect",
    "mask",
    "prune",
    "recommend",
    "search",
    "shapes",
    "teach",
    "train",
]

_HOMES = {
    "Comparisons": "comparison.items",
    "Corpus": "data.job",
    "EvaluationResults": "evaluation.results",
    "KeepMasks": "training.keep_masks",
    "Plan": "model.plan",
    "Pruned": "pruning.job",
    "Recipe": "training.recipe",
    "RunError": "errors",
    "SavedLogits": "training.teach",
    "Study": "study.session",
    "Trained": "training.job",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    """List the API."""
    return sorted(__all__)
