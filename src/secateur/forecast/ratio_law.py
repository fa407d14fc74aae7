"""One law for pruned models of several ratios, budgets and parents: the P2 law of arXiv:2411.10272.

``L = L_0 + (1 / rho) ** gamma * (1 / N_0) ** delta * (N_C / N_0 ** alpha + D_C / D ** beta + E)`` in nats per token,
for a parent of ``N_0`` parameters and loss ``L_0``, pruned at ratio ``rho`` and retrained on ``D`` tokens. Since a
higher ratio costs more loss, gamma is negative where rho is the share removed. Here every parameter is positive:

``L = L_0 - S + rho ** g * n ** -delta * (C + K * n ** -alpha + B * d ** -beta)``, with ``g = -gamma``, and ``n`` and
``d`` the size and the budget over their geometric means, so that C, K and B are losses in nats at ``rho = 1`` and
mean size and budget. ``S`` is none of the published law: it is fitted where retrained models end below their parent,
which the law as published cannot say, and zero elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from secateur.errors import UserError
from secateur.forecast.curve import Floats
from secateur.forecast.fit import MISFIT, NOISE, noise_between_seeds
from secateur.formatting import plural

__all__ = ["LeftOutRatio", "RatioLaw", "Retrained", "Term", "fit_ratios", "leave_one_ratio_out"]

_HUBER = 1.345  # in standard deviations of a run, as for the curves
_IDENTIFIED = 1.0  # largest standard error of the logarithm of a parameter that the runs determine: a factor of e
_RATIOS = 2  # fewer tell nothing across ratios
_BUDGETS = 3  # fewer cannot tell a power of the budget from a constant

#: name -> where the search may go (its logarithm), and where it begins
_BOUNDS: dict[str, tuple[float, float]] = {
    "g": (0.01, 10.0),
    "delta": (0.001, 3.0),
    "alpha": (0.01, 3.0),
    "beta": (0.01, 5.0),
    "C": (1e-6, 50.0),
    "K": (1e-6, 50.0),
    "B": (1e-6, 50.0),
    "S": (1e-6, 10.0),
}
_STARTS: dict[str, tuple[float, ...]] = {"g": (0.5, 2.0), "beta": (0.2, 0.8), "B": (0.1, 0.6)}
_BEGIN = {"delta": 0.1, "alpha": 0.3, "C": 0.1, "K": 0.1, "S": 0.3}


@dataclass(frozen=True)
class Retrained:
    """A pruned model at the end of its retraining."""

    parent: str
    parent_parameters: int
    parent_loss: float  #: held-out, nats per token
    ratio: float  #: share removed
    tokens: int  #: D, of retraining
    loss: float  #: held-out, nats per token


@dataclass(frozen=True)
class Term:
    """A parameter of the law as the runs have it."""

    name: str  #: g, delta, alpha, beta, C, K, B or S
    value: float
    spread: float  #: standard error of its logarithm

    @property
    def identified(self) -> bool:
        """Whether the runs determine the parameter to within a factor of e."""
        return self.spread < _IDENTIFIED


@dataclass(frozen=True)
class RatioLaw:
    """The law as fitted to the runs of one method.

    Attributes:
        runs: that it was fitted to.
        terms: the parameters that such runs can tell at all.
        folded: those that they cannot, by name -> where each has gone.
        size: geometric mean of the parents' parameters.
        budget: geometric mean of the budgets, tokens.
    """

    runs: tuple[Retrained, ...]
    terms: tuple[Term, ...]
    folded: dict[str, str]
    size: float
    budget: float

    def loss(self, run: Retrained) -> float:
        """The loss, nats per token, of a run with this parent, ratio and budget; its own loss is not looked at."""
        values = np.log([[term.value for term in self.terms]])
        return float(
            _losses(values[0], [term.name for term in self.terms], _model_inputs((run,), self.size, self.budget))[0]
        )

    @property
    def error(self) -> float:
        """Root of the mean square of fitted less measured, nats."""
        return math.sqrt(float(np.mean([(self.loss(run) - run.loss) ** 2 for run in self.runs])))

    @property
    def noise(self) -> float:
        """Of a run, in nats: the assumed one and that between seeds, pooled."""
        groups: dict[tuple[str, float, int], list[float]] = {}
        for run in self.runs:
            groups.setdefault((run.parent, run.ratio, run.tokens), []).append(run.loss - run.parent_loss)
        return noise_between_seeds(groups.values())[0]

    @property
    def poor(self) -> bool:
        """Whether the runs scatter around the law by :data:`MISFIT` times the noise or more: it then tells nothing."""
        return self.error >= MISFIT * self.noise

    @property
    def ratios(self) -> tuple[float, ...]:
        """That were run, rising."""
        return tuple(sorted({run.ratio for run in self.runs}))


def fit_ratios(runs: Sequence[Retrained]) -> RatioLaw:
    """Fit the law to the runs of one method.

    Least squares by scipy over the logarithms of the parameters, between bounds, from several starts; deviations are of
    log L over the noise of a run (:data:`secateur.forecast.fit.NOISE`), under Huber's loss. With one parent, size tells
    nothing: ``delta``, ``alpha`` and ``K`` are folded into the others. With two, ``alpha`` and ``K`` are.

    Raises:
        UserError: if there are fewer than two ratios, three budgets, or runs than parameters.
    """
    from scipy.optimize import least_squares  # takes 0.6 s to import

    runs = tuple(sorted(runs, key=lambda run: (run.parent, run.ratio, run.tokens, run.loss)))
    ratios, budgets = {run.ratio for run in runs}, {run.tokens for run in runs}
    if len(ratios) < _RATIOS or len(budgets) < _BUDGETS:
        raise UserError(
            f"the law across ratios needs {_RATIOS} ratios and {_BUDGETS} budgets, and the finished runs have "
            f"{len(ratios)} and {len(budgets)}"
        )
    names, folded = _names(runs)
    if len(runs) <= len(names):
        raise UserError(
            f"the law across ratios has {len(names)} parameters here, too many for {plural(len(runs), 'run')}"
        )
    size = math.exp(np.mean([math.log(run.parent_parameters) for run in runs]))
    budget = math.exp(np.mean([math.log(run.tokens) for run in runs]))
    inputs = _model_inputs(runs, size, budget)
    losses = np.array([run.loss for run in runs])

    def apart(vector: Floats) -> Floats:
        return np.log(_losses(vector, names, inputs) / losses) * losses / NOISE

    def slopes(vector: Floats) -> Floats:
        return _slopes(vector, names, inputs) * (losses / _losses(vector, names, inputs) / NOISE)[:, None]

    jacobian: Any = slopes  # the library's own annotation knows only names of approximations
    bounds = np.log([_BOUNDS[name] for name in names]).T
    if "S" in names:  # what is left of the parents' losses has to be positive
        bounds[1][names.index("S")] = math.log(0.9 * min(run.parent_loss for run in runs))
    results = [
        least_squares(apart, start, jacobian, tuple(bounds), x_scale="jac", loss="huber", f_scale=_HUBER, max_nfev=200)
        for start in _starts(names, bounds)
    ]
    best = min(results, key=lambda result: result.cost)
    spreads = _spreads(best.jac)
    terms = tuple(Term(n, float(np.exp(x)), float(s)) for n, x, s in zip(names, best.x, spreads, strict=True))
    return RatioLaw(runs, terms, folded, size, budget)


def _names(runs: Sequence[Retrained]) -> tuple[list[str], dict[str, str]]:
    """The parameters that the runs can tell, and where the others have gone."""
    sizes = len({run.parent_parameters for run in runs})
    names = ["g", "beta", "C", "B"]
    folded = {}
    if sizes > 1:
        names.append("delta")
    else:
        folded["delta"] = "C and B: every run has a parent of the same size"
    if sizes > 2:
        names += ["alpha", "K"]
    else:
        folded |= dict.fromkeys(("alpha", "K"), f"C: the parents are of {'two sizes' if sizes == 2 else 'one size'}")
    if any(run.loss <= run.parent_loss for run in runs):
        names.append("S")
    return names, folded


def _model_inputs(runs: Sequence[Retrained], size: float, budget: float) -> Floats:
    """What the law goes by: ``[4, runs]``, the parent's loss, the ratio, n and d."""
    rows = [(r.parent_loss, r.ratio, r.parent_parameters / size, r.tokens / budget) for r in runs]
    return np.array(rows, dtype=float).T


