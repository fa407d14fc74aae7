"""The rule that decides every comparison: Student's t over documents and seeds, an equality margin, and Holm's method.

A comparison is decided by paired differences ``[seeds, units]``. A unit is what was measured: a document, a window, or
an item of a task. Units of one document vary together, and so do all units of one seed. The rule estimates both
variances of the mean:

    text   B = sum_d (R_d / (1 - p_d))^2,   R_d = sum over the units of d of w (y - mean),   df = K - 1
    seeds  A = var(seed means) / n,                                                          df = n - 1

y is the mean over seeds, w are the units' weights (their sum is 1), p_d is the share of document d in them, and
K = 1 / sum p_d^2 is the effective number of documents. B is the jackknife over clusters. A + B has Satterthwaite's
degrees of freedom, (A + B)^2 / (A^2 / (n - 1) + B^2 / (K - 1)). Each of the three gives a t interval and a p; the rule
takes the widest interval and the largest p. ``benchmarks/coverage.py`` prints how often it errs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.errors import UserError
from secateur.formatting import plural

__all__ = [
    "FEWEST",
    "FEW_ITEMS",
    "MARGIN",
    "Component",
    "Decision",
    "HasDecision",
    "VerdictName",
    "adjust",
    "decide",
    "decide_average",
    "decide_independent",
    "sign_test",
]

MARGIN = 0.02  #: nats per token: differences within it count as none
FEWEST = 20  #: documents, or items of tasks, below which nothing is decided
FEW_ITEMS = 30  #: items of tasks, below which the sign test must agree
LEVEL = 0.05  #: of a false verdict
_FEWEST_DF = 1e-3  # degrees of freedom, below which an interval has no end
_ROUNDING = 1e-9  # what two sums of equal losses may differ by

VerdictName = Literal["first", "second", "equal within margin", "undecided", "not measured"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Component:
    """A part of the variance of a mean difference."""

    variance: float
    df: float  #: degrees of freedom


@dataclass(frozen=True)
class Decision:
    """A mean difference, its 95% interval and the verdict.

    Attributes:
        value: mean difference, positive where the first path is better; nats per token for losses. None: not measured.
        low: lower end of the interval; None where there is none.
        high: upper end of the interval.
        p: of no difference, two-sided.
        reason: why the verdict is ``undecided`` or ``not measured``; empty otherwise.
        covers: what the interval covers, in words.
        seeds: number of different seeds.
        documents: number of documents, or of items of tasks.
        effective_documents: documents of equal weight that would be worth as much.
        text_share: share of text in the squared width of the interval; the rest is of seeds.
        margin: differences within it count as none; 0: equality is never a verdict.
        adjusted_p: p by Holm's method among ``comparisons`` (:func:`adjust`); None: this comparison stands alone.
        text: variance that comes from the documents.
        noise: variance that comes from the seeds; None with one seed.
    """

    verdict: VerdictName
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    reason: str = ""
    covers: str = ""
    seeds: int = 0
    documents: int = 0
    effective_documents: float | None = None
    text_share: float | None = None
    margin: float = MARGIN
    adjusted_p: float | None = None
    comparisons: int = 1
    text: Component | None = field(default=None, repr=False)
    noise: Component | None = field(default=None, repr=False)

    @property
    def seed_share(self) -> float | None:
        """Share of seeds in the squared width of the interval."""
        return None if self.text_share is None else 1 - self.text_share

    @property
    def sign(self) -> int:
        """1 for the verdict ``first``, -1 for ``second``, else 0."""
        return (self.verdict == "first") - (self.verdict == "second")


class HasDecision:
    """A record with a decision, whose figures it has by name."""

    decision: Decision

    @property
    def difference(self) -> float | None:
        """The mean difference, positive where the first path is better."""
        return self.decision.value

    @property
    def low(self) -> float | None:
        """Lower end of the 95% interval."""
        return self.decision.low

    @property
    def high(self) -> float | None:
        """Upper end of the 95% interval."""
        return self.decision.high

    @property
    def p(self) -> float | None:
        """Of no difference, two-sided."""
        return self.decision.p

    @property
    def reason(self) -> str:
        """Why it is not measured, or undecided."""
        return self.decision.reason


def decide(
    differences: ArrayLike,
    documents: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    margin: float | None = MARGIN,
) -> Decision:
    """Decide which of two paths is better, by paired differences.

    Args:
        differences: ``[seeds, units]``, positive where the first path is better. Equal rows count as one seed.
        documents: ``[units]``, the document of each unit.
        weights: ``[units]``, e.g. tokens; None for equal weights. Units without weight do not count.
        strata: ``[units]``, the task of each item. The mean is then centred task by task, and fewer than 30 items need
            the sign test as well. None for losses.
        margin: differences within it count as none; None or 0: equality is never a verdict.

    Raises:
        UserError: if the shapes do not match, or a weight or the margin is negative.
    """
    y, labels, w, tasks = _arguments(differences, documents, weights, strata)
    margin = _margin(margin)
    if not y.size or not w.sum() > 0:
        return Decision("not measured", reason="nothing was measured", margin=margin)
    if not np.isfinite(y).all():
        return Decision("not measured", reason="a difference is not finite", margin=margin)
    decision = _decide_mean([y], labels, w, tasks, margin, "items" if strata is not None else "documents")
    few = strata is not None and decision.documents < FEW_ITEMS
    if few and decision.sign and not _signs_agree(_distinct(y).mean(axis=0), decision):
        reason = f"of fewer than {FEW_ITEMS} items the sign test must agree, and it does not"
        return replace(decision, verdict="undecided", reason=reason)
    return decision


def decide_average(
    differences: Sequence[ArrayLike],
    documents: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    margin: float | None = MARGIN,
) -> Decision:
    """Decide by the mean over several comparisons on the same text, each with every seed that it has.

    The comparisons are taken as they are, not as a draw of some. Text is judged by the documents' means over
    comparisons. The variance between seeds is pooled over the comparisons and divided by the smallest number of seeds.
    Its degrees of freedom are those of the comparison with the most seeds: a seed's noise, such as its parent's, may be
    common to all comparisons, and several estimates of it are then no more than one.

    Args:
        differences: ``[seeds, units]`` for each comparison.
        documents: ``[units]``, as for :func:`decide`.
        weights: as for :func:`decide`.
        margin: as for :func:`decide`.

    Raises:
        UserError: if there is no comparison, or the shapes do not match.
    """
    if not differences:
        raise UserError("`differences`: there is no comparison to average over")
    parts = [_arguments(part, documents, weights, None) for part in differences]
    _, labels, w, tasks = parts[0]
    margin = _margin(margin)
    if any(not y.size or not np.isfinite(y).all() for y, *_ in parts) or not w.sum() > 0:
        return Decision("not measured", reason="a comparison was not measured", margin=margin)
    return _decide_mean([y for y, *_ in parts], labels, w, tasks, margin, "documents")


def decide_independent(first: Decision, second: Decision, *, margin: float | None = MARGIN) -> Decision:
    """Decide whether two differences that were measured on different texts differ: ``first`` less ``second``.

    Nothing is paired, so the variances add, those of the texts and those of the seeds, each with Satterthwaite's
    degrees of freedom.
    """
    margin = _margin(margin)
    if first.value is None or second.value is None or first.text is None or second.text is None:
        return Decision("not measured", reason="one of the differences was not measured", margin=margin)
    noise = _sum(first.noise, second.noise) if first.noise and second.noise else first.noise or second.noise
    decision = _judge(first.value - second.value, _sum(first.text, second.text), noise, margin)
    smaller = min((first, second), key=lambda part: part.documents)
    counts = {"documents": smaller.documents, "effective_documents": smaller.effective_documents}
    return _enough(replace(decision, seeds=min(first.seeds, second.seeds), **counts), "documents")


def adjust(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Correct the verdicts of several comparisons by Holm's method.

    ``first`` and ``second`` need an adjusted p below 0.05, else they become ``undecided``. ``equal within margin``
    stays at its own interval. Comparisons without a p do not count.
    """
    order = sorted((n for n, d in enumerate(decisions) if d.p is not None), key=lambda n: decisions[n].p or 0.0)
    result, worst = list(decisions), 0.0
    for rank, number in enumerate(order):
        decision = decisions[number]
        worst = max(worst, min(1.0, (len(order) - rank) * (decision.p or 0.0)))
        decision = replace(decision, adjusted_p=worst, comparisons=len(order))
        if decision.sign and worst >= LEVEL:
            reason = f"p is {decision.p:.2g} by itself and {worst:.2g} among {plural(len(order), 'comparison')} (Holm)"
            decision = replace(decision, verdict="undecided", reason=reason)
        result[number] = decision
    return tuple(result)


