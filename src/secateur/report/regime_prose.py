"""Sentences about the regime of a study. ASCII, except for the minus sign."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from secateur.comparison.decision import MARGIN, VerdictName
from secateur.comparison.naming import group_name
from secateur.comparison.regime import PUBLISHED, RateSweeps, Regime, RegimeCheck, TokenShare
from secateur.formatting import join_words
from secateur.methods.registry import method_name

__all__ = [
    "REGIME_TITLE",
    "caution",
    "check_name",
    "continued_sentence",
    "regime_json",
    "regime_line",
    "regime_rows",
    "regime_sentences",
    "retraining_sentence",
    "share_json",
    "sweeps_sentence",
    "tokens_sentence",
    "twins_sentence",
]

REGIME_TITLE = "Is this regime the question's?"
_MOST_NAMES, _MOST_NAMES_IN_CAUTION = 6, 3
_FEWER = 10  # times fewer tokens for each parameter than in the published study, from which on a parent is undertrained

#: verdict on two losses -> how the second loss of a sentence stands to the first, those against the question first
_PHRASES: dict[VerdictName, str] = {
    "second": "higher",
    "first": "lower",
    "equal within margin": f"equal within {MARGIN:g} nats",
    "undecided": "undecided",
    "not measured": "not measured",
}


def tokens_sentence(parent: str, share: TokenShare) -> str:
    """The tokens of a parent for each of its parameters, beside those of the published study."""
    published = f"in the published study (arXiv:2606.14150) it is {PUBLISHED.per_parameter:.0f}"
    outside = f"({PUBLISHED.per_non_embedding:.0f})"
    if share.per_parameter is None or share.per_non_embedding is None:
        return f"How many tokens {parent} was trained on for each parameter is not known; {published}."
    return (
        f"{parent[0].upper()}{parent[1:]} trains on {_ratio(share.per_parameter)} tokens for each of its parameters "
        f"({_ratio(share.per_non_embedding)} for each outside the embeddings); {published} {outside}."
    )


def sweeps_sentence(sweeps: RateSweeps) -> str:
    """Which learning rates are chosen by a sweep."""
    names = {"parent": "the parent", "scratch": "training from scratch", "retraining": "retraining"}
    swept = [names[path] for path, value in asdict(sweeps).items() if value]
    fixed = [names[path] for path, value in asdict(sweeps).items() if value is False]
    if not swept:
        return "Learning rates are not swept."
    return f"Learning rates are swept for {join_words(swept)}{', not for ' + join_words(fixed) if fixed else ''}."


def twins_sentence(regime: Regime) -> str:
    """Whether the parent beats its twins on P+R tokens."""
    if not regime.twins:
        return "Whether the parent beats its own twin is not measured: the study has no run S_{P+R}."
    return (
        f"The parent's held-out loss, beside that of its twins S_{{P+R}}: {_clauses(regime.twins, note_sparse=True)}."
    )


def retraining_sentence(regime: Regime) -> str:
    """Whether retraining lowered the loss that pruning left."""
    if not regime.retraining:
        return "Whether retraining lowers the loss that pruning left is not measured: the study has no run P-R."
    return f"The loss after retraining, beside that which pruning left: {_clauses(regime.retraining)}."


def continued_sentence(regime: Regime) -> str:
    """Whether the parent beats its pruned models on the same tokens; empty where nothing raises the question."""
    if regime.continued:
        return (
            "The held-out loss of the parent, trained on the same tokens as P-R (parent-continued), beside "
            f"that of P-R: {_clauses(regime.continued)}."
        )
    if not regime.unmatched_gains:
        return ""
    return (
        f"P-R ends below its parent for {_names(regime.unmatched_gains, regime.unmatched)}, but the parent is a "
        "checkpoint that this study did not train on its corpus, so the tokens may explain it; the control "
        "parent-continued, which the study does not have, trains the parent on the same tokens."
    )


def regime_sentences(regime: Regime, several_parents: bool) -> tuple[str, ...]:
    """All that is known of a parent's regime."""
    name = f"parent {regime.parent}" if several_parents else "the parent"
    return (
        tokens_sentence(name, regime.share),
        twins_sentence(regime),
        retraining_sentence(regime),
        *filter(None, [continued_sentence(regime)]),
        sweeps_sentence(regime.sweeps),
    )


def regime_line(regimes: Sequence[Regime]) -> str:
    """How much each parent read for its size, in a sentence."""
    several = len(regimes) > 1
    return " ".join(
        tokens_sentence(f"parent {regime.parent}" if several else "the parent", regime.share) for regime in regimes
    )


def caution(regimes: Sequence[Regime]) -> str:
    """Why a study tells little about pruning a well-trained parent; empty where nothing shows that."""
    texts = []
    for regime in regimes:
        reasons = [*filter(None, (_weak_parent(regime) or _few_tokens(regime), _harmful_retraining(regime)))]
        about = f" with parent {regime.parent}" if len(regimes) > 1 else ""
        if reasons:
            text = "; and ".join(reasons)
            texts.append(f"This study{about} tells little about pruning a well-trained parent: {text}.")
    return " ".join(texts)


