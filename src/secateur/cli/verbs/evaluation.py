"""eval and compare: how good checkpoints are and what they cost, side by side; and whether a difference is one."""

from __future__ import annotations

from argparse import Namespace

from secateur.cli.verbs.answer import Answer, request_of
from secateur.evaluation.request import EvaluateRequest

__all__ = ["compare", "evaluate"]


def evaluate(arguments: Namespace) -> Answer:
    """``secateur eval MODEL [MODEL ...]``."""
    names = tuple(name.strip() for text in arguments.names for name in text.split(",")) or None
    request = request_of(EvaluateRequest, arguments, models=tuple(arguments.models), names=names)
    from secateur.cli.verbs.scores import results_table
    from secateur.evaluation import job

    results, notes = job.evaluate(request)
    answer = {"results": [result.record() for result in results], "notes": notes}
    return answer, "\n".join([results_table(results), *(f"note: {note}" for note in notes)]), 0


def compare(arguments: Namespace) -> Answer:
    """``secateur compare A[,A...] B[,B...]``."""
    from secateur import api
    from secateur.cli.verbs.scores import comparison_table

    sides = [api.load_results(side.split(",")) for side in (arguments.a, arguments.b)]
    comparisons = api.compare(*sides, margin=arguments.margin)
    names = [[result.name for result in side] for side in sides]
    answer = {"a": names[0], "b": names[1], "comparisons": [comparison.record() for comparison in comparisons]}
    return answer, comparison_table(comparisons, *names), 0
