"""The cost of each path and of a pilot: tokens, FLOPs by formula, and money where an accelerator's price is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.forecast.advice import NEAR, Question
from secateur.forecast.crossover import REACH
from secateur.model.shapes import Shape, train_flops

__all__ = ["Pilot", "Price", "Sizes", "cheapest_pilot", "costs", "pilot_record"]

_SCORING = 128 * 2048  # tokens: what `secateur prune` calibrates on unless told otherwise
_CONTEXT = 2048  # window that a shape's FLOPs are averaged over
_SPEED = 4e14  # FLOPs a second that a data-centre accelerator sustains in training, unless told otherwise
_LADDER = (1 / 4, 1 / 2, 1)  # budgets of a pilot, in those of the largest


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
    currency: str = "USD"

    def of(self, flops: float) -> float:
        """Money."""
        return flops / self.flops / 3600 * self.hour


def costs(question: Question, sizes: Sizes, price: Price | None, learned: float = 0.0) -> dict[str, Any]:
    """Every term of both paths, and what they come to.

    The parent is *sunk* where it is there already; where it must be trained, its cost is *charged*, or *shared* by its
    children.

    Args:
        learned: tokens that the pruning itself trains the parent on; the model from scratch gets as many more.

    Returns:
        ``formula``; ``currency``; ``extra_scratch_tokens``, the parent's share; ``terms`` (``name``, ``tokens``,
        ``flops``, ``money``); ``paths``, likewise: pruned, and from scratch on R tokens, on R and the parent's share
        (``total``), and on what the FLOPs of the pruned path pay for (``flops``). What depends on a parent's tokens is
        None where they are not known, and money where there is no price.
    """
    tokens, parent = question.tokens, question.parent_tokens
    share = None if parent is None else parent / question.children
    account = "sunk" if not question.must_train else "charged" if question.children == 1 else "shared"
    whole = None if parent is None else sizes.training(0, parent)
    scoring = sizes.training(0, _SCORING) / 3
    retraining = sizes.training(1, tokens)
    charged = 0.0 if not question.must_train else None if whole is None else whole / question.children
    learning = sizes.training(0, learned)
    pruned = scoring + learning + retraining + (charged or 0.0)
    terms = [
        ("parent's training", parent, whole),
        (f"of it, {account}", share if question.must_train else None, charged),
        ("scoring", _SCORING, scoring),
        *([("learning what to prune", learned, learning)] if learned else []),
        ("retraining", tokens, retraining),
    ]
    longer = None if share is None else tokens + learned + share
    equal = None if whole is None else tokens + (whole / question.children + learning) / sizes.training(1, 1)
    scratch = {"training": tokens + learned, "total": longer, "flops": equal}
    paths = [("pruned", None, pruned)]
    paths += [(f"scratch, equal {n}", t, None if t is None else sizes.training(1, t)) for n, t in scratch.items()]
    return {
        "formula": sizes.formula,
        "currency": price.currency if price else None,
        "extra_scratch_tokens": share,
        "account": account,
        "terms": [_row(name, t, flops, price) for name, t, flops in terms],
        "paths": [_row(name, t, flops, price) for name, t, flops in paths],
    }


def _row(name: str, tokens: float | None, flops: float | None, price: Price | None) -> dict[str, Any]:
    money = price.of(flops) if price and flops is not None else None
    return {"name": name, "tokens": tokens, "flops": flops, "money": money}


@dataclass(frozen=True)
class Pilot:
    """The least that these rules would accept as an answer: both paths at three budgets.

    Attributes:
        parent: parameters of the parent that is pruned: the question's, or the smallest that counts as near it.
        parent_tokens: that it has to be trained on first; zero where it is there.
        budgets: tokens of each path, rising; the question's budget is within reach of the largest.
        longer: a further budget from scratch, for the account that decides; zero where the others do.
    """

    parent: float
    parent_tokens: float
    budgets: tuple[float, ...]
    longer: float
    flops: float

    @property
    def tokens(self) -> float:
        """All that is trained on."""
        return self.parent_tokens + 2 * sum(self.budgets) + self.longer


def cheapest_pilot(question: Question, sizes: Sizes, trains: bool) -> Pilot:
    """The pilot for a question: of a parent that is there, or, if it ``trains`` one, as small as counts as near it.

    A smaller parent has the question's tokens a parameter, so that its tokens shrink as it does.
    """
    shrink = NEAR if trains else 1
    largest = question.tokens / shrink / REACH
    budgets = tuple(largest * share for share in _LADDER)
    parent_tokens = (question.parent_tokens or 0) / shrink if trains else 0.0
    longest = (question.tokens + question.extra) / shrink / REACH
    longer = longest if longest > largest else 0.0
    training = sizes.training(1, 2 * sum(budgets) + longer) + sizes.training(0, parent_tokens + _SCORING / 3)
    return Pilot(question.parameters / shrink, parent_tokens, budgets, longer, training / shrink)


def pilot_record(pilot: Pilot, price: Price | None) -> dict[str, Any]:
    """A pilot as plain values; hours are those of one accelerator."""
    speed = price.flops if price else _SPEED
    return {
        "parent_parameters": pilot.parent,
        "parent_tokens": pilot.parent_tokens,
        "budgets": list(pilot.budgets),
        "longer_scratch": pilot.longer or None,
        "tokens": pilot.tokens,
        "flops": pilot.flops,
        "flops_per_second": speed,
        "hours": pilot.flops / speed / 3600,
        "money": price.of(pilot.flops) if price else None,
        "currency": price.currency if price else None,
    }