def _weak_parent(regime: Regime) -> str:
    better, total = regime.better_twins, len(regime.twins)
    if not better:
        return ""
    if len(better) <= _MOST_NAMES_IN_CAUTION:
        noun = "twins" if len(better) > 1 else "twin"
        twins = f"its {noun} S_{{P+R}} of {_names(better, regime.twins, note_sparse=True)}"
    else:
        sparse = sum(check.sparse for check in better)
        kinds = [f"{len(better) - sparse} smaller"] if sparse < len(better) else []
        kinds += [f"{sparse} sparse, of its own shape"] if sparse else []
        number = f"all {total} of its" if len(better) == total else f"{len(better)} of its {total}"
        twins = f"{number} twins S_{{P+R}} ({'; '.join(kinds)})"
    return f"the parent has a higher loss than {twins}, so it has learned less than its size allows"


def _few_tokens(regime: Regime) -> str:
    per_parameter = regime.share.per_parameter
    if per_parameter is None or PUBLISHED.per_parameter is None or per_parameter > PUBLISHED.per_parameter / _FEWER:
        return ""
    return (
        f"the parent read {_ratio(per_parameter)} tokens for each of its parameters, where that of the published study "
        f"read {PUBLISHED.per_parameter:.0f}"
    )


def _harmful_retraining(regime: Regime) -> str:
    raised, total = regime.harmful_retraining, len(regime.retraining)
    if not raised:
        return ""
    where = f"in {len(raised)} of {total} comparisons" if total > 1 else f"of {_names(raised, raised)}"
    return (
        f"retraining raised the loss that pruning left {where}, so P-R measures the retraining as much as the pruning"
    )


def _clauses(checks: Sequence[RegimeCheck], note_sparse: bool = False) -> str:
    """The verdicts with the comparisons of each."""
    clauses = []
    for verdict, phrase in _PHRASES.items():
        matches = [check for check in checks if check.decision.verdict == verdict]
        if len(matches) == len(checks) > 1:
            clauses.append(f"{phrase} for {'both' if len(checks) == 2 else f'all {len(checks)}'}")
        elif matches:
            clauses.append(f"{phrase} for {_names(matches, checks, note_sparse)}")
    return "; ".join(clauses)


def _names(checks: Sequence[RegimeCheck], among: Sequence[RegimeCheck], note_sparse: bool = False) -> str:
    """The comparisons by name; if they are many, their number for each method."""
    if len(checks) <= _MOST_NAMES:
        return join_words([check_name(check, among, note_sparse) for check in checks])
    numbers = Counter(method_name(check.group.method) for check in checks)
    return f"{len(checks)} of {len(among)} ({', '.join(f'{name}: {number}' for name, number in numbers.items())})"


def check_name(check: RegimeCheck, among: Sequence[RegimeCheck], note_sparse: bool = False) -> str:
    """The name of a comparison of the regime; ``note_sparse`` says which models have the parent's shape."""
    name = group_name(check.group, [item.group for item in among], target=True)
    return f"{name} (sparse, of the parent's shape)" if check.sparse and note_sparse else name


def regime_rows(regime: Regime) -> list[dict[str, Any]]:
    """A row for each comparison of the regime, for the page's table."""
    kinds = (
        ("parent", "S_{P+R}", regime.twins),
        ("P-R", "before retraining", regime.retraining),
        ("parent-continued", "P-R", regime.continued),
        ("parent", "P-R", regime.unmatched),
    )
    return [
        {
            "first": first,
            "second": second,
            "name": check_name(check, checks),
            "check": check,
            "verdict": _PHRASES[check.decision.verdict],
        }
        for first, second, checks in kinds
        for check in checks
    ]


def regime_json(regime: Regime) -> dict[str, Any]:
    """A regime as plain values."""
    return {
        "parent": regime.parent,
        **share_json(regime.share),
        "published": share_json(PUBLISHED),
        "swept": asdict(regime.sweeps),
        "twins": [_check_json(check) for check in regime.twins],
        "retraining": [_check_json(check) for check in regime.retraining],
        "continued": [_check_json(check) for check in regime.continued],
        "unmatched": [_check_json(check) for check in regime.unmatched],
    }


def share_json(share: TokenShare) -> dict[str, Any]:
    """Tokens and parameters of a parent as plain values."""
    return {
        **asdict(share),
        "tokens_per_parameter": share.per_parameter,
        "tokens_per_non_embedding_parameter": share.per_non_embedding,
    }


def _check_json(check: RegimeCheck) -> dict[str, Any]:
    """A comparison of the regime; ``difference`` is positive where the losses are as the question assumes."""
    decision = check.decision
    return {
        **asdict(check.group),
        "sparse": check.sparse,
        "verdict": decision.verdict,
        "difference": decision.value,
        "interval": None if decision.low is None else [decision.low, decision.high],
        "p": decision.p,
        "seeds": decision.seeds,
        "reason": decision.reason,
    }


def _ratio(value: float) -> str:
    """Tokens for each parameter: three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
