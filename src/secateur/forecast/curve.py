"""The law of a training curve, the forms in which two curves share its parameters, and the least squares over them.

``L(D) = E + G * ((D + H) / D_0) ** -alpha`` in nats per token: a floor ``E``; a part ``G`` that more tokens remove, its
size at ``D_0``, the geometric mean of the budgets run; and for pruned models, where the form says so, a head start of
``H`` tokens. With ``A = G * D_0 ** alpha`` and ``H = 0`` it is the usual ``E + A / D ** alpha`` (arXiv:2203.15556,
section 3.3, at one size); the law of arXiv:2411.10272 comes to it at one ratio and size. The head start is the
transfer of arXiv:2102.01293, section 2, with the parent's training as what is transferred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CURVE_FORMS", "PATHS", "CurvePoint", "Floats", "Form", "Path", "Problem", "law"]

Path = Literal["scratch", "pruned"]
Floats = NDArray[np.float64]

PATHS: tuple[Path, Path] = ("scratch", "pruned")

_HUBER = 1.345  # in standard deviations: 95% as efficient as least squares under normal noise
_STEPS = 200  # of a search over many fits at once; most take fewer than thirty
_STILL = 1e-6  # a search ends where no parameter moves by more than this share
_STARTS = tuple((share, alpha) for alpha in (0.15, 0.4, 1.0) for share in (0.03, 0.1, 0.3))  # G over the loss, alpha


@dataclass(frozen=True)
class CurvePoint:
    """One finished run: its loss at the end of its learning-rate schedule."""

    path: Path
    method: str  #: that pruned the model, or whose shape or mask the scratch run has
    ratio: float
    parameters: int  #: of the trained model, in all
    tokens: int  #: that this run trained on; for the pruned path R, without the parent's
    loss: float  #: held-out, nats per token
    seed: int = 0
    name: str = ""  #: tells runs of one path, budget and seed apart, e.g. S_R and S_{P+R}, which read other tokens


@dataclass(frozen=True)
class Form:
    """What the two curves of a pair have in common."""

    name: str
    says: str
    floor: Literal["own", "shared", "zero", "parent"] = "own"
    exponent: Literal["own", "shared"] = "own"
    head_start: bool = False  #: amplitude and exponent are shared, and pruning is worth H tokens


#: Every form; forecasts average over those that need no loss of the parent.
CURVE_FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("own", "each path has its own floor, amplitude and exponent"),
        Form("shared-exponent", "one exponent; own floors and amplitudes", exponent="shared"),
        Form("shared-floor", "one floor; own amplitudes and exponents", floor="shared"),
        Form("parent-floor", "the parent's loss is the floor of both", floor="parent"),
        Form("no-floor", "power laws that fall to zero", floor="zero"),
        Form("head-start", "one curve, on which pruning is worth so many tokens", "shared", "shared", True),
        Form("head-start-own-floor", "the same, but a floor for each path", "own", "shared", True),
    )
}


def law(curve: Floats, tokens: Floats) -> Floats:
    """The loss of a curve (its first axis E, G, alpha and H) at budgets in units of ``D_0``."""
    floor, gap, alpha, head_start = curve
    return floor + gap * (tokens + head_start) ** -alpha


@dataclass(frozen=True)
class _Prior:
    """A normal prior on a parameter's logarithm."""

    centre: float  #: of the parameter; E and G in units of the median loss, H in units of ``D_0``
    width: float  #: standard deviation of the logarithm
    shared: bool = False  #: by both paths


def _priors(form: Form) -> dict[str, _Prior]:
    """The parameters that a form leaves open."""
    shared = form.exponent == "shared"
    if form.floor == "zero":  # G is then all of the loss, and the exponent accordingly small
        return {"G": _Prior(1.0, 0.5), "alpha": _Prior(0.05, 1.0, shared)}
    priors = {"G": _Prior(0.1, 1.0, form.head_start), "alpha": _Prior(0.4, 0.5, shared)}
    if form.floor != "parent":
        priors["E"] = _Prior(0.85, 0.5, form.floor == "shared")
    if form.head_start:
        priors["H"] = _Prior(1.0, 2.0, True)
    return priors


