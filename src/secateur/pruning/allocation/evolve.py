"""EvoPress: a search of levels by their fitness. All levels of all linears are equal steps in parameters."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["EvolveSettings", "child_of", "evolve_levels"]

Levels = tuple[int, ...]  #: of each linear; the zeros of a linear are those of level 0 and one step for each level
#: candidates, and the numbers of the windows to measure on -> the divergence of each candidate, lower is better
Fitness = Callable[[Sequence[Levels], Sequence[int]], Sequence[float]]


@dataclass(frozen=True)
class EvolveSettings:
    """Size of the search.

    Attributes:
        generations: generations of children.
        offspring: children in a generation.
        survivors: children that are measured once more, with the parent beside them.
        first: the share of the windows that the first selection reads, ``1 / first``; windows are drawn each time.
        last: the same of the last selection.
        seed: of mutations and windows.
    """

    generations: int = 24
    offspring: int = 16
    survivors: int = 4
    first: int = 8
    last: int = 2
    seed: int = 42

    def windows(self, windows: int) -> tuple[int, int]:
        """Windows that each of the two selections reads, of so many."""
        return max(1, windows // self.first), max(1, windows // self.last)

    def evaluations(self, windows: int) -> int:
        """Windows that candidates read in the whole search, at most."""
        first, last = self.windows(windows)
        return self.generations * (self.offspring * first + (self.survivors + 1) * last)


def child_of(parent: Levels, low: Levels, high: Levels, rng: random.Random) -> Levels:
    """The parent after k swaps, one level down here and one up there; k is the lower of two draws from 1, 2, 3."""
    child = list(parent)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        down = [i for i, level in enumerate(child) if level > low[i]]
        up = [i for i, level in enumerate(child) if level < high[i]]
        if down and up:
            child[rng.choice(down)] -= 1
            child[rng.choice(up)] += 1
    return tuple(child)


def evolve_levels(
    low: Levels, high: Levels, windows: int, fitness: Fitness, settings: EvolveSettings, advance: Callable[[], None]
) -> Levels:
    """Search from level 0 everywhere (arXiv:2410.14649); the sum of the levels stays zero.

    Many children are measured on few windows, and the best of them on more, where the parent competes.

    Args:
        low: the lowest level of each linear.
        high: the highest.
        windows: number of calibration windows.
        advance: called after each generation.
    """
    rng, parent = random.Random(settings.seed), (0,) * len(low)
    few, many = settings.windows(windows)
    for _ in range(settings.generations):
        children: dict[Levels, None] = {}
        for _ in range(20 * settings.offspring):  # a small model has few different children
            child = child_of(parent, low, high, rng)
            if child != parent and len(children) < settings.offspring:
                children[child] = None
        if not children:
            return parent
        candidates = _best(list(children), sorted(rng.sample(range(windows), few)), fitness, settings.survivors)
        (parent,) = _best([parent, *candidates], sorted(rng.sample(range(windows), many)), fitness, 1)
        advance()
    return parent


def _best(candidates: Sequence[Levels], windows: Sequence[int], fitness: Fitness, count: int) -> list[Levels]:
    values = fitness(candidates, windows)
    order = sorted(range(len(candidates)), key=lambda i: values[i])
    return [candidates[i] for i in order[:count]]
