"""Answer a question from evidence: which path is ahead, or why these figures cannot tell.

Curves of another size are read at the same number of tokens per parameter of the target, ``N_0 * (1 - ratio)`` of a
parent of ``N_0`` parameters (``N_0`` itself for sparse methods, which remove none). They are not read for a parent of
another order of size or of tokens a parameter, nor outside of the ratios that were run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from operator import mul
from typing import Literal

from secateur.forecast.crossover import Crossover, Lead, NextRun, crossover, lead, narrowing
from secateur.forecast.curve import CurvePoint
from secateur.forecast.evidence import SLACK, Evidence
from secateur.forecast.fit import Fit, Interval, fit_pair, pairs
from secateur.forecast.published import Claim, claim
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

_RETRAINING, _SCRATCH = "retraining, tokens a parameter", "from scratch, tokens a parameter"

NEAR = 4  #: how many times a parent's size, or its tokens a parameter, may lie from the evidence's

Name = Literal["training", "total", "flops"]
Winner = Literal["pruned", "scratch", "undecided", "beyond what these runs can tell"]
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
    """A reason why the evidence does not answer: what it is about, and the distance where it is one."""

    kind: Kind
    distance: Distance | None = None


@dataclass(frozen=True)
class AdviceAccount:
    """One way to make the two paths equal. Tokens are in the question's units."""

    name: Name
    extra: float  #: tokens that the from-scratch model gets beyond R
    scratch_loss: Interval | None
    lead: Lead | None  #: None: out of reach
    crossover: Crossover | None  #: in the evidence's tokens; None between two ratios
    winner: Winner


@dataclass(frozen=True)
class Case:
    """What the runs of one method say, at a ratio that was run or between two."""

    method: str
    granularity: str
    ratios: tuple[float, ...]  #: that were run: one, or the two around the question's
    fits: tuple[Fit, ...]  #: one for each
    scales: tuple[float, ...]  #: tokens of the question for each of the evidence, at equal tokens per parameter
    pruned_loss: Interval
    accounts: tuple[AdviceAccount, ...]
    distances: tuple[Distance, ...]
    next_runs: tuple[NextRun, ...]  #: that would narrow the crossover that decides, the best first

    def account(self, name: Name) -> AdviceAccount:
        """One of the accounts."""
        return next(account for account in self.accounts if account.name == name)


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


def bearing(evidence: Evidence, question: Question) -> tuple[list[list[list[CurvePoint]]], list[Obstacle]]:
    """The runs that bear on a question: for each method those at its ratio, or at the two ratios around it.

    Returns:
        For each method one or two groups of runs; and why other runs are not among them.
    """
    groups = pairs(evidence.points)
    ladders, obstacles = [], []
    methods = [m for m in dict.fromkeys(method for method, _ in groups) if _fits(evidence, question, m)]
    for method in methods:
        ratios = sorted(ratio for name, ratio in groups if name == method)
        around = _around(ratios, question.ratio)
        if around:
            ladders.append([groups[method, ratio] for ratio in around])
        else:
            obstacles.append(Obstacle("ratio", Distance("ratio", question.ratio, ratios[0], ratios[-1])))
    return ladders, obstacles if methods else [Obstacle("granularity")]


def _around(ratios: Sequence[float], ratio: float) -> list[float]:
    """The ratio that was run, or the nearest below and above; none where one of these is missing."""
    nearest = min(ratios, key=lambda r: abs(r - ratio))
    if abs(nearest - ratio) <= SLACK + 1e-9:
        return [nearest]
    below, above = [r for r in ratios if r < ratio], [r for r in ratios if r > ratio]
    return [below[-1], above[0]] if below and above else []


def _fits(evidence: Evidence, question: Question, method: str) -> bool:
    """Whether the evidence of a method bears on the question: the method itself, or failing that its granularity."""
    if question.method in evidence.granularity:
        return method == question.method
    return question.granularity in (None, evidence.granularity[method])


def case_of(
    evidence: Evidence, question: Question, ladder: Sequence[Sequence[CurvePoint]], noise: float | None = None
) -> Case:
    """Fit the runs of one method at one or two ratios, and predict for the question.

    Raises:
        UserError: if the runs contradict one another, are too few, or scatter too much.
    """
    method = ladder[0][0].method
    granularity = evidence.granularity[method]
    ratios = tuple(points[0].ratio for points in ladder)
    fits = tuple(fit_pair(points, noise=noise) for points in ladder)
    target = question.target(granularity)
    targets = [question.target(granularity, evidence.parent_parameters, ratio) for ratio in ratios]
    scales = tuple(target / evidence_target for evidence_target in targets)
    extras: dict[Name, float] = {"training": 0.0}
    if question.parent_tokens is not None:
        share = question.parent_tokens / question.children
        extras |= {"total": share, "flops": share * (question.dearer or question.parameters / target)}
    weights = _weights(ratios, question.ratio)
    accounts = tuple(_account(fits, scales, weights, question.tokens, *item) for item in extras.items())
    decisive = next(account for account in accounts if account.name == question.decides)
    return Case(
        method,
        granularity,
        ratios,
        fits,
        scales,
        _mix([fit.at("pruned", question.tokens / scale) for fit, scale in zip(fits, scales, strict=True)], weights),
        accounts,
        tuple(_distances(evidence, question, fits, targets, decisive.extra)),
        tuple(narrowing(fits[0], decisive.crossover)) if decisive.crossover else (),
    )


