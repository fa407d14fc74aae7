"""The published figures, and how far forecasts from their first budgets are off, as docs/prediction.md has it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for benchmarks/

from benchmarks import forecast
from example import judged, large

from secateur.errors import UserError
from secateur.forecast.published import exact, published
from secateur.forecast.ratio_law import fit_ratios
from secateur.report.tables import cell_rows, curves_csv, rows_csv

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "prediction.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_paper() -> None:
    evidence = published()
    figures = {(p.method, p.path, p.tokens): p.loss for p in evidence.points}
    assert len(figures) == 20 and {p.ratio for p in evidence.points} == {0.5}
    assert figures["minitron-depth", "scratch", exact(10)] == 3.09
    assert figures["minitron-depth", "pruned", exact(50)] == 2.54
    assert figures["minitron-width", "scratch", exact(250)] == 2.46
    assert figures["minitron-width", "pruned", exact(500)] == 2.35
    assert sum(figures.values()) == pytest.approx(13.50 + 12.72 + 13.51 + 12.30)
    assert (evidence.parent_loss, evidence.parent_tokens) == (2.40, exact(200))
    accuracies = {a.method: (a.scratch, a.pruned) for a in evidence.accuracies}
    assert accuracies == {
        "minitron-depth": (66.2, 64.4),
        "sheared": (65.3, 65.9),
        "sparsegpt 2:4": (67.1, 66.7),
        "sparsegpt": (66.3, 67.5),
    }


def test_tokens_are_counted_exactly() -> None:
    """A step of 512 sequences of 8,192 tokens is counted as 4.0 million by the authors."""
    assert exact(50) == 52_428_800_000 and exact(200) == 200_000 // 4 * 512 * 8192


def numbers(row: str) -> list[float]:
    return [float(n) for n in re.findall(r"(?<![\w-])[+-]?\d+\.\d+", row)]


def rows(heading: str) -> list[str]:
    section = PAGE.split(heading)[1].split("\n#")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize(("heading", "last"), [("## Forecasts of 250 and 500 B", 2), ("## Leave-last-out", 1)])
def test_the_errors_of_all_forms_are_as_documented(heading: str, last: int) -> None:
    told = {re.findall("`(.*?)`", row)[0]: numbers(row) for row in rows(heading)}
    assert list(told) == list(forecast.ROWS)
    for form, documented in told.items():
        assert documented == pytest.approx(numbers(forecast.error_row(form, last)), abs=2e-3)
    if last == 1:
        assert sorted(told, key=lambda form: told[form][-1]).index("average") < len(told) / 2


def test_the_intervals_are_as_documented() -> None:
    told = [line for line in PAGE.splitlines() if re.match(r"\| minitron-\w+, ", line)]
    found = forecast.interval_rows(2)
    assert len(told) == len(found) == 8
    for documented, row in zip(told, found, strict=True):
        assert numbers(documented) == pytest.approx(numbers(row), abs=0.011)


def test_one_ratio_is_no_law_across_ratios() -> None:
    for runs in forecast.retrained(published()).values():
        with pytest.raises(UserError, match="needs 2 ratios and 3 budgets, and the finished runs have 1 and 5"):
            fit_ratios(runs)


def test_a_studys_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judgement = judged(large)
    kept = [
        row
        for row in cell_rows(judgement)
        if (row["method"], row["objective"], row["seed"]) == ("minitron-depth", "", 0) and row["name"] in ("P-R", "S_R")
    ]
    (tmp_path / "cells.csv").write_text(rows_csv(kept))
    (tmp_path / "curves.csv").write_text(curves_csv(judgement))
    forecast.study(tmp_path)
    told = capsys.readouterr().out
    assert told.count("| `shared-floor` |") == 1 and "| minitron-depth 0.5, pruned | 800,000 | 5.200 |" in told
    law = next(line for line in told.splitlines() if line.startswith("| minitron-depth | 6 | 0.5, 0.75 |"))
    assert "0.5: cannot be left out" in law and "poorly determined" in law
