"""How far forecasts of training curves are off: on the published ladder, on a study, on curves whose truth is known.

    python benchmarks/forecast.py ladder
    python benchmarks/forecast.py study runs/findings
    python benchmarks/forecast.py coverage [--trials 100] [--draws 100]

`ladder` prints the tables of docs/prediction.md: the longest one or two budgets of each published curve are left out
and predicted from the others, by every form. `study` leaves the longest budget of each curve of a study's folder out
(its cells.csv and curves.csv), and fits the law across ratios to its pruned runs: to all, and with each ratio left out
in turn. `coverage` makes curves, runs with noise on them, fits those, and counts how often the intervals hold the
truth. The truths are drawn apart from the priors: evenly between bounds, on a floor of both paths or on two floors that
are up to 0.05 nats apart. What is counted: the loss of each path at five times the largest budget, and the crossover at
equal training tokens, where none within reach counts as infinite.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path as FilePath

import numpy as np

from secateur.errors import UserError
from secateur.forecast.crossover import REACH, crossover
from secateur.forecast.curve import CURVE_FORMS, PATHS, CurvePoint, Path
from secateur.forecast.evidence import Evidence, of_study
from secateur.forecast.fit import DEFAULT_FORM, DRAWS, LeftOut, fit_pair, leave_last_out
from secateur.forecast.published import LABELS, exact, published
from secateur.forecast.ratio_law import Retrained, fit_ratios, leave_one_ratio_out

BUDGETS = {3: (10, 30, 50), 5: (10, 30, 50, 250, 500)}


def truth(random: np.random.Generator, *, apart: float) -> dict[Path, tuple[float, float, float]]:
    """Floor, the part that 50 tokens leave, and exponent of each path."""
    floor = random.uniform(1.8, 2.6)
    curves: dict[Path, tuple[float, float, float]] = {}
    for path, (low, high) in zip(PATHS, ((0.2, 0.6), (0.08, 0.3)), strict=True):
        shift = apart * random.uniform(-0.5, 0.5)
        curves[path] = (floor + shift, random.uniform(low, high), random.uniform(0.25, 0.7))
    return curves


def loss(curve: tuple[float, float, float], tokens: float) -> float:
    """The true loss."""
    floor, gap, alpha = curve
    return floor + gap * (tokens / 50) ** -alpha


def true_crossover(curves: dict[Path, tuple[float, float, float]], low: float, high: float) -> float:
    """The first of many budgets at which the path behind has caught up."""
    grid = np.geomspace(low, high, 2000)
    ahead = np.array([loss(curves["scratch"], d) - loss(curves["pruned"], d) for d in grid])
    behind = np.flatnonzero(np.sign(ahead[0]) * ahead <= 0)
    return float(grid[behind[0]]) if len(behind) else math.inf


def trial(random: np.random.Generator, number: int, noise: float, apart: float, draws: int) -> list[bool]:
    """Whether the intervals of one fit hold the truth: scratch loss, pruned loss, crossover."""
    curves, budgets = truth(random, apart=apart), BUDGETS[number]
    points = [
        CurvePoint(path, "method", 0.5, 1, d, loss(curves[path], d) + noise * random.standard_normal())
        for path in PATHS
        for d in budgets
    ]
    fit = fit_pair(points, draws=draws)
    far = 5 * budgets[-1]
    covered = []
    for path in PATHS:
        interval = fit.at(path, far)
        covered.append(interval.low <= loss(curves[path], far) <= interval.high)
    crossed = crossover(fit)
    true = true_crossover(curves, budgets[0], REACH * budgets[-1])
    step = math.exp(math.log(REACH * budgets[-1] / budgets[0]) / 1000)  # as fine as the grids
    return [*covered, crossed.budget.low / step <= true <= crossed.budget.high * step]


def left_out(form: str, last: int, draws: int) -> list[LeftOut]:
    """The published ladder's longest runs, predicted from the others."""
    evidence = published()
    return leave_last_out(evidence.points, form, last=last, parent_loss=evidence.parent_loss, draws=draws)


def error_row(form: str, last: int) -> str:
    """A form's errors, predicted less measured, in nats, and the root of their mean square."""
    errors = [run.error for run in left_out(form, last, draws=1)]
    cells = " | ".join(f"{error:+.3f}" for error in errors)
    return f"| `{form}` | {cells} | {math.sqrt(np.mean(np.square(errors))):.3f} |"


