"""How often the decision rule errs: false verdicts and power in simulated studies.

    python benchmarks/coverage.py [--trials 2000] [--processes 2]

A simulated difference of two paths has noise of the seed (common to all of its text), of the document (common to its
windows), and of the window: one half in variance common to all seeds, one half each seed's own, sd .03 nats in all. A
verdict is false if it names a path where there is no true difference. The tables give two shares of such studies: with
equality switched off (``margin=None``), and with a margin of .02 nats, where a difference within it is no verdict
either. Cells above .06 are simulated again with ten times the trials, and are listed with what comes out. One seed
shows nothing of the seeds' noise: those cells are in brackets, since the rule claims the text alone there.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.comparison.decision import LEVEL, MARGIN, Decision, decide, decide_average, decide_independent

Floats = NDArray[np.float64]
Layout = Literal["clustered", "equal", "unequal", "lopsided"]
Kind = Literal["single", "average, seeds in common", "average, seeds apart", "independent", "tasks"]

SEEDS = (1, 2, 3, 5)
SEED_SDS = (0.0, 0.005, 0.0141, 0.05)
DOCUMENT_SDS = (0.0, 0.03, 0.05, 0.08)
WINDOW_SD = 0.03
ALLOWED = 0.07  #: share of false verdicts
NEAR = 0.06  #: shares above it are simulated again
TASKS = ((60, 120, 240), (30, 40, 80, 120, 200), (8, 8, 9))  #: items of each task


@dataclass(frozen=True)
class Cell:
    """One kind of simulated study. ``layout`` is the text's; of ``tasks``, the number of a row of ``TASKS``."""

    kind: Kind
    layout: Layout | int
    seeds: int
    seed_sd: float  #: of the difference between two runs; of tasks, on the scale of the items' latent differences
    document_sd: float = 0.0
    difference: float = 0.0  #: the true one

    @property
    def covered(self) -> bool:
        """Whether the rule claims to cover the cell's noise."""
        return self.seeds > 1 or not self.seed_sd


@dataclass(frozen=True)
class Rates:
    """Shares of simulated studies whose verdict names a path."""

    no_margin: float
    margin: float


def text(layout: Layout) -> tuple[NDArray[np.int64], Floats]:
    """The document and the weight of each unit.

    ``clustered``: 256 windows in 29 documents, one of which has 52; ``equal``: 400 documents; ``unequal``: 100
    documents whose tokens differ by a factor of ten and more; ``lopsided``: 20 documents, one of which is half of it.
    """
    if layout == "lopsided":
        return np.arange(20), np.array([19.0, *[1.0] * 19])
    if layout == "clustered":
        sizes = np.array([52, *np.maximum(1, np.round(30.5 * 0.85 ** np.arange(28)))]).astype(int)
        return np.repeat(np.arange(len(sizes)), sizes), np.ones(sizes.sum())
    if layout == "equal":
        return np.arange(400), np.ones(400)
    return np.arange(100), np.exp(np.random.default_rng(0).normal(size=100))


def noise(
    random: np.random.Generator, cell: Cell, trials: int, layout: Layout, of_seeds: Floats | None = None
) -> Floats:
    """Differences [trials, seeds, units] whose expectation is zero; ``of_seeds`` [trials, seeds] is drawn if None."""
    documents, weights = text(layout)
    shape = (trials, cell.seeds, len(weights))
    of_documents = random.normal(0, cell.document_sd, (trials, 1, documents[-1] + 1))[..., documents]
    window_sd = WINDOW_SD / np.sqrt(2 * weights)  # a unit of more tokens is measured more precisely
    y = of_documents + window_sd * random.normal(size=(trials, 1, len(weights))) + window_sd * random.normal(size=shape)
    if of_seeds is None:
        of_seeds = random.normal(0, cell.seed_sd, shape[:2])
    return y + of_seeds[..., None]


def answers(random: np.random.Generator, cell: Cell, trials: int, sizes: Sequence[int]) -> Floats:
    """Differences [trials, seeds, items] of right answers: 1, 0 or -1, a fifth of them not 0.

    The first task favours one path and the last the other one, by as much: their average favours none.
    """
    tilt = np.repeat([0.1, *[0.0] * (len(sizes) - 2), -0.1], sizes)
    latent = random.normal(0, np.sqrt(0.5), (trials, 1, sum(sizes))) + tilt
    latent = latent + random.normal(0, np.sqrt(0.5), (trials, cell.seeds, sum(sizes)))
    latent += random.normal(0, cell.seed_sd, (trials, cell.seeds, 1))
    return np.where(np.abs(latent) > 1.28, np.sign(latent), 0.0)


def decisions(random: np.random.Generator, cell: Cell, trials: int) -> Iterator[Decision]:
    """Simulate studies and decide each."""
    if cell.kind == "tasks":
        sizes = TASKS[int(cell.layout)]
        weights, strata = np.repeat(1 / np.array(sizes), sizes), np.repeat(np.arange(len(sizes)), sizes)
        for y in answers(random, cell, trials, sizes):
            yield decide(y, np.arange(len(strata)), weights=weights, strata=strata, margin=None)
        return
    layout: Layout = cell.layout  # type: ignore[assignment]
    documents, weights = text(layout)
    if cell.kind.startswith("average"):
        for parts in averaged(random, cell, trials, layout):
            yield decide_average(parts, documents, weights=weights)
        return
    every = noise(random, cell, trials, layout) + cell.difference
    if cell.kind == "single":
        yield from (decide(y, documents, weights=weights) for y in every)
        return
    labels, sizes = text("unequal")
    for y, second in zip(every, noise(random, cell, trials, "unequal"), strict=True):
        yield decide_independent(decide(y, documents, weights=weights), decide(second, labels, weights=sizes))


