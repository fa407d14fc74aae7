"""Answer a question from evidence: which path is ahead, or why these figures cannot tell.

Curves of another size are read at the same number of tokens for each parameter of the parent. They are not read for a
parent of another order of size or of tokens a parameter, nor outside of the ratios that were run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.errors import UserError
from secateur.forecast.crossover import Crossover, Lead, NextRun, crossover, lead, narrowing
from secateur.forecast.curve import PATHS, CurvePoint, Path
from secateur.forecast.evidence import SLACK, Evidence, StudyVerdict
from secateur.forecast.fit import Interval, has_enough_runs, pairs
from secateur.forecast.published import Claim, claim
from secateur.forecast.ratio_curves import RatioCurves, at_ratio
from secateur.methods.registry import METHODS

__all__ = [
    "NEAR",
    "Advice",
    "AdviceAccount",
    "Case",
    "Distance",
    "Obstacle",
    "Question",
    "advise",
    "bearing",
    "case_of",
    "obstacles_of",
]

_EXCLUDE = ("size", "parent tokens", "teacher", "control")  # findings are no answer either
_RETRAINING, _SCRATCH = "retraining, tokens a parameter", "from scratch, tokens a parameter"

NEAR = 4  #: how many times a parent's size, or its tokens a parameter, may lie from the evidence's

Name = Literal["training", "total", "flops"]
Winner = Literal["pruned", "scratch", "equal within margin", "undecided", "beyond what these runs can tell"]
Choice = Literal[
    "prune",
    "train from scratch",
    "undecided",
    "hardly any advantage",
    "depends on the method",
    "cannot be told from these figures",
]

_CHOICES: dict[Winner | None, Choice] = {
    "pruned": "prune",
    "scratch": "train from scratch",
    "undecided": "undecided",
    "equal within margin": "hardly any advantage",
    None: "hardly any advantage",
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
    distill: bool = False  #: whether the pruned model learns from the parent's outputs
    dearer: float | None = None  #: FLOPs of a token of the parent over those of the target; by parameters unless given

    def target(self, granularity: str | None, parent: float | None = None, ratio: float | None = None) -> float:
        """Parameters of the pruned model; ``parent`` and ``ratio`` replace those of the question."""
        share = 1.0 if granularity == "sparse" else 1 - (self.ratio if ratio is None else ratio)
        return (self.parameters if parent is None else parent) * share

    @property
    def decides(self) -> Name:
        """The account that a recommendation goes by."""
        return "total" if self.must_train else "training"

    @property
    def extra(self) -> float:
        """Tokens that the from-scratch model gets beyond R on the account that decides."""
        return self.parent_tokens / self.children if self.must_train and self.parent_tokens else 0.0


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


Kind = Literal["size", "parent tokens", "teacher", "ratio", "budget", "control", "granularity", "fit"]


@dataclass(frozen=True)
class Obstacle:
    """A reason why the evidence does not answer: what it is about, and the distance where it is one.

    Attributes:
        method: whose runs fit no curve.
        reason: why they do not.
    """

    kind: Kind
    distance: Distance | None = None
    method: str = ""
    reason: str = ""


@dataclass(frozen=True)
class AdviceAccount:
    """One way to make the two paths equal. Tokens are in the question's units."""

    name: Name
    extra: float  #: tokens that the from-scratch model gets beyond R
    scratch_loss: Interval | None
    lead: Lead | None  #: None: out of the runs' reach
    crossover: Crossover | None  #: in the evidence's tokens; times the case's ``scale`` they are the question's
    measured: StudyVerdict | None = None  #: the study's verdict at just these budgets: it wins over the curves

    @property
    def difference(self) -> Interval | None:
        """loss(scratch) - loss(pruned), nats per token: measured, or else by the curves."""
        if self.measured:
            return self.measured.difference
        return self.lead.difference if self.lead else None

    @property
    def winner(self) -> Winner:
        """The path ahead."""
        if self.measured:
            return self.measured.winner
        return self.lead.winner if self.lead else "beyond what these runs can tell"


@dataclass(frozen=True)
class Case:
    """What the runs of one method say, at a ratio that was run or between two."""

    method: str
    granularity: str
    points: tuple[CurvePoint, ...]  #: the runs at these ratios
    curves: RatioCurves | None  #: None: the runs are too few, or fit none, and what was measured answers
    budgets: Mapping[Path, Sequence[int]]  #: that each path was run on, in the evidence's tokens, rising
    scale: float  #: tokens of the question for each of the evidence, at equal tokens a parameter
    learned: float  #: tokens that the pruning itself trains on, in the question's units; zero unless it learns
    pruned_loss: Interval | None  #: None: out of the runs' reach
    accounts: tuple[AdviceAccount, ...]
    distances: tuple[Distance, ...]
    next_runs: tuple[NextRun, ...]  #: that would tell something of the crossover that decides, the best first

    def account(self, name: Name) -> AdviceAccount:
        """One of the accounts."""
        return next(account for account in self.accounts if account.name == name)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios that were run: the question's, or its two neighbours."""
        return tuple(sorted({point.ratio for point in self.points}))

    @property
    def seeds(self) -> int:
        """Of the runs, in all."""
        return len({point.seed for point in self.points})


