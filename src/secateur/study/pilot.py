"""Write a study that would sharpen a recommendation: the question in small, or the next run of the user's own study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.config import dump_yaml, load_yaml, parse
from secateur.errors import UserError
from secateur.files import write_text
from secateur.forecast.advice import Case, Question
from secateur.formatting import count
from secateur.methods.registry import METHODS
from secateur.study.spec import StudySpec, load_study

__all__ = ["write_pilot"]

_STDLIB = 3_000_000  #: training tokens that Python's standard library has to give, with a margin
_LAYERS, _HEAD = 6, 16
_VOCABULARY = 512
_SLACK = 0.05  # how far the proportions may be from the question's to count as the same
_HOLDOUT = 0.3  # of the documents: those of the windows have to be many for their differences to decide
_TOKENS_A_PARAMETER = 20  # of a parent whose tokens are not known: about what compute-optimal training gives
_METHODS = {"depth": ["minitron-depth"], "width": ["minitron-width"], "sparse": ["wanda"], "depth+width": ["sheared"]}


def write_pilot(out: Path, question: Question, cases: list[Case], like: Path | None) -> dict[str, Any]:
    """Write a study file for ``secateur study plan`` and ``run``.

    Args:
        cases: the fits; their most informative next run gives the budget of a study ``like`` another.
        like: a study file whose corpus, parent and recipe are copied; None for a small parent on the standard library,
            with as many tokens for each parameter as the question has, as far as that text goes.

    Returns:
        ``file``, ``study`` (its contents), ``says`` (its purpose, in a sentence).

    Raises:
        UserError: if ``out`` exists, or the study is invalid.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; name a new file for `pilot`")
    if question.method in METHODS and not METHODS[question.method].source:
        raise UserError(f"`method`: {question.method} is a control, which tells nothing of pruning; name another")
    if like is None:
        raw, says = _scaled(question)
    else:
        study = load_study(like)  # reports errors as that file's
        raw, says = _next(question, cases, dict(load_yaml(like)), study.ratios)
    raw |= {"name": "pilot", "title": f"Pilot: {says}"}
    parse(StudySpec, raw, origin=f"the pilot study {out}")
    head = f"# Written by `secateur recommend`. {says}\n#   secateur study plan {out}     what it costs\n"
    write_text(out, head + dump_yaml(raw))
    return {"file": str(out), "study": raw, "says": says}


def _methods(question: Question) -> list[str]:
    if question.method is not None:
        return [question.method]
    if question.granularity is None:
        return [_METHODS[granularity][0] for granularity in ("depth", "width", "sparse")]
    return _METHODS[question.granularity]


def _next(
    question: Question, cases: list[Case], raw: dict[str, Any], ratios: Sequence[float]
) -> tuple[dict[str, Any], str]:
    """The user's study with the most informative further budget, of all its methods unless the question names some."""
    runs = [run for case in cases for run in case.next_runs]
    best = min(runs, key=lambda run: (run.width, run.tokens), default=None)
    largest = max((p.tokens for case in cases for p in case.points), default=question.tokens)
    tokens = best.tokens if best else largest
    raw["retrain"] = {**raw["retrain"], "tokens": tokens}
    raw.pop("question", None)  # of other methods and budgets
    if question.method or question.granularity:
        raw["methods"] = _methods(question)
    if question.ratio not in ratios:
        raw["ratios"] = [question.ratio]
    return raw, f"R = {_plain(tokens)} tokens beside what has been run."


def _scaled(question: Question) -> tuple[dict[str, Any], str]:
    """A study with the proportions of the question, on the standard library."""
    parent = question.parent_tokens or _TOKENS_A_PARAMETER * question.parameters
    budget = (parent + question.tokens) / question.parameters
    sizes = [h for h in range(32, 513, 32) if budget * _non_embedding(h) <= _STDLIB] or [32]
    hidden = sizes[-1]
    total = round(min(budget * _non_embedding(hidden), _STDLIB))
    retrain = max(2048, round(total * question.tokens / (parent + question.tokens)))
    reached = total / _non_embedding(hidden)
    share = question.tokens / (parent + question.tokens)
    proportions_differ = abs(reached / budget - 1) > _SLACK or abs(retrain / total / share - 1) > _SLACK
    setting = "equal_total_tokens" if question.must_train else "equal_training_tokens"
    raw: dict[str, Any] = {
        "name": "pilot",
        "title": "",
        "question": {
            "ask": f"Is pruning and retraining on {retrain} tokens below training from scratch?",
            "comparisons": [{"setting": setting, "tokens": retrain}],
        },
        "corpus": {"source": "stdlib", "vocabulary": _VOCABULARY, "holdout": _HOLDOUT},
        "parent": {
            "tokens": max(16384, total - retrain),
            "hidden": hidden,
            "ffn": 3 * hidden,
            "layers": _LAYERS,
            "heads": hidden // _HEAD,
            "kv_heads": hidden // _HEAD // 2,
        },
        "methods": _methods(question),
        "ratios": [question.ratio],
        "retrain": {"tokens": [retrain // 4, retrain // 2, retrain], "peak_rate": 5e-4},
        "settings": list(dict.fromkeys(["equal_training_tokens", setting])),
        "calibration": {"windows": 64},
        "recipe": {"sequence": 128, "tokens_per_step": 1024, "peak_rate": 4e-3, "init": {"std": 0.06}},
        "evaluation": {"windows": 128, "points": 5},
    }
    says = (
        f"A parent of {_plain(_non_embedding(hidden))} parameters outside its embeddings, P+R = {reached:.3g} tokens "
        f"for each of them where the question has {budget:.3g}; with a corpus of your own it can be larger."
        + (" It rehearses the steps, not the proportions." if proportions_differ else "")
    )
    return raw, says


def _non_embedding(hidden: int) -> int:
    """Parameters of the pilot's parent outside its embeddings: 12 h^2 a layer with half as many KV heads; no norms."""
    return 12 * hidden**2 * _LAYERS


def _plain(value: float) -> str:
    return count(value).replace("\u00a0", " ")
