"""LaTeX tables for a paper, with booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.twins import SCRATCH
from secateur.formatting import MINUS, loss, number
from secateur.report.forecast_prose import ACCOUNT_NAMES, crossover_brief
from secateur.report.judgement import Judgement

__all__ = ["comparisons_tex", "escaped", "forecasts_tex"]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MINUS: "$-$",
    "\u00a0": "~",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escaped(text: str) -> str:
    """Escape every special character of LaTeX in ``text``."""
    return re.sub("|".join(map(re.escape, _SPECIAL)), lambda match: _SPECIAL[match[0]], text)


def comparisons_tex(judgement: Judgement) -> str:
    """One table for each setting; a dash stands for a value that was not measured."""
    tables = []
    for setting in judgement.settings:
        head = ("Comparison", "P-R", SCRATCH[setting], "Difference", r"95\% interval")
        rows = []
        for verdict, _ in judgement.verdicts_in(setting):
            name = escaped(group_name(verdict.group, judgement.index.comparisons, target=True))
            figures = ["--"] * 4
            if verdict.difference is not None and verdict.low is not None and verdict.high is not None:
                figures = [loss(verdict.pruned_loss), loss(verdict.scratch_loss), number(verdict.difference, 3)]
                figures.append(f"{number(verdict.low, 3)} to {number(verdict.high, 3)}")
            rows.append([name, *map(escaped, figures)])
        caption = f"% Held-out loss in nats per token, at equal {BUDGETS[setting]}"
        tables.append("\n".join([caption, *_tabular(head, rows)]))
    return "% Needs \\usepackage{booktabs}\n" + "\n\n".join(tables) + "\n"


def forecasts_tex(judgement: Judgement) -> str:
    """The crossover of each ladder on each account, in tokens of R, with its interval."""
    head = ("Model", "Equal", "Ahead at first", "The other catches up at")
    rows = []
    for forecast in judgement.forecasts.fitted:
        for outlook in forecast.outlooks:
            crossing = outlook.crossover
            leader = (crossing.leader or "level") if crossing else "--"
            cells = (forecast.name, ACCOUNT_NAMES[outlook.allowance.account], leader, crossover_brief(crossing))
            rows.append([escaped(cell) for cell in cells])
    caption = "% Where the path that trails at the smallest R catches up, by fitted curves"
    return "\n".join(["% Needs \\usepackage{booktabs}", caption, *_tabular(head, rows)]) + "\n"


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    symbols = [re.sub(r"^S_(.+)$", r"$S_\1$", name) for name in head]
    lines = [" & ".join(cells) + r" \\" for cells in (symbols, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    body = ["\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"]
    return [f"\\begin{{tabular}}{{{columns}}}", *body, "\\end{tabular}"]
