"""Evidence for recommendations: finished runs of both paths, published or from a study's folder."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from secateur.comparison.naming import is_pattern
from secateur.errors import UserError, did_you_mean, reason
from secateur.forecast.curve import CurvePoint
from secateur.forecast.fit import Interval

__all__ = ["SLACK", "Accuracy", "Evidence", "StudyVerdict", "of_study"]

SLACK = 0.01  #: how far a ratio may be from one that was run to count as it


@dataclass(frozen=True)
class Accuracy:
    """Average zero-shot accuracy of both paths at equal total tokens, in percent; without an interval."""

    method: str
    granularity: str
    scratch: float
    pruned: float


MeasuredWinner = Literal["pruned", "scratch", "equal within margin", "undecided"]


@dataclass(frozen=True)
class StudyVerdict:
    """The verdict of a study on one comparison: its twins were run on just these budgets."""

    account: Literal["training", "total"]  #: what both paths had as much of
    method: str
    ratio: float
    tokens: int  #: R
    seeds: int  #: pairs of runs
    winner: MeasuredWinner
    difference: Interval  #: loss(scratch) - loss(pruned), nats per token, with the interval of the report
    reason: str = ""  #: why it is undecided


@dataclass(frozen=True)
class Evidence:
    """Finished runs that compare both paths.

    Attributes:
        source: where the figures come from, in words.
        parent_parameters: of the parent, in all.
        parent_tokens: that the parent was trained on; None where it is not known.
        parent_loss: the parent's held-out loss, in nats per token; None where it was not measured.
        points: the runs, at the end of their schedules.
        granularity: method -> depth, width or sparse.
        published: whether it is the published study, whose findings answer where its curves do not.
        accuracies: where there are any.
        absent: runs of the source that have no held-out loss.
        verdicts: the comparisons of the study, over seeds.
        learned: (method, ratio) -> tokens that a learned method trained on while it pruned.
    """

    source: str
    parent_parameters: float
    parent_tokens: int | None
    parent_loss: float | None
    points: tuple[CurvePoint, ...]
    granularity: Mapping[str, str]
    published: bool = False
    accuracies: tuple[Accuracy, ...] = ()
    absent: int = 0
    verdicts: tuple[StudyVerdict, ...] = ()
    learned: Mapping[tuple[str, float], float] = field(default_factory=dict)


_CELLS = ("name", "method", "granularity", "seed", "ratio", "ratio_total", "parameters", "train_tokens", "loss")
_CURVES = ("name", "tokens", "loss")
_COMPARISONS = ("setting", "method", "target", "retrain_tokens", "seed", "seeds", "difference", "low", "high", "winner")


def of_study(folder: Path) -> Evidence:
    """Read ``cells.csv`` and ``curves.csv`` of a study's folder, and ``comparisons.csv`` where it is there.

    A run counts by its loss at the end. The losses along it were measured before its learning rate had fallen, and
    shorter runs end lower than that.

    Raises:
        UserError: if they are missing, are no such files, or hold no run with a loss.
    """
    points: dict[CurvePoint, None] = {}  # a run that serves several comparisons has a row for each
    granularity: dict[str, str] = {}
    sizes: set[int] = set()
    ratios: dict[tuple[str, str], float] = {}  # of each method and target
    pruned: dict[tuple[str, float], tuple[Mapping[str, str], str]] = {}
    absent = 0
    for line, row in _read(folder / "cells.csv", _CELLS):
        if not row["name"].startswith(("P-", "S_")):  # a control
            continue
        if not row["loss"]:
            absent += 1
            continue
        where = f"{folder / 'cells.csv'}: line {line}"
        point = _point(row, where)
        points[point] = None
        granularity[point.method] = row["granularity"]
        ratios[point.method, row.get("target", "")] = point.ratio
        if point.path == "pruned":
            pruned[point.method, point.ratio] = row, where
        zeroed = row["granularity"] == "sparse"  # its weights are still there
        sizes.add(round(point.parameters / (1 - (0.0 if zeroed else _number(row, "ratio_total", where)))))
    if not points:
        raise UserError(f"{folder}: none of its runs has a held-out loss; run the study first: secateur study run FILE")
    if max(sizes) - min(sizes) > 1 + 1e-6 * max(sizes):
        raise UserError(f"{folder / 'cells.csv'}: its runs are of parents of different sizes; name one study's folder")
    curve = [row for _, row in _read(folder / "curves.csv", _CURVES) if row["name"] == "parent"]
    ends = list({row.get("seed"): row for row in curve}.values())  # each seed may have its own parent
    where = f"{folder / 'curves.csv'}: the parent's last point"
    parent_tokens = int(_number(curve[-1], "tokens", where)) if curve else None
    return Evidence(
        source=f"the study in {folder}",
        parent_parameters=float(max(sizes)),
        parent_tokens=parent_tokens,
        parent_loss=_parent_loss(folder)
        or (sum(_number(e, "loss", where) for e in ends) / len(ends) if ends else None),
        points=tuple(points),
        granularity=granularity,
        absent=absent,
        verdicts=tuple(_verdicts(folder / "comparisons.csv", ratios)),
        learned={place: _learned(*row, parent_tokens) for place, row in pruned.items()},
    )


def _parent_loss(folder: Path) -> float | None:
    """The parent's held-out loss as its pruned models' were measured, over seeds; the points along a curve are not.

    Those are of fewer windows, which may be harder or easier text.
    """
    path = folder / "measurements.csv"
    if not path.exists():
        return None
    losses = [
        _number(row, "value", f"{path}: line {line}")
        for line, row in _read(path, ("model", "figure", "value"))
        if (row["model"], row["figure"]) == ("parent", "loss") and row["value"]
    ]
    return sum(losses) / len(losses) if losses else None


def _learned(row: Mapping[str, str], where: str, parent_tokens: int | None) -> float:
    """Tokens that the pruning itself trained on: a column, or what the total has beyond the parent's and R."""
    if row.get("pruning_tokens"):
        return _number(row, "pruning_tokens", where)
    if not row.get("total_tokens") or parent_tokens is None:
        return 0.0
    total, retraining = (_number(row, key, where) for key in ("total_tokens", "train_tokens"))
    return max(total - retraining - parent_tokens, 0.0)


