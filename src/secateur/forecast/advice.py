"""Answer a question from the nearest evidence: who is ahead, where the paths cross, and how far the evidence is.

Curves of another size are read at the same number of tokens per parameter of the target, ``N_0 * (1 - ratio)`` of a
parent of ``N_0`` parameters (``N_0`` itself for sparse methods, which remove none).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.forecast.crossover import REACH, Crossover, Lead, NextRun, crossover, lead, narrowing
from secateur.forecast.curve import CurvePoint
from secateur.forecast.evidence import Evidence
from secateur.forecast.fit import DEFAULT_FORM, Fit, fit_pair, pairs

__all__ = ["Advice", "AdviceAccount", "Case", "Distance", "Question", "advise", "bearing", "case_of"]

Name = Literal["training", "total", "flops"]
Winner = Literal["pruned", "scratch", "too close to call", "beyond what these runs can tell"]
Choice = Literal["prune", "train from scratch", "too close to call", "cannot be told", "depends on the method"]

_CHOICES: dict[Winner, Choice] = {
    "pruned": "prune",
    "scratch": "train from scratch",
    "too close to call": "too close to call",
    "beyond what these runs can tell": "cannot be told",
}


@dataclass(frozen=True)
class Question:
    """A choice between pruning and training from scratch, with its sizes and budgets."""

    parameters: float  #: of the parent, in all
    ratio: float  #: share to remove
    tokens: int  #: R
    granularity: str | None = None  #: None: any
    method: str | None = None  #: None: any
    must_train: bool = False  #: whether the parent has to be trained first
    parent_tokens: int | None = None  #: P; None where it is not known
    children: int = 1  #: pruned models that share the parent's training
    dearer: float | None = None  #: FLOPs of a token of the parent over those of the target; by parameters unless given

    def target(self, granularity: str | None, parent: float | None = None, ratio: float | None = None) -> float:
        """Parameters of the pruned model; ``parent`` and ``ratio`` replace those of the question."""
        share = 1.0 if granularity == "sparse" else 1 - (self.ratio if ratio is None else ratio)
        return (self.parameters if parent is None else parent) * share

    @property
    def decides(self) -> Name:
        """The account that a recommendation goes by."""
        return "total" if self.must_train else "training"


@dataclass(frozen=True)
class Distance:
    """How far the question lies from the evidence in one respect."""

    quantity: str  #: its name, e.g. "ratio"
    value: float  #: its value in the question
    low: float  #: the smallest that was run
    high: float  #: the largest

    @property
    def factor(self) -> float:
        """How many times the question lies above the evidence, or (below one) below it; 1 within."""
        if self.value > self.high:
            return self.value / self.high
        return self.value / self.low if self.value < self.low else 1.0

    @property
    def outside(self) -> bool:
        """Whether the question lies outside of what was run, by more than a tenth."""
        return not 1 / 1.1 <= self.factor <= 1.1


@dataclass(frozen=True)
class AdviceAccount:
    """One way to make the two paths equal. Tokens are in the question's units."""

    name: Name
    extra: float  #: tokens that the from-scratch model gets beyond R
    lead: Lead
    crossover: Crossover  #: in the evidence's tokens; times the case's ``scale`` they are the question's
    winner: Winner


@dataclass(frozen=True)
class Case:
    """What the runs of one method and ratio say."""

    method: str
    granularity: str
    ratio: float
    fit: Fit
    scale: float  #: tokens of the question for each of the evidence, at equal tokens per parameter
    accounts: tuple[AdviceAccount, ...]
    distances: tuple[Distance, ...]
    next_runs: tuple[NextRun, ...]  #: that would narrow the crossover that decides, the best first

    def account(self, name: Name) -> AdviceAccount:
        """One of the accounts."""
        return next(account for account in self.accounts if account.name == name)


def bearing(evidence: Evidence, question: Question) -> list[list[CurvePoint]]:
    """The runs that bear on a question, method by method, each at the ratio nearest to the question's."""
    groups = pairs(evidence.points)
    nearest: dict[str, float] = {}
    for method, ratio in sorted(groups, key=lambda pair: (abs(pair[1] - question.ratio), pair[1])):
        nearest.setdefault(method, ratio)
    methods = dict.fromkeys(method for method, _ in groups)
    return [groups[method, nearest[method]] for method in methods if _fits(evidence, question, method)]