def obstacles_of(evidence: Evidence, question: Question) -> list[Obstacle]:
    """Why nothing of the evidence, neither curve nor finding, bears on the question; none where it does."""
    obstacles = []
    size = Distance("parameters of the parent", question.parameters, *[evidence.parent_parameters] * 2)
    if not 1 / NEAR <= size.factor <= NEAR:
        obstacles.append(Obstacle("size", size))
    trained = _parent_distance(evidence, question)
    if trained and not 1 / NEAR <= trained.factor <= NEAR:
        obstacles.append(Obstacle("parent tokens", trained))
    if question.distill and evidence.published:
        obstacles.append(Obstacle("teacher"))
    control = question.method in METHODS and not METHODS[question.method].source
    if control and question.method not in evidence.granularity:
        obstacles.append(Obstacle("control"))
    return obstacles


def bearing(evidence: Evidence, question: Question) -> dict[str, list[CurvePoint]]:
    """The runs of each method that bears on a question: the method itself, or failing that its granularity."""
    methods: dict[str, list[CurvePoint]] = {}
    for point in evidence.points:
        if question.method in evidence.granularity:
            near = point.method == question.method
        else:
            near = question.granularity in (None, evidence.granularity[point.method])
        if near:
            methods.setdefault(point.method, []).append(point)
    return methods


def case_of(
    evidence: Evidence, question: Question, points: Sequence[CurvePoint], noise: float | None = None
) -> Case | Obstacle:
    """Fit the runs of one method and predict for the question, or say what is in the way.

    What the study measured at the question's budgets stands in the place of the curves, which may be missing then.

    Raises:
        UserError: if the runs contradict one another, or are too few.
    """
    method = points[0].method
    granularity = evidence.granularity[method]
    scale = question.parameters / evidence.parent_parameters
    measured = _measured(evidence, question, method)
    answered = question.decides in measured and _is_same(scale, 1)
    curves: RatioCurves | None = None
    try:
        fitted = _curves(points, question, noise)
        if isinstance(fitted, RatioCurves):
            curves = fitted
        elif not answered:
            return fitted
    except UserError:
        if not answered:
            raise
    ran = curves.points if curves else tuple(p for p in points if abs(p.ratio - question.ratio) <= SLACK)
    budgets: dict[Path, list[int]] = {
        path: curves.budgets(path) if curves else sorted({p.tokens for p in ran if p.path == path}) for path in PATHS
    }
    target = question.target(granularity)
    learned = max(evidence.learned.get((method, point.ratio), 0.0) for point in ran) * scale
    accounts = tuple(
        _account(curves, question.tokens, name, extra, scale, measured.get(name))
        for name, extra in _extras(question, target, learned).items()
    )
    decisive = next(account for account in accounts if account.name == question.decides)
    runs = narrowing(curves, decisive.crossover) if curves else []
    fits = any(account.lead for account in accounts)
    return Case(
        method,
        granularity,
        ran,
        curves,
        budgets,
        scale,
        learned,
        curves.at("pruned", question.tokens / scale) if curves and fits else None,
        accounts,
        tuple(_distances(evidence, question, ran, budgets, target / scale, decisive.extra)),
        tuple(replace(run, flops=6.0 * points[0].parameters * run.tokens) for run in runs),
    )


def _curves(points: Sequence[CurvePoint], question: Question, noise: float | None) -> RatioCurves | Obstacle:
    """The curves of one method at the question's ratio, or why there are none."""
    method = points[0].method
    ratios = [ratio for (_, ratio), group in pairs(points).items() if has_enough_runs(group)]
    if not ratios:
        raise UserError(f"{method}: no ratio has runs of both paths and three budgets in all; finish more runs")
    outside = Obstacle("ratio", Distance("ratio", question.ratio, min(ratios), max(ratios)))
    if not min(ratios) - SLACK <= question.ratio <= max(ratios) + SLACK:  # without a fit, which takes a second
        return outside
    curves = at_ratio(points, question.ratio, noise=noise)
    if curves is None:
        return outside
    return Obstacle("fit", method=method, reason=curves.misfit) if curves.poor else curves


def _is_same(a: float, b: float) -> bool:
    return abs(a / b - 1) <= SLACK


def _measured(evidence: Evidence, question: Question, method: str) -> dict[str, StudyVerdict]:
    """The study's verdict by account, where the question's ratio and budgets were run, at equal tokens a parameter.

    No account has two: a place that two parents share answers for neither.
    """
    scale = question.parameters / evidence.parent_parameters
    near: dict[str, list[StudyVerdict]] = {}
    for verdict in evidence.verdicts:
        same = verdict.method == method and abs(verdict.ratio - question.ratio) <= SLACK
        if same and _is_same(verdict.tokens * scale, question.tokens):
            near.setdefault(verdict.account, []).append(verdict)
    trained = question.parent_tokens, evidence.parent_tokens
    if question.children > 1 or not (trained[0] and trained[1] and _is_same(trained[1] * scale, trained[0])):
        near.pop("total", None)
    return {account: group[0] for account, group in near.items() if len(group) == 1}


