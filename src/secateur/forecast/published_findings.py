"""Published findings about pruning and training from scratch, each with its source and conditions.

Findings are quoted as they were published: no curve is fitted to them, since each has its own data, metric and recipe.
Figures were checked at the source that is named. Tokens are those of the source, as its authors count them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FINDINGS", "PublishedFinding", "by_relevance"]


@dataclass(frozen=True)
class PublishedFinding:
    """What a source measured.

    Attributes:
        source: arXiv number.
        table: where it stands in the source.
        conditions: models, ratio and data, in words.
        tokens: what each path was trained on, in words.
        distilled: whether the pruned model learned from its parent's outputs; None where the source does not say.
        statement: what was found, in a sentence.
        figures: name and value of each figure.
        granularities: what was removed: depth, width, depth+width, sparse or experts.
        ratios: smallest and largest share that was removed; None where it could not be checked.
    """

    source: str
    table: str
    conditions: str
    tokens: str
    distilled: bool | None
    statement: str
    figures: tuple[tuple[str, float], ...]
    granularities: tuple[str, ...]
    ratios: tuple[float, float] | None


_STUDY = "arXiv:2606.14150"
_ALL = ("depth", "width", "depth+width", "sparse")

FINDINGS = (
    PublishedFinding(
        _STUDY,
        "abstract; tokens in the authors' repository",
        "Llama-3.1-8B's shape, parent trained on 200 B tokens, six methods, ratios 0.5 to 0.8, one seed",
        "R = 50 B on both paths",
        False,
        "At equal training tokens pruned weights are ahead of random ones; the advantage shrinks with more tokens and "
        "with the ratio, and is nearly gone at 0.8.",
        (),
        _ALL,
        (0.5, 0.8),
    ),
    PublishedFinding(
        _STUDY,
        "abstract; tokens in the authors' repository",
        "Llama-3.1-8B's shape, six methods, ratios 0.5 to 0.8, one seed",
        "P = 200 B and R = 50 B, or 250 B from scratch",
        False,
        "At equal total tokens fine granularities keep an advantage; coarse ones are matched or overtaken.",
        (),
        _ALL,
        (0.5, 0.8),
    ),
    PublishedFinding(
        _STUDY,
        "table 2, WikiText perplexity",
        "Llama-3.1-8B's shape, Minitron-depth at ratio 0.5, one seed",
        "50 B from scratch; P = 200 B and R = 50 B; 250 B from scratch",
        False,
        "Pruning is ahead at equal training tokens and behind at equal total tokens.",
        (("50 B from scratch", 10.77), ("pruned", 9.41), ("250 B from scratch", 9.01)),
        ("depth",),
        (0.5, 0.5),
    ),
    PublishedFinding(
        "arXiv:2310.06694",
        "table 2, average of eleven tasks",
        "Llama-2-7B (2 T tokens) pruned by Sheared LLaMA to 2.7 B; the models from scratch have other data",
        "0.4 B for pruning and 50 B after it; 0.3 to 1 T from scratch",
        False,
        "Retraining on 50 B tokens ends above models of the size that were trained from scratch on 0.3 to 1 T; the "
        "parent's own 2 T are not counted.",
        (
            ("Sheared-LLaMA-2.7B, 50 B", 56.7),
            ("OPT-2.7B, 300 B", 51.4),
            ("Pythia-2.8B, 300 B", 52.5),
            ("INCITE-Base-3B, 800 B", 54.7),
            ("OpenLLaMA-3B-v1, 1 T", 55.1),
            ("OpenLLaMA-3B-v2, 1 T", 55.7),
        ),
        ("depth+width",),
        (0.6, 0.6),
    ),
    PublishedFinding(
        "arXiv:2310.06694",
        "table 2, average of eleven tasks",
        "Llama-2-7B (2 T tokens) pruned by Sheared LLaMA to 1.3 B; the models from scratch have other data",
        "0.4 B for pruning and 50 B after it; 300 B from scratch",
        False,
        "Retraining on 50 B tokens ends above models of the size that were trained from scratch on 300 B; the parent's "
        "own 2 T are not counted.",
        (("Sheared-LLaMA-1.3B, 50 B", 51.0), ("OPT-1.3B, 300 B", 48.2), ("Pythia-1.4B, 300 B", 48.9)),
        ("depth+width",),
        (0.8, 0.8),
    ),
    PublishedFinding(
        "arXiv:2407.14679",
        "table 11, HellaSwag and MMLU",
        "Nemotron-4 15B pruned to 4 B (Minitron-width), at equal compute with the teacher's included",
        "150 B from scratch; 150 B after pruning; 100 B after pruning with a teacher",
        True,
        "Without a teacher pruning is ahead of random weights on HellaSwag and level with them on MMLU, where both "
        "guess; with a teacher it is far ahead on MMLU.",
        (
            ("from scratch: HellaSwag", 46.22),
            ("pruned: HellaSwag", 50.85),
            ("pruned, teacher: HellaSwag", 51.04),
            ("from scratch: MMLU", 24.36),
            ("pruned: MMLU", 24.57),
            ("pruned, teacher: MMLU", 37.81),
        ),
        ("width",),
        (0.73, 0.73),
    ),
    PublishedFinding(
        "arXiv:2407.14679",
        "table 10, loss after retraining",
        "Nemotron-4 15B pruned to 9.39 B (depth), 7.74 B (width) and 7.91 B (both)",
        "1.8 B after pruning; nothing from scratch",
        None,
        "Width alone ends lowest, depth with width next, depth alone highest, though it keeps most parameters.",
        (("depth", 2.155), ("width", 2.049), ("depth+width", 2.062)),
        ("depth", "width", "depth+width"),
        (0.4, 0.5),
    ),
    PublishedFinding(
        "arXiv:2408.11796",
        "table 1",
        "Llama-3.1-8B (15 T tokens) pruned to 4.5 B by Minitron-depth and Minitron-width; no twin from scratch",
        "94 B after pruning, with a teacher",
        True,
        "Width ends above depth; both stay below their parent.",
        (
            ("depth: MMLU", 58.7),
            ("width: MMLU", 60.5),
            ("parent: MMLU", 65.3),
            ("depth: HellaSwag", 73.2),
            ("width: HellaSwag", 76.1),
            ("parent: HellaSwag", 81.8),
        ),
        ("depth", "width"),
        (0.44, 0.44),
    ),
    PublishedFinding(
        "arXiv:2411.10272",
        "abstracts of versions 1 and 3",
        "Llama-3 and Qwen-2.5 models, depth, width and 2:4 pruning; no twin from scratch",
        "not in the abstracts",
        None,
        "The more is removed, the more tokens recovery takes, and larger models take fewer; one law of size, tokens, "
        "ratio and the parent's loss fits the losses after retraining.",
        (),
        ("depth", "width", "sparse"),
        None,
    ),
    PublishedFinding(
        "arXiv:2510.13999",
        "tables 2 and 3, code average and multiple-choice average",
        "mixtures of experts pruned by REAP, half of the experts removed; no twin from scratch",
        "none: no training after pruning",
        False,
        "Without half of their experts four models lose 1 to 7 points on code, and 6 to 22 on multiple-choice "
        "questions.",
        (
            ("Qwen3-30B-A3B, code", 0.558),
            ("pruned, code", 0.541),
            ("Qwen3-30B-A3B, questions", 0.721),
            ("pruned, questions", 0.503),
            ("Qwen3-Coder-480B-A35B, code", 0.636),
            ("pruned, code (480B)", 0.619),
            ("Qwen3-Coder-480B-A35B, questions", 0.750),
            ("pruned, questions (480B)", 0.692),
        ),
        ("experts",),
        (0.5, 0.5),
    ),
)


def by_relevance(granularity: str | None, ratio: float, distilled: bool) -> list[PublishedFinding]:
    """The findings, those that bear on a question first.

    Args:
        granularity: of the question; None: any.
        distilled: whether the question is about recovery with a teacher.
    """

    def distance(finding: PublishedFinding) -> tuple[bool, bool, bool, float]:
        low, high = finding.ratios or (0.0, 1.0)
        experts = "experts" in finding.granularities
        elsewhere = granularity is not None and granularity not in finding.granularities
        return experts, elsewhere, finding.distilled is not distilled, max(low - ratio, ratio - high, 0.0)

    return sorted(FINDINGS, key=distance)