def _arguments(
    differences: ArrayLike, documents: ArrayLike, weights: ArrayLike | None, strata: ArrayLike | None
) -> tuple[Floats, NDArray[np.intp], Floats, NDArray[np.intp]]:
    """Differences ``[seeds, units]``, weights, and documents and tasks by number; units without weight are left out."""
    y, labels = _numbers("differences", differences), _labels("documents", documents)
    y = y if y.size else y.reshape(0, len(labels))  # nothing, whatever its axes
    if y.ndim != 2:
        raise UserError(f"`differences`: needs two axes, [seeds, units], got {y.ndim}")
    units = y.shape[1]
    w = np.ones(units) if weights is None else _numbers("weights", weights)
    tasks = np.zeros(units) if strata is None else _labels("strata", strata)
    for name, values in (("documents", labels), ("weights", w), ("strata", tasks)):
        if values.shape != (units,):
            raise UserError(f"`{name}`: needs one value for each of {plural(units, 'unit')}, got shape {values.shape}")
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise UserError("`weights`: must be finite and not negative")
    counted = w > 0
    labels, tasks = (np.unique(values[counted], return_inverse=True)[1] for values in (labels, tasks))
    return y[:, counted], labels, w[counted], tasks


def _numbers(name: str, values: ArrayLike) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"`{name}`: needs numbers, as many in each row") from None


