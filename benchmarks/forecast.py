"""How far forecasts of training curves are off: on the published ladder, on a study, on curves whose truth is known.

    python benchmarks/forecast.py ladder
    python benchmarks/forecast.py study runs/findings
    python benchmarks/forecast.py coverage [--tuning] [--trials 100] [--draws 400]

`ladder` prints the tables of docs/prediction.md: the longest one or two budgets of each published curve are left out
and predicted from the others, by every form and by their average. `study` leaves the longest budget of each curve of a
study's folder out (its cells.csv and curves.csv), and fits the law across ratios to its pruned runs: to all, and with
each ratio left out in turn. `coverage` makes curves, runs with noise on them, fits those, and counts how often the
intervals hold the true difference of the two paths, at 1, 2, 4 and 10 times the largest budget, and where the model
from scratch alone has REACH times as much; how often they hold the true crossover; and how many verdicts up to the
reach of verdicts are right and how many false. The truths of `--tuning` were to choose the average over forms
and its reach, but both kinds were looked at (docs/prediction.md). Both are drawn apart from the priors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path as FilePath

import numpy as np

from secateur.errors import UserError
from secateur.forecast.crossover import REACH, crossover
from secateur.forecast.curve import CURVE_FORMS, PATHS, CurvePoint, Floats
from secateur.forecast.evidence import Evidence, of_study
from secateur.forecast.fit import AVERAGED_FORMS, DRAWS, LeftOut, fit_pair, leave_last_out, percentile_interval
from secateur.forecast.published import LABELS, exact, published
from secateur.forecast.ratio_law import Retrained, fit_ratios, leave_one_ratio_out

BUDGETS = {3: (10, 30, 50), 5: (10, 30, 50, 250, 500)}
NOISE = 0.01
FACTORS = np.array((1.0, 2.0, 4.0, 10.0))  # over the largest budget, of both paths

Curve = Callable[[Floats], Floats]
Truth = tuple[Curve, Curve]  # from scratch, pruned


def power(floor: float, gap: float, exponent: float, head_start: float = 0.0) -> Curve:
    """A power law above a floor; ``gap``: the part that 50 tokens leave."""
    return lambda tokens: floor + gap * ((tokens + head_start) / 50) ** -exponent


def broken(floor: float, gap: float, first: float, second: float, bend: float) -> Curve:
    """A power law whose exponent changes from ``first`` to ``second`` at about ``bend`` tokens."""

    def loss(tokens: Floats) -> Floats:
        turn = ((1 + (tokens / bend) ** 2) / (1 + (50 / bend) ** 2)) ** (-(second - first) / 2)
        return floor + gap * (tokens / 50) ** -first * turn

    return loss


def log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    """A number even in the logarithm."""
    return math.exp(random.uniform(math.log(low), math.log(high)))


def truth(kind: str, random: np.random.Generator) -> Truth:
    """Both curves of a truth of the first kind."""
    uniform = random.uniform
    floor, (scratch, pruned) = uniform(1.8, 2.6), (uniform(0.2, 0.6), uniform(0.08, 0.3))
    a, b = uniform(0.25, 0.7, 2)
    apart = {"floors .05 apart": 0.025, "floors .2 apart": 0.1}.get(kind, 0.0)
    shifts = floor + apart * uniform(-1, 1, 2)
    if kind == "head start":
        return power(floor, scratch, a), power(floor, scratch, a, log_uniform(random, 10, 500))
    if kind == "no floor":
        high = uniform(2.4, 3.0)
        return power(0, high, uniform(0.03, 0.09)), power(0, high - uniform(0.05, 0.3), uniform(0.02, 0.07))
    if kind == "broken power law":
        bends = [(uniform(0.4, 1.8), log_uniform(random, 15, 1000)) for _ in PATHS]
        first, second = (
            broken(floor, gap, exponent, exponent * turn, bend)
            for gap, exponent, (turn, bend) in zip((scratch, pruned), (a, b), bends, strict=True)
        )
        return first, second
    return power(shifts[0], scratch, a), power(shifts[1], pruned, b)


def tuning_truth(kind: str, random: np.random.Generator) -> Truth:
    """Both curves of a truth of the second kind, by which to choose the average over forms and its reach."""
    floor, scratch = log_uniform(random, 1.5, 3.2), log_uniform(random, 0.15, 0.8)
    pruned = scratch * log_uniform(random, 0.2, 0.8)
    a, b = 0.4 * np.exp(0.35 * random.standard_normal(2))
    if kind == "parabola in log tokens":

        def parabola(gap: float, exponent: float, bend: float) -> Curve:
            return lambda tokens: floor + gap * np.exp(bend * np.log(tokens / 50) ** 2) * (tokens / 50) ** -exponent

        bends = random.uniform(-0.05, 0.05, 2)
        return parabola(scratch, a, bends[0]), parabola(pruned, b, bends[1])
    if kind == "floors apart, sd .04":
        shifts = floor + 0.04 * random.standard_normal(2)
        return power(shifts[0], scratch, a), power(shifts[1], pruned, b)
    if kind == "head start, own curves":
        gap, start = scratch * log_uniform(random, 0.7, 1.3), log_uniform(random, 5, 300)
        return power(floor, scratch, a), power(floor + 0.03 * random.standard_normal(), gap, b, start)
    if kind == "low floor":
        low, high, exponent = random.uniform(0.5, 1.5), random.uniform(1.0, 1.6), random.uniform(0.05, 0.16)
        gap = high - random.uniform(0.05, 0.25)
        return power(low, high, exponent), power(low, gap, exponent * random.uniform(0.4, 1))
    first, second = (
        _two_powers(floor, gap, random.uniform(0.2, 0.8), random.uniform(0.5, 1.0), random.uniform(0.1, 0.3))
        for gap in (scratch, pruned)
    )
    return first, second


def _two_powers(floor: float, gap: float, share: float, steep: float, flat: float) -> Curve:
    return lambda tokens: floor + gap * (share * (tokens / 50) ** -steep + (1 - share) * (tokens / 50) ** -flat)


CHECKS = ("one floor", "floors .05 apart", "floors .2 apart", "head start", "no floor", "broken power law")
TUNING = ("parabola in log tokens", "floors apart, sd .04", "head start, own curves", "low floor", "two powers")


def trial(random: np.random.Generator, curves: Truth, number: int, draws: int) -> list[float]:
    """What the intervals of one fit hold: the difference at each factor, at unequal budgets, the crossover; verdicts.

    The last two are the shares of the verdicts within reach that are right and false.
    """
    budgets = np.array(BUDGETS[number], dtype=float)
    points = [
        CurvePoint(path, "method", 0.5, 1, int(d), float(curve(d) + NOISE * random.standard_normal()))
        for path, curve in zip(PATHS, curves, strict=True)
        for d in budgets
    ]
    fit = fit_pair(points, draws=draws)
    factors = np.append(FACTORS, REACH)  # of the model from scratch; last beside a pruned one at the largest budget
    scratch, pruned = factors * budgets[-1], np.append(FACTORS, 1) * budgets[-1]
    best = fit.loss("scratch", scratch) - fit.loss("pruned", pruned)
    each = fit.loss_draws("scratch", scratch) - fit.loss_draws("pruned", pruned)
    true = curves[0](scratch) - curves[1](pruned)
    intervals = [percentile_interval(float(value), column) for value, column in zip(best, each.T, strict=True)]
    covered = [float(i.low <= value <= i.high) for i, value in zip(intervals, true, strict=True)]
    signs = [np.sign(i.low) * (i.low * i.high > 0) * np.sign(t) for i, t in zip(intervals, true, strict=True)]
    verdicts = np.array(signs)[factors <= REACH]
    crossing, step = crossover(fit), (REACH * budgets[-1] / budgets[0]) ** (1 / 1000)  # as fine as the grids
    crossing_covered = math.nan
    if crossing:
        at = true_crossover(curves, budgets[0], crossing.horizon)
        crossing_covered = float(crossing.budget.low / step <= at <= crossing.budget.high * step)
    return [*covered, crossing_covered, float(np.mean(verdicts > 0)), float(np.mean(verdicts < 0))]


def true_crossover(curves: Truth, low: float, high: float) -> float:
    """The first of many budgets at which the path behind has caught up."""
    grid = np.geomspace(low, high, 2000)
    ahead = curves[0](grid) - curves[1](grid)
    behind = np.flatnonzero(np.sign(ahead[0]) * ahead <= 0)
    return float(grid[behind[0]]) if len(behind) else math.inf


#: Each form by itself, and the average that forecasts take.
ROWS = {form: (form,) for form in CURVE_FORMS} | {"average": AVERAGED_FORMS}


def left_out(form: str, last: int, draws: int) -> list[LeftOut]:
    """The published ladder's longest runs, predicted from the others."""
    evidence = published()
    return leave_last_out(evidence.points, ROWS[form], last=last, parent_loss=evidence.parent_loss, draws=draws)