def interval_rows(last: int) -> list[str]:
    """What the default form predicts, with its intervals, beside what was measured."""
    names = {exact(label): label for label in LABELS}
    return [
        f"| {run.point.method}, {run.point.path} | {names[run.point.tokens]} B | {run.point.loss:.2f} | "
        f"{run.predicted.value:.3f} | {run.predicted.low:.2f} to {run.predicted.high:.2f} | {run.error:+.3f} |"
        for run in left_out(DEFAULT_FORM, last, DRAWS)
    ]


def study(folder: FilePath) -> None:
    """Print the tables of a study's folder: leave-last-out by every form, the default's runs, and the ratios."""
    evidence = of_study(folder)
    print("| form | runs left out | RMS, nats | largest error |\n|---|---|---|---|")
    for form in CURVE_FORMS:
        runs = leave_last_out(evidence.points, form, parent_loss=evidence.parent_loss, draws=1)
        errors = [run.error for run in runs]
        if errors:
            root = math.sqrt(np.mean(np.square(errors)))
            print(f"| `{form}` | {len(errors)} | {root:.3f} | {max(errors, key=abs):+.3f} |")
    print("\n| curve | budget | measured | predicted | 95% interval | error |\n|---|---|---|---|---|---|")
    for run in leave_last_out(evidence.points, parent_loss=evidence.parent_loss):
        point, predicted = run.point, run.predicted
        print(
            f"| {point.method} {point.ratio:g}, {point.path} | {point.tokens:,} | {point.loss:.3f} "
            f"| {predicted.value:.3f} | {predicted.low:.3f} to {predicted.high:.3f} | {run.error:+.3f} |"
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
    print("| method | runs | ratios | parameters | fitted, RMS | a ratio left out: error of each run | RMS |")
    print("|---|---|---|---|---|---|---|")
    for method, runs in retrained(evidence).items():
        try:
            law = fit_ratios(runs)
        except UserError as error:
            print(f"| {method} | {len(runs)} | {len({run.ratio for run in runs})} | {error} | | | |")
            continue
        predictions, refused = leave_one_ratio_out(runs)
        terms = ", ".join(
            f"{term.name} {term.value:.2f}" + " (hardly identified)" * (not term.identified) for term in law.terms
        )
        errors = [f"{run.run.ratio:g}: {run.error:+.3f}" for run in predictions]
        errors += [f"{ratio:g}: cannot be left out" for ratio in refused]
        root = f"{math.sqrt(np.mean([run.error**2 for run in predictions])):.3f}" if predictions else "-"
        ran = ", ".join(f"{ratio:g}" for ratio in law.ratios)
        print(f"| {method} | {len(runs)} | {ran} | {terms} | {law.error:.3f} | {'; '.join(errors)} | {root} |")


def coverage(trials: int, draws: int) -> None:
    """Print a row for each setting."""
    print("| budgets a path | noise, nats | floors apart, up to | scratch | pruned | crossover |")
    print("|---|---|---|---|---|---|")
    for number, noise, apart in ((3, 0.01, 0.0), (3, 0.01, 0.05), (3, 0.02, 0.0), (5, 0.01, 0.0), (5, 0.01, 0.05)):
        random = np.random.default_rng(0)
        shares = np.mean([trial(random, number, noise, apart, draws) for _ in range(trials)], axis=0)
        cells = " | ".join(f"{share:.2f}" for share in shares)
        print(f"| {number} | {noise} | {apart} | {cells} |", flush=True)


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("ladder", "study", "coverage"))
    parser.add_argument("folder", nargs="?", type=FilePath, help="of a study, with its cells.csv")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--draws", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.what == "coverage":
        coverage(arguments.trials, arguments.draws)
        return
    if arguments.what == "study":
        if arguments.folder is None:
            parser.error("study: name the study's folder, e.g. runs/findings")
        study(arguments.folder)
        return
    for last in (2, 1):
        print("\n".join([*(error_row(form, last) for form in CURVE_FORMS), ""]))
    print("\n".join(interval_rows(2)))


if __name__ == "__main__":
    main()