def _labels(name: str, values: ArrayLike) -> NDArray[Any]:
    """The labels of units, ``[units]``; they must be alike enough to be sorted."""
    message = f"`{name}`: needs a number or a name for each unit, all of one type and none of them None"
    try:
        labels = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise UserError(message) from None
    if labels.ndim != 1 or (labels.dtype == object and not _can_be_sorted(labels)):
        raise UserError(message)
    return labels


def _can_be_sorted(labels: NDArray[Any]) -> bool:
    try:
        np.sort(labels)
    except TypeError:
        return False
    return all(label is not None for label in labels)


def _distinct(y: Floats) -> Floats:
    """The rows of ``y`` without repetitions; ``np.unique`` takes a millisecond for 400 columns."""
    return y[[n for n, row in enumerate(y) if not any(np.array_equal(row, earlier) for earlier in y[:n])]]


def _decide_mean(
    differences: Sequence[Floats],
    labels: NDArray[np.intp],
    w: Floats,
    tasks: NDArray[np.intp],
    margin: float,
    units: str,
) -> Decision:
    """Decide by the mean over comparisons, each ``[seeds, units]``, of units with documents, weights and tasks."""
    w = w / w.sum()
    each = [_distinct(y) for y in differences]
    mean = np.mean([y.mean(axis=0) for y in each], axis=0)
    text, sizes = _text(mean, labels, w, tasks)
    decision = _judge(float(mean @ w), text, _noise([y @ w for y in each]), margin)
    counts = {"documents": len(sizes), "effective_documents": float(1 / (sizes**2).sum())}
    return _enough(replace(decision, seeds=max(map(len, each)), **counts), units)


def _margin(margin: float | None) -> float:
    if margin is not None and not (isinstance(margin, Real) and math.isfinite(margin) and margin >= 0):
        raise UserError(f"`margin`: must be 0 or more, got {margin!r}")
    return margin or 0.0