def error_row(form: str, last: int) -> str:
    """A form's errors, predicted less measured, in nats, and the root of their mean square."""
    errors = [run.error for run in left_out(form, last, draws=1)]
    cells = " | ".join(f"{error:+.3f}" for error in errors)
    return f"| `{form}` | {cells} | {math.sqrt(np.mean(np.square(errors))):.3f} |"


def interval_rows(last: int) -> list[str]:
    """What the average predicts, with its intervals, beside what was measured."""
    names = {exact(label): label for label in LABELS}
    return [
        f"| {run.point.method}, {run.point.path} | {names[run.point.tokens]} B | {run.point.loss:.2f} | "
        f"{run.predicted.value:.3f} | {run.predicted.low:.2f} to {run.predicted.high:.2f} | {run.error:+.3f} |"
        for run in left_out("average", last, DRAWS)
    ]


def study(folder: FilePath) -> None:
    """Print the tables of a study's folder: leave-last-out by every form, the average's runs, and the ratios."""
    evidence = of_study(folder)
    print("| form | runs left out | RMS, nats | largest error |\n|---|---|---|---|")
    for form, forms in ROWS.items():
        runs = leave_last_out(evidence.points, forms, parent_loss=evidence.parent_loss, draws=1)
        errors = [run.error for run in runs]
        if errors:
            root = math.sqrt(np.mean(np.square(errors)))
            print(f"| `{form}` | {len(errors)} | {root:.3f} | {max(errors, key=abs):+.3f} |")
    print("\n| curve | budget | measured | predicted | 95% interval | error | withheld |")
    print("|---|---|---|---|---|---|---|")
    for run in leave_last_out(evidence.points):
        point, predicted = run.point, run.predicted
        print(
            f"| {point.method} {point.ratio:g}, {point.path} | {point.tokens:,} | {point.loss:.3f} "
            f"| {predicted.value:.3f} | {predicted.low:.3f} to {predicted.high:.3f} | {run.error:+.3f} "
            f"| {'yes' if run.poor else 'no'} |"
        )
    print()
    ratios(evidence)