def _verdicts(path: Path, ratios: Mapping[tuple[str, str], float]) -> Iterator[StudyVerdict]:
    """Yield the verdicts over seeds; ``ratios``: of each method and target that has runs."""
    if not path.exists():
        return
    for line, row in _read(path, _COMPARISONS):
        place, where = (_method(row), row["target"]), f"{path}: line {line}"
        pooled = not row["seed"] and row["setting"] in ("training", "total")
        if not pooled or place not in ratios or row["winner"] not in get_args(MeasuredWinner):
            continue
        yield StudyVerdict(
            account=row["setting"],  # type: ignore[arg-type]
            method=place[0],
            ratio=ratios[place],
            tokens=int(_number(row, "retrain_tokens", where)),
            seeds=int(_number(row, "seeds", where)),
            winner=row["winner"],  # type: ignore[arg-type]
            difference=Interval(*(_number(row, key, where) for key in ("difference", "low", "high"))),
            reason=row.get("reason", ""),
        )


def _point(row: Mapping[str, str], where: str) -> CurvePoint:
    return CurvePoint(
        path="pruned" if row["name"].startswith("P-") else "scratch",
        method=_method(row),
        ratio=_number(row, "ratio", where),
        parameters=int(_number(row, "parameters", where)),
        tokens=int(_number(row, "train_tokens", where)),
        loss=_number(row, "loss", where),
        seed=int(_number(row, "seed", where)),
        name=row["name"],
    )


def _method(row: Mapping[str, str]) -> str:
    """The method with its pattern and objective, which make another curve at the same ratio."""
    target, objective = row.get("target", ""), row.get("objective", "")
    pattern = f" {target}" if is_pattern(target) else ""
    return row["method"] + pattern + (f" ({objective})" if objective else "")


def _read(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with the line that each stands on."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            head = reader.fieldnames or []
            missing = [column for column in columns if column not in head]
            if missing:
                raise UserError(f"{path}: has no column {missing[0]!r}{did_you_mean(missing[0], head)}")
            return [(reader.line_num, {key: value or "" for key, value in row.items() if key}) for row in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `study` takes a folder that `secateur study run` has written") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


def _number(row: Mapping[str, str], key: str, where: str) -> float:
    try:
        value = float(row[key])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {key} is {row[key]!r}, not a number")
    return value
