"""What the first screen of a page and the first lines of a terminal say: the decisive comparisons and the cost."""

from __future__ import annotations

from secateur.comparison.ledger import pieces
from secateur.comparison.twins import Verdict
from secateur.formatting import duration, plural, scientific
from secateur.report.judgement import Judgement

__all__ = ["cost_sentence", "forest_verdicts"]

_MOST_ROWS = 8  # of the figure, so that it fits a screen


def forest_verdicts(judgement: Judgement) -> tuple[list[Verdict], int]:
    """The comparisons of the first figure, and how many the figure leaves out.

    They are those that decide the question, else all; the first ones of each setting in turn, if they are many.
    """
    verdicts = [verdict for verdict, _ in judgement.question.verdicts] or list(judgement.verdicts)
    settings = {verdict.setting: None for verdict in verdicts}
    share = max(1, _MOST_ROWS // max(1, len(settings)))
    if len(verdicts) > _MOST_ROWS:
        rows = [row for setting in settings for row in [v for v in verdicts if v.setting == setting][:share]]
        return rows, len(verdicts) - len(rows)
    return verdicts, 0


def cost_sentence(judgement: Judgement) -> str:
    """What the study's work took in all, as far as it was recorded."""
    costs = [row["cost"] for row in pieces(judgement.index)]
    recorded = [cost for cost in costs if cost is not None]
    if not recorded:
        return "Not recorded."
    flops, seconds = sum(cost.flops for cost in recorded), sum(cost.seconds or 0.0 for cost in recorded)
    runs = plural(len(judgement.results.cells), "trained model")
    missing = len(costs) - len(recorded)
    note = f" {plural(missing, 'piece')} of work left no record of its cost." if missing else ""
    return f"{runs}, {scientific(flops)} FLOPs, {duration(seconds)} of device time, the parent included.{note}"