def _text(y: Floats, labels: NDArray[np.intp], w: Floats, tasks: NDArray[np.intp]) -> tuple[Component | None, Floats]:
    """The variance of the weighted mean of ``y`` between documents, and each document's share of the weight.

    None with one document.
    """
    means = np.bincount(tasks, w * y) / np.bincount(tasks, w)
    shares = np.asarray(np.bincount(labels, w), dtype=np.float64)
    if len(shares) < 2:
        return None, shares
    residuals = np.bincount(labels, w * (y - means[tasks]))
    variance = float(((residuals / (1 - shares)) ** 2).sum())
    return Component(variance, float(1 / (shares**2).sum() - 1)), shares


def _noise(means: Sequence[Floats]) -> Component | None:
    """The variance of the mean over seeds, pooled over comparisons; None where none has two seeds.

    Args:
        means: the seeds' means ``[seeds]`` of each comparison.
    """
    sizes = [len(part) for part in means]
    degrees = sum(sizes) - len(sizes)
    if not degrees:
        return None
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in means)
    return Component(squares / degrees / min(sizes), max(sizes) - 1)


def _sum(a: Component, b: Component) -> Component:
    """The sum of two independent variances, with Satterthwaite's degrees of freedom."""
    variance = a.variance + b.variance
    spread = a.variance**2 / a.df + b.variance**2 / b.df
    return Component(variance, variance**2 / spread if spread else a.df + b.df)


def _judge(value: float, text: Component | None, noise: Component | None, margin: float) -> Decision:
    """The interval, p and verdict of a mean difference, by the widest interval that its components give."""
    if text is None:
        reason = "the held-out text is one document"
        return Decision("undecided", value, reason=reason, margin=margin)
    components = [text] if noise is None else [text, noise, _sum(text, noise)]
    half = max(_half_width(part) for part in components)
    if not math.isfinite(half):
        reason = "one document has nearly all of the weight, which leaves no interval"
        return Decision("undecided", value, reason=reason, margin=margin, text=text, noise=noise)
    p = max(_p_value(value, part) for part in components)
    low, high = value - half, value + half
    total = text.variance + (noise.variance if noise else 0.0)
    share = text.variance / total if total else 1.0
    covers = "held-out text" if noise is None else "held-out text and seeds"
    verdict: VerdictName = "undecided"
    if margin and -margin <= low and high <= margin:
        verdict = "equal within margin"
    elif low > _ROUNDING:
        verdict = "first"
    elif high < -_ROUNDING:
        verdict = "second"
    reason = "" if verdict != "undecided" else "the interval includes zero"
    return Decision(
        verdict, value, low, high, p, reason, covers, text_share=share, margin=margin, text=text, noise=noise
    )


def _half_width(part: Component) -> float:
    from scipy.special import stdtrit  # the quantile of Student's t; the import takes 0.7 s

    if not part.variance:
        return 0.0
    quantile = float(stdtrit(part.df, 1 - LEVEL / 2)) if part.df > _FEWEST_DF else math.inf
    return quantile * math.sqrt(part.variance)


def _p_value(value: float, part: Component) -> float:
    from scipy.special import stdtr

    if abs(value) <= _ROUNDING:
        return 1.0
    if not part.variance:
        return 0.0
    return 2 * float(stdtr(part.df, -abs(value) / math.sqrt(part.variance))) if part.df > _FEWEST_DF else 1.0


def _enough(decision: Decision, units: str) -> Decision:
    """The decision, undecided where it rests on too few documents or items."""
    if decision.documents >= FEWEST:
        return decision
    number = f"only {decision.documents} {units if decision.documents > 1 else units[:-1]}"
    return replace(decision, verdict="undecided", reason=f"{number} of the {FEWEST} that a verdict needs")


def _signs_agree(y: Floats, decision: Decision) -> bool:
    above, below, p = sign_test(y)
    return p < LEVEL and (above > below) == (decision.sign > 0)


def sign_test(differences: Floats) -> tuple[int, int, float]:
    """Count the differences above and below zero, with the two-sided p of a fair coin; ties do not count.

    For items that are right or wrong this is McNemar's exact test. Without any difference p is 1.
    """
    from scipy.special import betainc  # the distribution of the binomial

    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    smaller, larger = sorted((above, below))
    return above, below, min(1.0, 2 * float(betainc(larger, smaller + 1, 0.5))) if larger else 1.0
