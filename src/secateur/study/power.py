"""How many seeds and held-out documents a study needs to tell a difference, and what the seeds cost."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from secateur.comparison.decision import LEVEL, MARGIN
from secateur.comparison.power import MOST_SEEDS, Spread, power, seeds_needed
from secateur.comparison.question import decisive
from secateur.comparison.records import SeedsVary, StudyQuestion
from secateur.config import AnyPath, Fraction, spec
from secateur.errors import UserError, reason
from secateur.formatting import duration, join_words, percent, plural, scientific
from secateur.study.plan import FLOPS_PER_SECOND
from secateur.study.planner import stages_of
from secateur.study.resolve import ResolvedStudy
from secateur.study.spec import StudySpec
from secateur.study.stage import unique

__all__ = ["PowerRequest", "PowerRow", "StudyPower", "plan_power"]

_COLUMNS = 4  # numbers of documents that the table shows
_MOST_DOCUMENTS = 2.0**40  # no text has more
_FIRST_ROWS = (2, 3, 5)  # seeds that the table shows in any case

_Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@spec
class PowerRequest:
    """What the power of a study is computed from.

    Attributes:
        pilot: folder of a study with a report, whose comparisons show the spread; its ``comparisons.csv`` is read.
        seed_sd: standard deviation of a difference between seeds, nats per token; None for the pilot's.
        document_sd: standard deviation of a difference between documents, nats per token; None for the pilot's.
        documents: effective number of held-out documents; None for the pilot's, or the study's number of windows.
        margin: difference to tell, nats per token; None for the question's margin.
        power: probability of telling it.
        flops_per_second: speed of the device that hours are counted for.

    Raises:
        UserError: if a field is out of range, or the spread is not known.
    """

    pilot: AnyPath = None
    seed_sd: _Spread | None = None
    document_sd: _Spread | None = None
    documents: Annotated[float, Field(ge=2, allow_inf_nan=False)] | None = None
    margin: _AboveZero | None = None
    power: Fraction = 0.8
    flops_per_second: _AboveZero = FLOPS_PER_SECOND

    def __post_init__(self) -> None:
        for name, value in (("seed_sd", self.seed_sd), ("document_sd", self.document_sd)):
            if value is None and self.pilot is None:
                raise UserError(f"`{name}`: is missing; give it in nats per token, or name a `pilot`")


@dataclass(frozen=True)
class PowerRow:
    """The power and the cost of one number of seeds.

    Attributes:
        power: for each number of documents.
        flops: of the whole study with so many seeds.
    """

    seeds: int
    power: tuple[float, ...]
    flops: float
    device_hours: float


@dataclass(frozen=True)
class StudyPower:
    """The seeds and documents that tell a difference; ``str()`` gives the text of ``secateur study plan --power``.

    Attributes:
        difference: to be told, nats per token.
        share: power to be reached.
        source: where the spread comes from, in words.
        note: how the seeds that it comes from differ from the study's, in a sentence; empty if they do not.
        comparisons: how many decide together.
        documents: effective numbers of held-out documents, one for each column.
        needed: the fewest seeds that reach the power, for each number of documents; None if 100 are too few.
        rows: one for each number of seeds.
    """

    study: str
    difference: float
    share: float
    spread: Spread
    source: str
    note: str
    comparisons: int
    documents: tuple[float, ...]
    needed: tuple[int | None, ...]
    rows: tuple[PowerRow, ...]
    flops_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """The power as plain values, as ``--json`` prints it."""
        return {
            "study": self.study,
            "difference": self.difference,
            "power": self.share,
            "seed_sd": self.spread.seeds,
            "document_sd": self.spread.documents,
            "source": self.source,
            "note": self.note,
            "comparisons": self.comparisons,
            "needed": [
                {"documents": documents, "seeds": seeds}
                for documents, seeds in zip(self.documents, self.needed, strict=True)
            ],
            "rows": [
                {
                    "seeds": row.seeds,
                    "power": [{"documents": k, "power": p} for k, p in zip(self.documents, row.power, strict=True)],
                    "flops": row.flops,
                    "device_hours": row.device_hours,
                }
                for row in self.rows
            ],
            "flops_per_second": self.flops_per_second,
            "answer": self.answer,
        }

    @property
    def answer(self) -> str:
        """The fewest seeds with the present documents and with more, in a sentence with their cost."""
        pairs = [(k, n) for k, n in zip(self.documents, self.needed, strict=True) if n is not None]
        documents, seeds = pairs[0]
        row = next(row for row in self.rows if row.seeds == seeds)
        text = (
            f"{plural(seeds, 'seed')} and {plural(round(documents), 'document')} tell a difference of "
            f"{self.difference:g} nats with at least {100 * self.share:g}% power; the study then costs "
            f"{scientific(row.flops)} FLOPs, about {duration(3600 * row.device_hours)} of one device at "
            f"{scientific(self.flops_per_second)} FLOPs a second."
        )
        if documents > self.documents[0]:
            text = f"{self.documents[0]:.0f} documents are too few for any number of seeds up to {MOST_SEEDS}. {text}"
        fewer = [f"{n} with {plural(round(k), 'document')}" for k, n in pairs[1:] if n < seeds]
        return f"{text} Fewer seeds suffice on more text: {join_words(fewer)}." if fewer else text

    def __str__(self) -> str:
        level = LEVEL / self.comparisons
        several = f"{self.comparisons} comparisons decide together, so each needs"
        together = several if self.comparisons > 1 else "The comparison needs"
        return "\n".join(
            [
                f"{self.study}: power to tell a difference of {self.difference:g} nats per token",
                "",
                f"A difference varies by {self.spread.seeds:.3g} nats between seeds and {self.spread.documents:.3g} "
                f"between documents ({self.source}).",
                *([self.note] if self.note else []),
                f"{together} p < {level:.2g} by the rule of every verdict.",
                "",
                *self._table(),
                "",
                self.answer,
                "Documents are counted by effective number; more of them need a larger evaluation.windows and held-out "
                "split. FLOPs leave out evaluations.",
            ]
        )

    def _table(self) -> list[str]:
        width = max(8, *(len(f"{documents:.0f}") + 1 for documents in self.documents))
        heads = "".join(f"{documents:>{width}.0f}" for documents in self.documents)
        lines = [f"{'':5}  power with so many documents", f"{'seeds':5}{heads}  {'FLOPs':>10}  {'device time':>12}"]
        for row in self.rows:
            shares = "".join(f"{value:>{width}.2f}" for value in row.power)
            lines.append(f"{row.seeds:>5}{shares}  {row.flops:>10.2e}  {duration(3600 * row.device_hours):>12}")
        return lines


@dataclass(frozen=True)
class _Pilot:
    """The spread that finished comparisons show; None where they do not."""

    seed_sd: float | None
    document_sd: float | None
    documents: float | None
    source: str
    note: str


def plan_power(
    study: StudySpec,
    resolved: ResolvedStudy,
    question: StudyQuestion | None,
    comparisons: int,
    request: PowerRequest,
) -> StudyPower:
    """Compute the power of a study's comparisons for several numbers of seeds and documents.

    Args:
        comparisons: how many decide together.

    Raises:
        UserError: if the spread is not known, or 100 seeds are too few with any number of documents.
    """
    difference = request.margin or (MARGIN if question is None else question.margin)
    if not difference:
        raise UserError("`margin`: the question has none; name the difference to tell, in nats per token")
    spread, documents, source, note = _spread(study, question, request)
    columns = _columns(spread, documents, difference, request.power, comparisons)
    needed = tuple(seeds_needed(spread, k, difference, share=request.power, comparisons=comparisons) for k in columns)
    costs = _costs(study, resolved, request.flops_per_second)
    rows = tuple(
        PowerRow(
            seeds,
            tuple(power(spread, seeds, k, difference, comparisons=comparisons) for k in columns),
            *costs(seeds),
        )
        for seeds in sorted({*_FIRST_ROWS, *(seeds for seeds in needed if seeds)})
    )
    return StudyPower(
        study.name,
        difference,
        request.power,
        spread,
        source,
        note,
        comparisons,
        columns,
        needed,
        rows,
        request.flops_per_second,
    )


def _columns(spread: Spread, documents: float, difference: float, share: float, comparisons: int) -> tuple[float, ...]:
    """The present number of documents, and larger ones from the first doubling that suffices.

    Raises:
        UserError: if no number of documents suffices.
    """

    def reach(spread: Spread, documents: float) -> float:
        return power(spread, MOST_SEEDS, documents, difference, comparisons=comparisons)

    enough = documents
    while reach(spread, enough) < share:
        enough *= 2
        if enough > _MOST_DOCUMENTS:
            alone, best = reach(replace(spread, documents=0.0), enough), reach(spread, enough)
            obstacle = "documents" if alone >= share else "seeds"
            raise UserError(
                f"a difference of {difference:g} nats is out of reach: the spread between {obstacle}, "
                f"{getattr(spread, obstacle):.3g} nats, leaves {MOST_SEEDS} seeds {percent(best)} power on any "
                "number of documents; plan to tell a larger one"
            )
    first = max(enough, 2 * documents)
    return (documents, *(first * 2**doubling for doubling in range(_COLUMNS - 1)))


def _spread(study: StudySpec, question: StudyQuestion | None, request: PowerRequest) -> tuple[Spread, float, str, str]:
    """The spread, the present number of documents, where the spread comes from, and how its seeds differ."""
    pilot = _Pilot(None, None, None, "as requested", "")
    if request.pilot is not None:
        pilot = _read_pilot(Path(request.pilot), question, study.seeds.vary)
    seed_sd = pilot.seed_sd if request.seed_sd is None else request.seed_sd
    document_sd = pilot.document_sd if request.document_sd is None else request.document_sd
    if seed_sd is None:
        raise UserError("`seed_sd`: no comparison of the pilot has two seeds or more; give it in nats per token")
    if document_sd is None:
        raise UserError("`document_sd`: no comparison of the pilot was measured; give it in nats per token")
    documents = request.documents or pilot.documents or float(max(2, study.evaluation.windows))
    note = pilot.note if request.seed_sd is None else ""
    return Spread(seed_sd, document_sd), documents, pilot.source, note


def _read_pilot(folder: Path, question: StudyQuestion | None, seeds_vary: SeedsVary) -> _Pilot:
    """The spread of a study's comparisons: of those that decide the question where it has them, else of all.

    Variances between seeds are pooled by their degrees of freedom; those between documents are averaged.
    """
    path = folder / "comparisons.csv"
    keys = {(setting, g.method, g.target, g.retrain_tokens, g.objective) for setting, g in decisive(question)}
    rows = [row for row in _rows(path) if row["document_sd"]]
    relevant = [row for row in rows if _key(row) in keys] or rows
    most = max((_number(row, "seeds") for row in relevant), default=0.0)
    pooled = [row for row in relevant if _number(row, "seeds") == most]  # a row of one seed repeats a part of another
    text = [_number(row, "document_sd") ** 2 for row in pooled]
    noise = [(_number(row, "seeds") - 1, _number(row, "seed_sd") ** 2) for row in relevant if row["seed_sd"]]
    degrees = sum(df for df, _ in noise)
    return _Pilot(
        seed_sd=math.sqrt(sum(df * variance for df, variance in noise) / degrees) if degrees else None,
        document_sd=math.sqrt(sum(text) / len(text)) if text else None,
        documents=min((_number(row, "effective_documents") for row in pooled), default=None),
        source=f"{folder}: comparisons: {len(pooled)}, seeds of each: {most:.0f}",
        note=_seeds_note({row.get("seeds_vary", "") for row in pooled}, seeds_vary),
    )


def _seeds_note(pilot: set[str], study: SeedsVary) -> str:
    """How the seeds of a pilot differ from the study's in what they vary; empty if they do not.

    Args:
        pilot: the values of ``seeds_vary`` of its comparisons; empty text where they have none.
    """
    if pilot <= {study}:
        return ""
    parents = "each have their own" if study == "all" else "share one"
    if "" in pilot:
        return f"Whether the pilot's seeds share one parent, its comparisons.csv does not say; this study's {parents}."
    if study == "all":
        return f"The pilot's seeds share one parent, this study's {parents}: the spread between them may be larger."
    return f"The pilot's seeds each have their own parent, this study's {parents}: the spread may be smaller."


def _key(row: dict[str, str]) -> tuple[str, str, str, int, str]:
    return row["setting"], row["method"], row["target"], int(_number(row, "retrain_tokens")), row["objective"]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a study's ``comparisons.csv``."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"setting", "seed_sd", "document_sd"} <= set(reader.fieldnames or ()):
                raise UserError(f"{path}: is of an older version; write the report of that study again")
            yield from reader
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `pilot` takes the folder of a study with a report") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


def _number(row: dict[str, str], key: str) -> float:
    try:
        return float(row[key])
    except ValueError:
        raise UserError(f"`pilot`: {key} of a comparison is {row[key]!r}, not a number") from None


def _costs(study: StudySpec, resolved: ResolvedStudy, speed: float) -> Callable[[int], tuple[float, float]]:
    """FLOPs and device-hours of the study by its number of seeds: of its first seed, and of each further one.

    A further seed is taken as the study's second one, with all that the file leaves out of that.
    """
    seeds = (study.seeds.values or (study.recipe.seed,))[:2]
    pair = seeds if len(seeds) == 2 else (seeds[0], seeds[0] + 1)

    def flops(seeds: tuple[int, ...]) -> float:
        methods = tuple(replace(entry, seeds=None) for entry in study.methods)
        stages = stages_of(replace(study, seeds=replace(study.seeds, values=seeds), methods=methods), resolved)
        return sum(stage.flops for stage in unique(stages))

    first, both = flops(pair[:1]), flops(pair)

    def cost(number: int) -> tuple[float, float]:
        total = first + (number - 1) * (both - first)
        return total, total / speed / 3600

    return cost
