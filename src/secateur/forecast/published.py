"""The figures of arXiv:2606.14150: the evidence for recommendations without a study.

Losses are read off an image of its first figure, to about 0.01 nats. One seed each. The authors count 4.0 million
tokens a step where a step has 4,194,304 (512 sequences of 8,192); tokens here are counted exactly, so that their 50 B
are 52.4 B.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.forecast.curve import CurvePoint, Path
from secateur.forecast.evidence import Accuracy, Evidence, PublishedFinding

__all__ = ["LABELS", "exact", "published"]

LABELS = (10, 30, 50, 250, 500)  #: the ladder's budgets in billions of tokens, as the authors count them

_RATIO = 0.5
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

_FINDINGS = (
    PublishedFinding(
        "training", "pruned", "pruned weights beat random ones; less so after more tokens, and hardly at 0.8"
    ),
    PublishedFinding("total", None, "fine granularity keeps an advantage; coarse granularity is matched or overtaken"),
)


def exact(label: float) -> int:
    """Tokens, counted exactly, of a budget that the authors call so many billions."""
    return round(label * 1e9 * 4_194_304 / 4_000_000)


def published() -> Evidence:
    """The published runs: Llama-3.1-8B's shape, pruned at 0.5."""
    points = tuple(
        CurvePoint(path, method, _RATIO, _PARAMETERS[method], exact(label), loss)
        for (method, path), losses in _LOSSES.items()
        for label, loss in zip(LABELS, losses, strict=True)
    )
    return Evidence(
        source="arXiv:2606.14150, figure 1 (losses read off an image, to about 0.01 nats; one seed)",
        parent_parameters=8.03e9,
        parent_tokens=exact(200),
        parent_loss=2.40,
        points=points,
        granularity={"minitron-depth": "depth", "minitron-width": "width"},
        accuracies=_ACCURACIES,
        findings=_FINDINGS,
    )