def _losses(vector: Floats, names: Sequence[str], inputs: Floats) -> Floats:
    """The loss of each run, nats per token; a parameter that is not named is folded away."""
    scale, of_size, of_budget, value = _parts(vector, names, inputs)
    return inputs[0] - value["S"] + scale * (value["C"] + of_size + of_budget)


def _parts(vector: Floats, names: Sequence[str], inputs: Floats) -> tuple[Floats, Floats, Floats, dict[str, float]]:
    """What multiplies the bracket, its parts of size and of budget, and every parameter; nought where folded away."""
    value = dict.fromkeys(("delta", "alpha", "K", "S"), 0.0) | dict(zip(names, np.exp(vector), strict=True))
    _, ratio, size, budget = inputs
    scale = ratio ** value["g"] * size ** -value["delta"]
    return scale, value["K"] * size ** -value["alpha"], value["B"] * budget ** -value["beta"], value


def _slopes(vector: Floats, names: Sequence[str], inputs: Floats) -> Floats:
    """The derivative of each run's loss by the logarithm of each parameter: ``[runs, parameters]``."""
    scale, of_size, of_budget, value = _parts(vector, names, inputs)
    gap = scale * (value["C"] + of_size + of_budget)
    by_name = {
        "g": value["g"] * np.log(inputs[1]) * gap,
        "delta": -value["delta"] * np.log(inputs[2]) * gap,
        "alpha": -value["alpha"] * np.log(inputs[2]) * scale * of_size,
        "beta": -value["beta"] * np.log(inputs[3]) * scale * of_budget,
        "C": value["C"] * scale,
        "K": scale * of_size,
        "B": scale * of_budget,
        "S": np.full(len(scale), -value["S"]),
    }
    return np.stack([by_name[name] for name in names], axis=1)