def _fits(evidence: Evidence, question: Question, method: str) -> bool:
    """Whether the evidence of a method bears on the question: the method itself, or failing that its granularity."""
    if question.method in evidence.granularity:
        return method == question.method
    return question.granularity in (None, evidence.granularity[method])


def case_of(evidence: Evidence, question: Question, points: Sequence[CurvePoint], noise: float | None = None) -> Case:
    """Fit the runs of one method and ratio, and predict for the question.

    Raises:
        UserError: if the runs contradict one another, or are too few.
    """
    method, ratio = points[0].method, points[0].ratio
    granularity = evidence.granularity[method]
    fit = fit_pair(points, DEFAULT_FORM, parent_loss=evidence.parent_loss, noise=noise)
    target = question.target(granularity)
    evidence_target = question.target(granularity, evidence.parent_parameters, ratio)
    scale = target / evidence_target
    extras: dict[Name, float] = {"training": 0.0}
    if question.parent_tokens is not None:
        share = question.parent_tokens / question.children
        extras |= {"total": share, "flops": share * (question.dearer or question.parameters / target)}
    accounts = tuple(_account(fit, question.tokens, name, extra, scale) for name, extra in extras.items())
    decisive = next(a for a in accounts if a.name == question.decides)
    return Case(
        method,
        granularity,
        ratio,
        fit,
        scale,
        accounts,
        tuple(_distances(evidence, question, fit, evidence_target, decisive.extra)),
        tuple(narrowing(fit, decisive.crossover)),
    )


def _account(fit: Fit, tokens: float, name: Name, extra: float, scale: float) -> AdviceAccount:
    standing = lead(fit, tokens / scale, extra / scale)
    budgets, most = fit.budgets("pruned"), max(p.tokens for p in fit.points)
    near = budgets[0] / REACH <= tokens / scale and (tokens + extra) / scale <= REACH * most
    winner: Winner = standing.winner if near else "beyond what these runs can tell"
    return AdviceAccount(name, extra, standing, crossover(fit, extra / scale), winner)


def _distances(
    evidence: Evidence, question: Question, fit: Fit, evidence_target: float, extra: float
) -> Iterator[Distance]:
    """Yield the distances from the question to the evidence, whose pruned model has ``evidence_target`` parameters."""
    point = fit.points[0]
    target = question.target(evidence.granularity[point.method])
    pruned, scratch = ([tokens / evidence_target for tokens in fit.budgets(path)] for path in ("pruned", "scratch"))
    yield Distance("parameters of the parent", question.parameters, *[evidence.parent_parameters] * 2)
    yield Distance("ratio", question.ratio, point.ratio, point.ratio)
    yield Distance("retraining, tokens a parameter", question.tokens / target, pruned[0], pruned[-1])
    yield Distance("from scratch, tokens a parameter", (question.tokens + extra) / target, scratch[0], scratch[-1])
    if question.parent_tokens is not None and evidence.parent_tokens is not None:
        per_parameter = evidence.parent_tokens / evidence.parent_parameters
        yield Distance(
            "the parent, tokens a parameter", question.parent_tokens / question.parameters, per_parameter, per_parameter
        )


@dataclass(frozen=True)
class Advice:
    """What to do, by the account that decides."""

    choice: Choice
    why: str
    extrapolates: bool  #: whether the question lies outside of what was run


def advise(evidence: Evidence, question: Question, cases: Sequence[Case]) -> Advice:
    """Sum up the cases; without any, what the source says in words."""
    if not cases:
        findings = [finding for finding in evidence.findings if finding.account == question.decides]
        winner: Winner | None = next((finding.winner for finding in findings if finding.winner), None)
        why = "; ".join(finding.says for finding in findings) or "no run of it is there"
        return Advice(_CHOICES[winner] if winner else "cannot be told", f"no losses to go by; {why}", True)
    winners: dict[str, Winner] = {case.method: case.account(question.decides).winner for case in cases}
    kinds: set[Winner] = set(winners.values())
    return Advice(
        _CHOICES[kinds.pop()] if len(kinds) == 1 else "depends on the method",
        "; ".join(_winner_phrase(case, question) for case in cases),
        any(distance.outside for case in cases for distance in case.distances),
    )


def _winner_phrase(case: Case, question: Question) -> str:
    """The winner of the account that decides; where the parent counts, also that at equal FLOPs if it is another."""
    winner = case.account(question.decides).winner
    by_flops = case.account("flops").winner if question.must_train else winner
    return f"{case.method}: {winner}" + (f" (at equal FLOPs: {by_flops})" if by_flops != winner else "")
