"""The question of a study: which comparisons decide it, by what margin, and what would count as an answer.

A question is no part of a stage's identity: nothing runs anew when it changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from secateur.comparison.records import DecisiveComparison, StudyQuestion
from secateur.config import Count, fingerprint, listed, spec
from secateur.errors import UserError, did_you_mean
from secateur.study.settings import TWIN_NAMES, SettingKind
from secateur.study.stage import Stage

__all__ = ["ComparisonSelector", "QuestionSpec", "count_together", "resolve_question"]

_LANGUAGE_MODEL = "language-model"  # the label of this objective is empty


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; say what it would be, or leave this key out")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


@spec
class ComparisonSelector:
    """Comparisons of the study: those that have, for every key, one of its values. All seeds count together."""

    setting: Annotated[tuple[SettingKind, ...] | None, listed()] = None
    method: Annotated[tuple[str, ...] | None, listed()] = None  #: an entry's name
    target: Annotated[tuple[str | float, ...] | None, listed()] = None
    tokens: Annotated[tuple[Count, ...] | None, listed()] = None  #: R
    objective: Annotated[tuple[str, ...] | None, listed()] = None

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError(
                "question.comparisons: an entry needs at least one key, as in {setting: equal_total_tokens}"
            )

    @property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """Key -> values, as the facts of stages have them; keys that are not set are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        if self.target:
            values["target"] = tuple(v if isinstance(v, str) else f"{v:g}" for v in self.target)
        if self.objective:
            values["objective"] = tuple("" if v == _LANGUAGE_MODEL else v for v in self.objective)
        return values


@spec
class QuestionSpec:
    """The comparisons that decide, and what would count as an answer."""

    comparisons: Annotated[tuple[ComparisonSelector, ...], listed("setting"), Field(min_length=1)]
    metric: Literal["loss"] = "loss"  #: loss: of held-out text
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02  #: nats that count as equal; 0: none do
    ask: Text | None = None
    yes: Text | None = None  #: what would count as yes
    no: Text | None = None  #: what would count as no


def resolve_question(question: QuestionSpec, stages: Iterable[Stage]) -> StudyQuestion:
    """Find the comparisons that a question names among the stages of its study.

    The hash covers these comparisons with their seeds, however the file selects them: a study that gains or loses one,
    or a seed of one, asks another question.

    Raises:
        UserError: if a selector matches none of them; the nearest name is suggested.
    """
    planned = list(_planned(stages))
    decisive: set[DecisiveComparison] = set()
    for number, selector in enumerate(question.comparisons):
        where = f"question.comparisons[{number}]"
        _check_values(selector, [facts for _, facts in planned], where)
        matches = [comparison for comparison, facts in planned if _covers(selector, facts)]
        if not matches:
            raise UserError(f"{where}: no comparison of the study has all of these; leave out a key, or change one")
        decisive.update(matches)
    comparisons: dict[DecisiveComparison, list[int]] = {}
    for comparison, facts in planned:
        if comparison in decisive:
            comparisons.setdefault(comparison, []).append(facts["seed"])
    values = {key: getattr(question, key) for key in ("metric", "margin", "ask", "yes", "no")}
    content = {**values, "comparisons": [{**asdict(c), "seeds": seeds} for c, seeds in comparisons.items()]}
    return StudyQuestion(hash=fingerprint(content), content=content, comparisons=tuple(comparisons), **values)


def count_together(question: StudyQuestion | None, stages: Iterable[Stage]) -> int:
    """How many comparisons Holm's method corrects together: the decisive ones, or those of the largest setting."""
    if question is not None:
        return len(question.comparisons)
    sizes = Counter(comparison.twin for comparison in {comparison for comparison, _ in _planned(stages)})
    return max(sizes.values(), default=1)


def _planned(stages: Iterable[Stage]) -> Iterator[tuple[DecisiveComparison, dict[str, Any]]]:
    """Every comparison of a from-scratch twin with its pruned run, and the facts that selectors name; once a seed."""
    settings = {name: kind for kind, name in TWIN_NAMES.items()}
    for stage in stages:
        facts = stage.facts
        if facts.get("path") == "scratch":
            keys = ("parent", "method", "target", "retrain_tokens", "objective")
            comparison = DecisiveComparison(facts["name"], *(facts[key] for key in keys))
            yield comparison, {**facts, "setting": settings[facts["name"]], "tokens": facts["budget"]}


def _covers(selector: ComparisonSelector, facts: dict[str, Any]) -> bool:
    return all(facts[key] in values for key, values in selector.values.items())


def _check_values(selector: ComparisonSelector, planned: Sequence[dict[str, Any]], where: str) -> None:
    """Check that every value of a selector is one that some comparison of the study has."""
    for key, values in selector.values.items():
        options = {facts[key] for facts in planned}
        for value in values:
            if value not in options:
                names = [str(option) or _LANGUAGE_MODEL for option in options]
                text = str(value) or _LANGUAGE_MODEL
                raise UserError(f"{where}.{key}: no comparison of the study has {text!r}{did_you_mean(text, names)}")
