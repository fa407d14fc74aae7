"""recommend: prune or train from scratch, by the evidence nearest to the question, with its cost."""

from __future__ import annotations

from argparse import Namespace

from secateur.cli.verbs.answer import Answer, request_of
from secateur.forecast.request import RecommendRequest

__all__ = ["recommend"]


def recommend(arguments: Namespace) -> Answer:
    """``secateur recommend``."""
    request = request_of(RecommendRequest, arguments)
    from secateur.api import run_recommendation
    from secateur.cli.verbs.recommend_text import text

    answer = run_recommendation(request)
    return answer, text(answer), 0