class Problem:
    """The points and priors of one fit. Its vector holds the logarithms of the parameters that the form leaves open.

    Attributes:
        points: the runs.
        losses: of the points.
        scale: ``D_0``, in tokens.
        centres: of the priors.
        widths: of the priors.
    """

    def __init__(self, points: Sequence[CurvePoint], form: Form, parent_loss: float | None) -> None:
        self.points = tuple(points)
        self.losses = np.array([p.loss for p in points])
        self.scale = float(np.exp(np.mean(np.log([p.tokens for p in points]))))
        self._form, self._parent_loss = form, parent_loss
        self._tokens = np.array([p.tokens for p in points]) / self.scale
        self._path = np.array([PATHS.index(p.path) for p in points])
        self._level = float(np.median(self.losses))
        priors = _priors(form)
        names = [(name, prior) for name, prior in priors.items() for _ in range(1 if prior.shared else 2)]
        units = {"E": self._level, "G": self._level}
        self.centres = np.log([prior.centre * units.get(name, 1.0) for name, prior in names])
        self.widths = np.array([prior.width for _, prior in names])
        every = [name for name, _ in names]
        #: the places of a parameter in the vector, for the scratch path and for the pruned one
        self._where = {name: (every.index(name), every.index(name) + (not p.shared)) for name, p in priors.items()}

    def curves(self, vector: Floats) -> Floats:
        """E and G in nats, alpha, and H over ``D_0``, of each path: ``[..., 2, 4]``."""
        values = np.exp(np.clip(vector, -50, 50))  # a search may try what a float cannot hold
        both = np.ones((*vector.shape[:-1], 2))
        floor = self._parent_loss if self._form.floor == "parent" and self._parent_loss else 0.0
        columns = [
            values[..., list(self._where["E"])] if "E" in self._where else both * floor,
            values[..., list(self._where["G"])],
            np.minimum(values[..., list(self._where["alpha"])], 20),
            both * 0,
        ]
        if "H" in self._where:
            columns[3][..., 1] = values[..., self._where["H"][1]]
        return np.stack(columns, axis=-1)

    def fitted(self, vector: Floats) -> Floats:
        """The loss of each point by the law: ``[..., points]``."""
        return law(np.moveaxis(self.curves(vector)[..., self._path, :], -1, 0), self._tokens)

    def solve(self, losses: Floats, centres: Floats, noise: float, starts: Sequence[Floats]) -> Floats:
        """The vector of least cost: Huber losses of points, in logarithms over the noise, and of priors.

        All starts are searched at once; scipy continues from the best end.
        """
        single = (losses[None], centres[None], np.array([noise]))

        def apart(vector: Floats) -> Floats:
            return _huber(self._apart(vector[None], *single))[0]

        def rows(vector: Floats) -> Floats:
            return self._rows(vector[None], *single)[0]

        jacobian: Any = rows  # the library's own annotation knows only names of approximations
        repeated = [np.repeat(each, len(starts), axis=0) for each in single]
        ends = self.solve_many(repeated[0], repeated[1], repeated[2], np.array(starts))
        best = min(ends, key=lambda vector: float(np.sum(apart(vector) ** 2)))
        from scipy.optimize import least_squares  # takes 0.6 s to import

        return least_squares(apart, best, jacobian, method="lm", max_nfev=500).x

    def solve_many(self, losses: Floats, centres: Floats, noise: Floats, start: Floats) -> Floats:
        """Search for many sets of runs at once, each from one start; a hundred times as fast as one by one.

        The steps are those of Levenberg and Marquardt, damped for each set by itself.

        Args:
            losses: ``[sets, points]``, nats.
            centres: of the priors, ``[sets, parameters]``.
            noise: ``[sets]``, nats.
            start: ``[parameters]``, or one for each set.

        Returns:
            The vectors, ``[sets, parameters]``.
        """
        sets = (losses, centres, noise)
        vectors, damping = np.broadcast_to(start, centres.shape).copy(), np.full(len(losses), 1e-3)
        apart = _huber(self._apart(vectors, *sets))
        for _ in range(_STEPS):
            rows = self._rows(vectors, *sets)
            downhill = -np.einsum("spk,sp->sk", rows, apart)
            bend = np.einsum("spk,spl->skl", rows, rows)
            bend += damping[:, None, None] * bend * np.eye(centres.shape[1])
            step = np.linalg.solve(bend, downhill[..., None])[..., 0]
            tried = _huber(self._apart(vectors + step, *sets))
            better = np.sum(tried**2, axis=1) < np.sum(apart**2, axis=1)
            vectors[better] += step[better]
            apart[better] = tried[better]
            damping = np.clip(np.where(better, damping / 10, damping * 10), 1e-9, 1e12)
            if np.abs(step).max() < _STILL:
                break
        return vectors

    def _apart(self, vectors: Floats, losses: Floats, centres: Floats, noise: Floats) -> Floats:
        """Deviations of points, then of priors, in standard deviations: ``[sets, points + parameters]``."""
        points = np.log(self.fitted(vectors) / losses) * losses / noise[:, None]
        return np.concatenate([points, (vectors - centres) / self.widths], axis=1)

    def _rows(self, vectors: Floats, losses: Floats, centres: Floats, noise: Floats) -> Floats:
        """The derivatives of their Huber roots: ``[sets, points + parameters, parameters]``."""
        points = self._slopes(vectors) * (losses / noise[:, None])[..., None]
        priors = np.tile(np.diag(1 / self.widths), (len(vectors), 1, 1))
        slope = _huber_slope(self._apart(vectors, losses, centres, noise))
        return np.concatenate([points, priors], axis=1) * slope[..., None]

    def _slopes(self, vector: Floats) -> Floats:
        """The derivatives of the logarithm of each point's loss: ``[..., points, parameters]``."""
        floor, gap, alpha, head_start = np.moveaxis(self.curves(vector)[..., self._path, :], -1, 0)
        tokens = self._tokens + head_start
        gap_left = gap * tokens**-alpha
        by_name = {
            "E": floor,
            "G": gap_left,
            "alpha": -alpha * np.log(tokens) * gap_left,
            "H": -alpha * head_start / tokens * gap_left,
        }
        slopes = np.zeros((*gap_left.shape, vector.shape[-1]))
        for name, where in self._where.items():
            slopes[..., np.arange(len(self._tokens)), np.array(where)[self._path]] += by_name[name] / (floor + gap_left)
        return slopes

    def starts(self) -> list[Floats]:
        """Where the search begins: several exponents, and shares of the loss that tokens remove."""
        starts = []
        for share, alpha in _STARTS:
            vector = self.centres.copy()
            for name, value in (("G", share * self._level), ("alpha", alpha), ("E", (1 - share) * self._level)):
                if name in self._where and self._form.floor != "zero":
                    vector[list(self._where[name])] = math.log(value)
            starts.append(vector)
        return starts


def _huber(deviations: Floats) -> Floats:
    """Signed square roots of twice the Huber losses: least squares over them minimises those losses."""
    size = np.abs(deviations)
    far = np.sqrt(np.maximum(2 * _HUBER * size - _HUBER**2, 0))
    return np.where(size <= _HUBER, deviations, np.sign(deviations) * far)


def _huber_slope(deviations: Floats) -> Floats:
    """The derivative of :func:`_huber`."""
    size = np.abs(deviations)
    return np.where(size <= _HUBER, 1.0, _HUBER / np.maximum(np.abs(_huber(deviations)), _HUBER))
