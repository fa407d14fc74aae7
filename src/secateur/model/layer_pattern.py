"""The period of layer kinds that some runtimes take from a constant, and the layers that may go without breaking it.

A family such as Gemma 3 repeats a pattern: five layers with a window of attention, then one without. config.json lists
the kind of each layer, but llama.cpp derives it from the layer's number: layer i ends a period of p if (i + 1) is a
multiple of p. After a cut the kinds of the layers that stay must follow that rule under their new numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from secateur.model.families import Family

__all__ = ["follows_period", "layer_kinds", "lowest_cut", "model_period", "run_keeps_period"]

Kinds = Sequence[bool]  #: for each layer, whether it is of the kind that ends a period


def layer_kinds(config: Any) -> tuple[bool, ...]:
    """For each layer, whether it is of the kind that ends a period: attention without a window, or without RoPE.

    Args:
        config: a configuration of transformers; that of a wrapper holds the language model's.

    Returns:
        One value for each layer; empty where all layers are alike.
    """
    config = getattr(config, "text_config", None) or config
    rope, kinds = getattr(config, "no_rope_layers", None), getattr(config, "layer_types", None)
    if rope:
        return tuple(not flag for flag in rope)
    flags = tuple(kind == "full_attention" for kind in kinds or ())
    return () if all(flags) and not getattr(config, "sliding_window", None) else flags


def follows_period(kinds: Kinds, period: int) -> bool:
    """Whether each layer has the kind that a runtime derives from its number."""
    return all(kind == _ends_period(layer, period) for layer, kind in enumerate(kinds))


def model_period(family: Family, kinds: Kinds) -> int:
    """The period that other runtimes assume; 0 where the family has none, or the model's layers do not follow it."""
    return family.pattern if family.pattern and kinds and follows_period(kinds, family.pattern) else 0


def run_keeps_period(kinds: Kinds, period: int, first: int, length: int) -> bool:
    """Whether the model without layers ``first`` to ``first + length - 1`` follows the period."""
    return follows_period([*kinds[:first], *kinds[first + length :]], period)


def lowest_cut(scores: Sequence[float], kinds: Kinds, period: int, count: int) -> list[int] | None:
    """Choose ``count`` layers to keep that follow the period, so that the scores of those that go sum to least.

    On ties the lower index goes. A layer whose score is infinite stays.

    Returns:
        Sorted indices; None where no choice follows the period.
    """
    layers = len(scores)
    # cost[i][j]: least sum of scores that go among layers i and later, with j layers kept before i.
    cost = [[math.inf] * (count + 2) for _ in range(layers + 1)]
    cost[layers][count] = 0.0
    for i in reversed(range(layers)):
        for j in range(count + 1):
            stays = cost[i + 1][j + 1] if kinds[i] == _ends_period(j, period) else math.inf
            cost[i][j] = min(scores[i] + cost[i + 1][j], stays)
    if math.isinf(cost[0][0]):
        return None
    keep: list[int] = []
    for i in range(layers):
        if scores[i] + cost[i + 1][len(keep)] != cost[i][len(keep)]:
            keep.append(i)
    return keep


def _ends_period(layer: int, period: int) -> bool:
    return (layer + 1) % period == 0