def _starts(names: Sequence[str], bounds: Floats) -> list[Floats]:
    choices = [_STARTS[name] if name in _STARTS else (_BEGIN[name],) for name in names]
    return [np.clip(np.log(start), bounds[0] + 1e-6, bounds[1] - 1e-6) for start in product(*choices)]


def _spreads(jacobian: Floats) -> Floats:
    """Standard errors of the parameters' logarithms, by the slopes at the best fit; endless where there is no slope."""
    _, sizes, directions = np.linalg.svd(jacobian, full_matrices=False)
    with np.errstate(divide="ignore"):
        return np.sqrt(np.sum((directions / np.maximum(sizes, 1e-12)[:, None]) ** 2, axis=0))


@dataclass(frozen=True)
class LeftOutRatio:
    """A run of a ratio that was left out of a fit, and what the fit of the other ratios says of it."""

    run: Retrained
    predicted: float  #: nats per token

    @property
    def error(self) -> float:
        """Predicted less measured, nats."""
        return self.predicted - self.run.loss


def leave_one_ratio_out(runs: Sequence[Retrained]) -> tuple[list[LeftOutRatio], dict[float, str]]:
    """Leave each ratio out and predict its runs from those of the others.

    Returns:
        The runs left out, and for each ratio without which the law cannot be fitted the reason.
    """
    predictions: list[LeftOutRatio] = []
    refused: dict[float, str] = {}
    for ratio in sorted({run.ratio for run in runs}):
        try:
            law = fit_ratios([run for run in runs if run.ratio != ratio])
        except UserError as error:
            refused[ratio] = str(error)
            continue
        predictions += [LeftOutRatio(run, law.loss(replace(run, loss=1.0))) for run in runs if run.ratio == ratio]
    return predictions, refused