def _extras(question: Question, target: float, learned: float) -> dict[Name, float]:
    """Tokens beyond R of the from-scratch model: those of a learned method's pruning, and the parent's share."""
    extras: dict[Name, float] = {"training": learned}
    if question.parent_tokens is not None:
        share = question.parent_tokens / question.children + learned
        extras |= {"total": share, "flops": share * (question.dearer or question.parameters / target)}
    return extras


def _account(
    curves: RatioCurves | None, tokens: float, name: Name, extra: float, scale: float, measured: StudyVerdict | None
) -> AdviceAccount:
    """One account; ``measured`` stands in for the curves of its own parent, and bounds those read for another."""
    standing = lead(curves, tokens / scale, extra / scale) if curves else None
    loss = curves.at("scratch", (tokens + extra) / scale) if curves and standing else None
    crossing = crossover(curves, extra / scale) if curves else None
    if measured and _is_same(scale, 1):
        agree = standing is not None and standing.winner == measured.winner
        return AdviceAccount(name, extra, loss, standing, crossing if agree else None, measured)
    if measured and standing:
        standing = replace(standing, difference=_at_least_as_wide(standing.difference, measured.difference))
    return AdviceAccount(name, extra, loss, standing, crossing)


def _at_least_as_wide(interval: Interval, measured: Interval) -> Interval:
    """The interval of the curves, with arms no shorter than the measured one's."""
    value = interval.value
    low, high = value - (measured.value - measured.low), value + (measured.high - measured.value)
    return Interval(value, min(interval.low, low), max(interval.high, high))


def _distances(
    evidence: Evidence,
    question: Question,
    points: Sequence[CurvePoint],
    budgets: Mapping[Path, Sequence[int]],
    evidence_target: float,
    extra: float,
) -> Iterator[Distance]:
    """Yield the distances from the question to the evidence, whose pruned model has ``evidence_target`` parameters."""
    target = question.target(evidence.granularity[points[0].method])
    pruned, scratch = ([tokens / evidence_target for tokens in budgets[path]] for path in ("pruned", "scratch"))
    ratios = [point.ratio for point in points]
    yield Distance("parameters of the parent", question.parameters, *[evidence.parent_parameters] * 2)
    yield Distance("ratio", question.ratio, min(ratios), max(ratios))
    yield Distance(_RETRAINING, question.tokens / target, pruned[0], pruned[-1])
    yield Distance(_SCRATCH, (question.tokens + extra) / target, scratch[0], scratch[-1])
    trained = _parent_distance(evidence, question)
    if trained:
        yield trained


def _parent_distance(evidence: Evidence, question: Question) -> Distance | None:
    """How many tokens a parameter the parents have seen; None where that is not known of either."""
    if question.parent_tokens is None or evidence.parent_tokens is None:
        return None
    ran = evidence.parent_tokens / evidence.parent_parameters
    return Distance("the parent, tokens a parameter", question.parent_tokens / question.parameters, ran, ran)


@dataclass(frozen=True)
class Advice:
    """What to do, by the account that decides.

    Attributes:
        basis: what it rests on: verdicts that were ``measured``, fitted ``curves`` (with such verdicts or without), a
            published ``finding``, or nothing.
        obstacles: why nothing, or no curve, answers.
        claim: the finding, where it is one.
        absent: whether no figure of the question's method, or of its granularity, is there, so that others stand in.
    """

    choice: Choice
    basis: Literal["measured", "curves", "finding", "none"]
    obstacles: tuple[Obstacle, ...] = ()
    claim: Claim | None = None
    absent: bool = False


def advise(evidence: Evidence, question: Question, cases: Sequence[Case], obstacles: Sequence[Obstacle]) -> Advice:
    """Sum up the cases; without any, what the published findings say; else why nothing answers."""
    measured = {*evidence.granularity, *(accuracy.method for accuracy in evidence.accuracies)}
    absent = question.method is not None and question.method not in measured
    accounts = [account for case in cases if (account := case.account(question.decides)).difference]
    winners: set[Winner] = {account.winner for account in accounts}
    if winners:
        choice: Choice = _CHOICES[winners.pop()] if len(winners) == 1 else "depends on the method"
        every = all(account.measured for account in accounts)
        return Advice(choice, "measured" if every else "curves", absent=absent)
    if evidence.published and not any(obstacle.kind in _EXCLUDE for obstacle in obstacles):
        budget = question.tokens / question.parameters
        finding = claim(question.ratio, question.granularity, budget, question.extra / question.tokens)
        if finding:
            return Advice(_CHOICES[finding.winner], "finding", tuple(obstacles), finding, absent)
    if cases:
        far = [d for d in cases[0].distances if d.quantity in (_RETRAINING, _SCRATCH)]
        obstacles = [*obstacles, Obstacle("budget", max(far, key=lambda d: max(d.factor, 1 / d.factor)))]
    return Advice("cannot be told from these figures", "none", tuple(obstacles), absent=absent)
