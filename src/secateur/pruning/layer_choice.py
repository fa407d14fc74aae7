"""Choose the layers that a depth method removes: those of the lowest scores, or of those that keep a layer pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError
from secateur.formatting import plural
from secateur.methods.base import Method, RemovalMethod
from secateur.methods.selection import lowest_indices
from secateur.model.checkpoint import Checkpoint
from secateur.model.layer_pattern import Kinds, layer_kinds, lowest_cut, model_period, run_keeps_period
from secateur.progress import notify
from secateur.pruning.target import Target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerChoice", "LayerPattern", "choose_run", "choose_single_layers", "pattern_to_keep"]


@dataclass(frozen=True)
class LayerChoice:
    """The layers to remove."""

    layers: Sequence[int]
    #: ``layer_pattern``: the period and its price, where the choice keeps one
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPattern:
    """A period of layer kinds that the layers that stay should follow."""

    period: int
    kinds: Kinds  #: of the model's layers
    required: bool  #: whether the request names it; else it is kept where that is possible

    def priced(
        self, choice: Sequence[int], best: Sequence[int], measured: str, value: float, best_value: float
    ) -> LayerChoice:
        """The choice that keeps the pattern, with its price; ``best`` is the choice without that condition."""
        price = f"{measured} {value:.4f} instead of {best_value:.4f} without layers {_numbers(best)}, which breaks it"
        if list(choice) == list(best):
            price = "at no price: the best choice keeps it"
        notify(f"`keep_pattern`: the layers that stay keep the period {self.period} of the layer kinds, {price}")
        record = {"period": self.period, "measured": measured, "value": value, "without": best_value}
        return LayerChoice(choice, {"layer_pattern": {**record, "best": list(best)}})


def pattern_to_keep(checkpoint: Checkpoint, target: Target, method: Method, layers: int) -> LayerPattern | None:
    """The pattern that pruning to ``layers`` layers should keep; None for no constraint.

    Raises:
        UserError: if the request names it, and the model or the number of layers cannot have it.
    """
    family, kinds = checkpoint.family, layer_kinds(checkpoint.config)
    if method.granularity != "depth" or target.keep_pattern is False:
        return None
    if not family.pattern or not kinds:
        if target.keep_pattern:
            notify(
                f"`keep_pattern`: without effect, since no runtime derives the layers of this {family.name} by number"
            )
        return None
    pattern = LayerPattern(model_period(family, kinds), kinds, bool(target.keep_pattern))
    if not pattern.period:
        if target.keep_pattern:
            raise UserError(
                f"`keep_pattern`: the layers of {checkpoint.directory} do not follow the period {family.pattern} of "
                f"{family.name} before the cut; leave it out"
            )
        return None
    if layers < pattern.period:
        return _impossible(pattern, layers, [pattern.period])
    if isinstance(method, RemovalMethod) and method.contiguous and (len(kinds) - layers) % pattern.period:
        removals = range(pattern.period, len(kinds) - pattern.period + 1, pattern.period)
        notify(
            f"`keep_pattern`: {plural(len(kinds) - layers, 'layer')} in one run keep the period {pattern.period} only "
            f"near the end of the model; {' or '.join(map(str, removals)) or 'no number of'} layers can go anywhere"
        )
    return pattern


def choose_run(
    scores: Tensor,
    free: Sequence[int],
    length: int,
    pattern: LayerPattern | None,
    measured: str,
    values: Sequence[float],
) -> LayerChoice:
    """Choose the run of layers to remove.

    Args:
        scores: of each run, by its first layer; the lowest goes.
        free: the runs that may go.
        length: layers in a run.
        measured: what ``values`` are of the model without each run, ``loss`` or ``accuracy``.
    """
    best = _lowest(scores, free)
    if pattern is None:
        return LayerChoice(_run(best, length))
    legal = [first for first in free if run_keeps_period(pattern.kinds, pattern.period, first, length)]
    if not legal:
        _impossible(pattern, len(pattern.kinds) - length, [])
        return LayerChoice(_run(best, length))
    first = _lowest(scores, legal)
    return pattern.priced(_run(first, length), _run(best, length), measured, values[first], values[best])


def choose_single_layers(scores: Tensor, count: int, pattern: LayerPattern | None) -> LayerChoice:
    """Choose ``count`` layers to remove by the scores of single layers; an infinite score spares a layer."""
    best = lowest_indices(scores, count)
    if pattern is None:
        return LayerChoice(best)
    values, layers = scores.tolist(), len(scores)
    choices = {n: lowest_cut(values, pattern.kinds, pattern.period, n) for n in range(pattern.period, layers)}
    keep = choices.get(layers - count)
    if keep is None:
        _impossible(pattern, layers - count, [n for n, choice in choices.items() if choice is not None])
        return LayerChoice(best)
    choice = sorted(set(range(layers)) - set(keep))
    sums = [math.fsum(values[layer] for layer in cut) for cut in (choice, best)]
    return pattern.priced(choice, best, "sum of scores", *sums)


def _lowest(scores: Tensor, candidates: Sequence[int]) -> int:
    return candidates[lowest_indices(scores[list(candidates)])[0]]


def _impossible(pattern: LayerPattern, layers: int, counts: Sequence[int]) -> None:
    """Refuse or report a number of layers that cannot follow the pattern, with the nearest that can."""
    nearest = sorted(sorted(counts, key=lambda n: abs(n - layers))[:2])
    reason = f"no choice of {plural(layers, 'layer')} keeps the period {pattern.period} of the layer kinds"
    remedy = f"{' or '.join(map(str, nearest))} layers can" if nearest else "another number of layers may"
    if pattern.required:
        raise UserError(f"`keep_pattern`: {reason}; {remedy}")
    notify(f"`keep_pattern`: {reason}; {remedy}. The layers are chosen without it")


def _run(first: int, length: int) -> list[int]:
    return list(range(first, first + length))


def _numbers(layers: Sequence[int]) -> str:
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