def averaged(random: np.random.Generator, cell: Cell, trials: int, layout: Layout) -> Iterator[list[Floats]]:
    """Four comparisons on one text: half of a document's variance is common to them; two of them lack a seed."""
    documents, _ = text(layout)
    part = replace(cell, document_sd=cell.document_sd / np.sqrt(2))
    seeds = random.normal(0, cell.seed_sd, (trials, cell.seeds)) if cell.kind == "average, seeds in common" else None
    common = random.normal(0, part.document_sd, (trials, 1, documents[-1] + 1))[..., documents]
    each = [noise(random, part, trials, layout, seeds) + common for _ in range(4)]
    for n in range(trials):
        yield [y[n][: max(1, cell.seeds - missing)] for y, missing in zip(each, (0, 0, 1, 1), strict=True)]


def simulate(cell: Cell, trials: int, stream: int = 0) -> Rates:
    """Simulate a cell; the same arguments give the same rates."""
    random = np.random.default_rng([zlib.crc32(repr(cell).encode()), stream])
    no_margin = margin = 0
    for start in range(0, trials, 500):
        for decision in decisions(random, cell, min(500, trials - start)):
            margin += bool(decision.sign)
            # a margin takes verdicts away whose interval lies within it, and changes nothing else
            significant = decision.p is not None and decision.p < LEVEL
            no_margin += bool(decision.sign) or (decision.verdict == "equal within margin" and significant)
    return Rates(no_margin / trials, margin / trials)


def grid() -> list[Cell]:
    """Every cell without a true difference."""
    noises = list(product(SEEDS, SEED_SDS, DOCUMENT_SDS))
    cells = [Cell("single", layout, *n) for layout in ("clustered", "equal", "unequal", "lopsided") for n in noises]
    for kind in ("average, seeds in common", "average, seeds apart", "independent"):
        cells += [Cell(kind, "clustered", *n) for n in noises if n[2] in (0.0, 0.08)]
    cells += [Cell("tasks", t, n, sd) for t in range(len(TASKS)) for n, sd in product(SEEDS, (0.0, 0.05))]
    return cells


def powers() -> list[Cell]:
    """Cells with a true difference."""
    noises = product(SEEDS, SEED_SDS, (0.03,))
    return [
        Cell("single", layout, *n, d)
        for layout, n, d in product(("clustered", "equal"), noises, (0.02, 0.05, 0.1))
        if n[0] > 1 or not n[1]
    ]


def title(cell: Cell) -> str:
    """The table that a cell belongs to."""
    if cell.kind == "tasks":
        return f"accuracy, average of {len(TASKS[int(cell.layout)])} tasks of {TASKS[int(cell.layout)]} items"
    return f"{cell.kind}: {cell.layout} text"


def print_false(rates: dict[Cell, Rates]) -> None:
    """Print the shares of false verdicts, a table for each kind of study."""
    for name in dict.fromkeys(map(title, rates)):
        cells = [cell for cell in rates if title(cell) == name]
        columns = sorted({cell.document_sd for cell in cells})
        print(f"\n{name}; false verdicts without margin / with a margin of {MARGIN}\n")
        print("| seeds | sd of seeds |", " | ".join(f"documents {sd}" for sd in columns), "|")
        print("|---:" * (len(columns) + 2) + "|")
        for seeds, sd in dict.fromkeys((cell.seeds, cell.seed_sd) for cell in cells):
            row = [cell for cell in cells if (cell.seeds, cell.seed_sd) == (seeds, sd)]
            texts = [f"{rates[cell].no_margin:.3f} / {rates[cell].margin:.3f}" for cell in row]
            print(
                f"| {seeds} | {sd} |",
                " | ".join(t if c.covered else f"({t})" for t, c in zip(texts, row, strict=True)),
                "|",
            )


def print_power(rates: dict[Cell, Rates]) -> None:
    """Print the shares of studies that find a true difference, with a margin."""
    print(f"\nVerdicts where there is a true difference, documents' sd .03, margin {MARGIN}\n")
    print("| text | seeds | sd of seeds | .02 | .05 | .1 |\n|---|---:|---:|---:|---:|---:|")
    for key in dict.fromkeys((cell.layout, cell.seeds, cell.seed_sd) for cell in rates):
        row = [rates[cell].margin for cell in rates if (cell.layout, cell.seeds, cell.seed_sd) == key]
        print("|", " | ".join(map(str, key)), "|", " | ".join(f"{share:.2f}" for share in row), "|")


def main() -> None:
    """Simulate every cell and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    cells, shifted = grid(), powers()
    with ProcessPoolExecutor(options.processes) as pool:
        false = dict(zip(cells, pool.map(simulate, cells, [options.trials] * len(cells)), strict=True))
        power = dict(zip(shifted, pool.map(simulate, shifted, [options.trials // 4] * len(shifted)), strict=True))
        above = [cell for cell, rate in false.items() if cell.covered and rate.no_margin > NEAR]
        more = pool.map(simulate, above, [10 * options.trials] * len(above), [1] * len(above))
        again = dict(zip(above, more, strict=True))
    print_false(false)
    print_power(power)
    final = {cell: rate.no_margin for cell, rate in (false | again).items() if cell.covered}
    worst = max(final, key=lambda cell: final[cell])
    print(f"\nworst of {len(final)} cells: {final[worst]:.3f} in {worst}")
    for cell, rate in again.items():
        verdict = "EXCEEDS" if rate.no_margin > ALLOWED else "holds"
        print(f"{verdict} {ALLOWED} with {10 * options.trials} trials: {rate.no_margin:.4f} in {cell}")


if __name__ == "__main__":
    main()
