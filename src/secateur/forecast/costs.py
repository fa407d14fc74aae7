"""The cost of each path: tokens, FLOPs by formula, and money where the price of an accelerator is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.forecast.advice import Question
from secateur.model.shapes import Shape, train_flops

__all__ = ["Price", "Sizes", "costs"]

_SCORING = 128 * 2048  # tokens: what `secateur prune` calibrates on unless told otherwise
_CONTEXT = 2048  # window that a shape's FLOPs are averaged over


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parent and of the pruned model: exact where shapes are known, else by the rule 6 N D."""

    parent: float  #: parameters, in all
    target: float
    shapes: tuple[Shape, Shape] | None = None

    def training(self, model: int, tokens: float) -> float:
        """FLOPs of training the parent (0) or the target (1)."""
        if self.shapes is not None:
            return train_flops(self.shapes[model], 1, _CONTEXT) * tokens
        return 6.0 * (self.parent, self.target)[model] * tokens

    @property
    def formula(self) -> str:
        """How the FLOPs are counted, in words."""
        if self.shapes is None:
            return "6 N D: 6 FLOPs for each parameter N and training token D, 2 N D for scoring; attention left out"
        return f"6 x weights of linears and head, and attention over windows of {_CONTEXT} tokens; scoring a third"


@dataclass(frozen=True)
class Price:
    """Of an accelerator, or of any number of them together."""

    hour: float  #: money
    flops: float  #: a second, as sustained in training

    def of(self, flops: float) -> float:
        """Money."""
        return flops / self.flops / 3600 * self.hour


def costs(question: Question, sizes: Sizes, price: Price | None) -> dict[str, Any]:
    """Every term of both paths, and what they come to.

    The parent is *sunk* where it is there already; where it must be trained, its cost is *charged*, or *shared* by its
    children.

    Returns:
        ``formula``; ``terms`` (``name``, ``tokens``, ``flops``, ``money``); ``paths`` (``name``, ``flops``, ``money``):
        pruned, and from scratch on R tokens, on R and the parent's share (``total``), and on what the FLOPs of the
        pruned path pay for (``flops``). What depends on a parent's tokens is None where they are not known, and money
        where there is no price.
    """
    tokens, parent = question.tokens, question.parent_tokens
    share = None if parent is None else parent / question.children
    account = "sunk" if not question.must_train else "charged" if question.children == 1 else "shared"
    whole = None if parent is None else sizes.training(0, parent)
    scoring = sizes.training(0, _SCORING) / 3
    retraining = sizes.training(1, tokens)
    charged = 0.0 if not question.must_train else None if whole is None else whole / question.children
    pruned = scoring + retraining + (charged or 0.0)
    terms = [
        ("parent's training", parent, whole),
        (f"of it, {account}", share if question.must_train else None, charged),
        ("scoring", _SCORING, scoring),
        ("retraining", tokens, retraining),
    ]
    longer = None if share is None else tokens + share
    equal = None if whole is None else tokens + whole / question.children / sizes.training(1, 1)
    scratch = {"training": float(tokens), "total": longer, "flops": equal}
    paths = [("pruned", None, pruned)]
    paths += [(f"scratch, equal {n}", t, None if t is None else sizes.training(1, t)) for n, t in scratch.items()]
    return {
        "formula": sizes.formula,
        "account": account,
        "terms": [_row(name, t, flops, price) for name, t, flops in terms],
        "paths": [_row(name, t, flops, price) for name, t, flops in paths],
    }


def _row(name: str, tokens: float | None, flops: float | None, price: Price | None) -> dict[str, Any]:
    money = price.of(flops) if price and flops is not None else None
    return {"name": name, "tokens": tokens, "flops": flops, "money": money}