def retrained(evidence: Evidence) -> dict[str, list[Retrained]]:
    """The pruned runs by method, as the law across ratios takes them."""
    runs: dict[str, list[Retrained]] = {}
    if evidence.parent_loss is None:
        return runs
    for p in evidence.points:
        if p.path == "pruned":
            run = Retrained("", round(evidence.parent_parameters), evidence.parent_loss, p.ratio, p.tokens, p.loss)
            runs.setdefault(p.method, []).append(run)
    return runs


def ratios(evidence: Evidence) -> None:
    """Print what the law across ratios comes to, method by method."""
    print(
        "| method | runs | ratios | parameters | fitted, RMS | a ratio left out: error of each run | RMS | withheld |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for method, runs in retrained(evidence).items():
        try:
            law = fit_ratios(runs)
        except UserError as error:
            print(f"| {method} | {len(runs)} | {len({run.ratio for run in runs})} | {error} | | | | |")
            continue
        predictions, refused = leave_one_ratio_out(runs)
        terms = ", ".join(
            f"{term.name} {term.value:.2f}" + " (poorly determined)" * (not term.identified) for term in law.terms
        )
        errors = [f"{run.run.ratio:g}: {run.error:+.3f}" for run in predictions]
        errors += [f"{ratio:g}: cannot be left out" for ratio in refused]
        root = f"{math.sqrt(np.mean([run.error**2 for run in predictions])):.3f}" if predictions else "-"
        ran = ", ".join(f"{ratio:g}" for ratio in law.ratios)
        print(
            f"| {method} | {len(runs)} | {ran} | {terms} | {law.error:.3f} | {'; '.join(errors)} | {root} "
            f"| {'yes' if law.poor else 'no'} |"
        )


def coverage(trials: int, draws: int, tuning: bool) -> None:
    """Print a row for each kind of truth and number of budgets."""
    factors = " | ".join(f"{factor:g}x" for factor in FACTORS)
    print(f"| truth | budgets a path | {factors} | {REACH}x to 1x | crossover | right verdicts | false |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    make = tuning_truth if tuning else truth
    for place, kind in enumerate(TUNING if tuning else CHECKS):
        for number in BUDGETS:
            random = np.random.default_rng((tuning, number, place))
            rows = [trial(random, make(kind, random), number, draws) for _ in range(trials)]
            print(
                f"| {kind} | {number} | " + " | ".join(f"{share:.2f}" for share in np.nanmean(rows, axis=0)) + " |",
                flush=True,
            )


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("ladder", "study", "coverage"))
    parser.add_argument("folder", nargs="?", type=FilePath, help="of a study, with its cells.csv")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--tuning", action="store_true", help="the second kind of truths")
    arguments = parser.parse_args()
    if arguments.what == "coverage":
        coverage(arguments.trials, arguments.draws, arguments.tuning)
        return
    if arguments.what == "study":
        if arguments.folder is None:
            parser.error("study: name the study's folder, e.g. runs/findings")
        study(arguments.folder)
        return
    for last in (2, 1):
        print("\n".join([*(error_row(form, last) for form in ROWS), ""]))
    print("\n".join(interval_rows(2)))


if __name__ == "__main__":
    main()