def _weights(ratios: tuple[float, ...], ratio: float) -> list[float]:
    if len(ratios) == 1:
        return [1.0]
    share = (ratio - ratios[0]) / (ratios[1] - ratios[0])
    return [1 - share, share]


def _mix(intervals: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """The figure between two ratios, linear in the ratio; so are its limits, as if both erred to the same side."""
    values, lows, highs = zip(*map(astuple, intervals), strict=True)
    return Interval(*(sum(map(mul, weights, limits)) for limits in (values, lows, highs)))


def _account(
    fits: Sequence[Fit],
    scales: Sequence[float],
    weights: Sequence[float],
    tokens: float,
    name: Name,
    extra: float,
) -> AdviceAccount:
    both = list(zip(fits, scales, strict=True))
    leads = [lead(fit, tokens / scale, extra / scale) for fit, scale in both]
    near = [standing for standing in leads if standing]
    if len(near) < len(leads):
        return AdviceAccount(name, extra, None, None, None, "beyond what these runs can tell")
    share = sum(w * standing.likely_pruned for w, standing in zip(weights, near, strict=True))
    standing = Lead(_mix([item.difference for item in near], weights), share)
    losses = [fit.at("scratch", (tokens + extra) / scale) for fit, scale in both]
    crossing = crossover(fits[0], extra / scales[0]) if len(fits) == 1 else None
    return AdviceAccount(name, extra, _mix(losses, weights), standing, crossing, standing.winner)


def _distances(
    evidence: Evidence, question: Question, fits: Sequence[Fit], targets: Sequence[float], extra: float
) -> Iterator[Distance]:
    """Yield the distances from the question to the evidence, whose pruned models have ``targets`` parameters."""
    point = fits[0].points[0]
    target = question.target(evidence.granularity[point.method])
    pruned, scratch = (
        [tokens / size for fit, size in zip(fits, targets, strict=True) for tokens in fit.budgets(path)]
        for path in ("pruned", "scratch")
    )
    ratios = [fit.points[0].ratio for fit in fits]
    yield Distance("parameters of the parent", question.parameters, *[evidence.parent_parameters] * 2)
    yield Distance("ratio", question.ratio, min(ratios), max(ratios))
    yield Distance(_RETRAINING, question.tokens / target, min(pruned), max(pruned))
    yield Distance(_SCRATCH, (question.tokens + extra) / target, min(scratch), max(scratch))
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
        basis: what it rests on: fitted ``curves``, a published ``finding``, or nothing.
        obstacles: why nothing, or no curve, answers.
        claim: the finding, where it is one.
        absent: whether no figure of the question's method, or of its granularity, is there, so that others stand in.
    """

    choice: Choice
    basis: Literal["curves", "finding", "none"]
    obstacles: tuple[Obstacle, ...] = ()
    claim: Claim | None = None
    absent: bool = False


def advise(evidence: Evidence, question: Question, cases: Sequence[Case], obstacles: Sequence[Obstacle]) -> Advice:
    """Sum up the cases; without any, what the published findings say; else why nothing answers."""
    absent = question.method is not None and question.method not in evidence.granularity
    winners = {case.account(question.decides).winner for case in cases} - {"beyond what these runs can tell"}
    if winners:
        choice: Choice = _CHOICES[winners.pop()] if len(winners) == 1 else "depends on the method"
        return Advice(choice, "curves", absent=absent)
    if evidence.published and not obstacles_of(evidence, question):
        budget = question.tokens / question.parameters
        finding = claim(question.ratio, question.granularity, budget, question.extra / question.tokens)
        if finding:
            return Advice(_CHOICES[finding.winner], "finding", tuple(obstacles), finding, absent)
    if cases:
        far = [d for d in cases[0].distances if d.quantity in (_RETRAINING, _SCRATCH)]
        obstacles = [*obstacles, Obstacle("budget", max(far, key=lambda d: max(d.factor, 1 / d.factor)))]
    return Advice("cannot be told from these figures", "none", tuple(obstacles), absent=absent)
