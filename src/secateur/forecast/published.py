"""The figures of arXiv:2606.14150: the evidence for recommendations without a study.

Losses are read off an image of its first figure, to about 0.01 nats. One seed each. The authors count 4.0 million
tokens a step where a step has 4,194,304 (512 sequences of 8,192); tokens here are counted exactly, so that their 50 B
are 52.4 B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.forecast.curve import CurvePoint, Path
from secateur.forecast.evidence import SLACK, Accuracy, Evidence

__all__ = ["HIGHEST", "LABELS", "LOWEST", "Claim", "claim", "exact", "published"]

LABELS = (10, 30, 50, 250, 500)  #: the ladder's budgets in billions of tokens, as the authors count them

Trend = Literal["ahead", "nearly gone", "behind", "accuracies"]

LOWEST, HIGHEST = 0.5, 0.8  #: ratios of the study; curves are of the lowest
_EXTRA = 4  #: tokens that scratch gets beyond R at equal total tokens, in those of R
_LIKE = 4  #: how many times a budget may lie from the study's to be like it
_PARENT = 8.03e9  #: parameters

#: method, path -> held-out loss (DCLM), in nats per token, at each of the budgets
_LOSSES: dict[tuple[str, Path], Sequence[float]] = {
    ("minitron-depth", "scratch"): (3.09, 2.81, 2.64, 2.49, 2.47),
    ("minitron-depth", "pruned"): (2.70, 2.59, 2.54, 2.46, 2.43),
    ("minitron-width", "scratch"): (3.11, 2.80, 2.70, 2.46, 2.44),
    ("minitron-width", "pruned"): (2.62, 2.47, 2.47, 2.39, 2.35),
}
_PARAMETERS = {"minitron-depth": 4_540_000_000, "minitron-width": 4_510_000_000}  # 4b-depth and 4b-width

#: Average of eight zero-shot tasks, in percent: 250 B tokens from scratch, and a parent of 200 B retrained on 50 B.
_ACCURACIES = (
    Accuracy("minitron-depth", "depth", scratch=66.2, pruned=64.4),
    Accuracy("sheared", "depth+width", scratch=65.3, pruned=65.9),
    Accuracy("sparsegpt 2:4", "sparse", scratch=67.1, pruned=66.7),
    Accuracy("sparsegpt", "sparse", scratch=66.3, pruned=67.5),
)


def exact(label: float) -> int:
    """Tokens, counted exactly, of a budget that the authors call so many billions."""
    return round(label * 1e9 * 4_194_304 / 4_000_000)


def published() -> Evidence:
    """The published runs: Llama-3.1-8B's shape, pruned at 0.5."""
    points = tuple(
        CurvePoint(path, method, LOWEST, _PARAMETERS[method], exact(label), loss)
        for (method, path), losses in _LOSSES.items()
        for label, loss in zip(LABELS, losses, strict=True)
    )
    return Evidence(
        source="arXiv:2606.14150, figure 1 (losses read off an image, to about 0.01 nats; one seed)",
        parent_parameters=_PARENT,
        parent_tokens=exact(200),
        parent_loss=2.40,
        points=points,
        granularity={"minitron-depth": "depth", "minitron-width": "width"},
        published=True,
        accuracies=_ACCURACIES,
    )


@dataclass(frozen=True)
class Claim:
    """What the study's findings say where it has no curve.

    Attributes:
        trend: pruning ``ahead``; its advantage ``nearly gone``; ``behind`` at equal total tokens; or ``accuracies`` of
            both paths that lie close together.
        winner: the path ahead; None where the advantage is nearly gone.
        beyond: whether no ratio as low, or as high, was run, so that the trend speaks.
    """

    trend: Trend
    winner: Path | Literal["undecided"] | None
    beyond: bool


def claim(ratio: float, granularity: str | None, budget: float, extra: float) -> Claim | None:
    """What the study's findings say of a question.

    The advantage of pruned weights at equal training tokens shrinks as more is removed and as tokens grow. So fewer
    tokens and a lower ratio than the study's can only favour pruning more, and more tokens and a higher ratio less.

    Args:
        budget: R in tokens for each parameter of the parent.
        extra: tokens that scratch gets beyond R, in those of R: zero at equal training tokens.

    Returns:
        None where the findings leave it open.
    """
    retraining = budget / (exact(50) / _PARENT)
    if ratio >= HIGHEST - SLACK:
        if retraining < 1 / _LIKE or (extra >= 1 and granularity == "sparse"):
            return None
        beyond = ratio > HIGHEST + SLACK
        return Claim("nearly gone", None, beyond) if extra < 1 else Claim("behind", "scratch", beyond)
    if extra == 0:
        return Claim("ahead", "pruned", ratio < LOWEST - SLACK) if retraining <= _LIKE else None
    if ratio < LOWEST - SLACK or not 1 / _LIKE <= retraining <= _LIKE or not 1 <= extra <= _LIKE * _EXTRA:
        return None
    if granularity == "depth":
        return Claim("behind", "scratch", False) if extra >= _EXTRA else None
    measured = ratio <= LOWEST + SLACK and granularity in ("sparse", "depth+width")
    return Claim("accuracies", "undecided", False) if measured else None
