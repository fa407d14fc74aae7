"""Recommend a path: prune or train from scratch, by the evidence nearest to the question, with its cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.errors import UserError, did_you_mean
from secateur.forecast.advice import (
    Advice,
    AdviceAccount,
    Case,
    Distance,
    Obstacle,
    Question,
    advise,
    bearing,
    case_of,
    obstacles_of,
)
from secateur.forecast.costs import Pilot, Price, Sizes, cheapest_pilot, costs, pilot_record
from secateur.forecast.crossover import NextRun
from secateur.forecast.curve import PATHS
from secateur.forecast.evidence import Evidence, of_study
from secateur.forecast.fit import Interval
from secateur.forecast.published import published
from secateur.forecast.published_findings import by_relevance
from secateur.forecast.request import RecommendRequest
from secateur.hub import local_checkpoint
from secateur.methods.registry import METHODS
from secateur.model.shapes import Shape
from secateur.model.solver import solve_depth, solve_width
from secateur.progress import track

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True)
class Recommendation:
    """The answer to a question, with the fits behind it."""

    question: Question
    sizes: Sizes
    evidence: Evidence
    cases: list[Case]
    refused: list[str]  #: why some runs could not be fitted
    advice: Advice
    price: Price | None

    @property
    def pilot(self) -> Pilot | None:
        """The cheapest pilot where figures are missing; none where they answer or fit no curve, nor of a control."""
        kinds = {obstacle.kind for obstacle in self.advice.obstacles}
        if self.advice.basis != "none" or kinds & {"fit", "control"}:
            return None
        trains = self.question.must_train and (self.evidence.published or "size" in kinds)
        return cheapest_pilot(self.question, self.sizes, trains)

    @property
    def learned(self) -> float:
        """Tokens that the pruning itself trains on, where one method answers; zero where several do."""
        return self.cases[0].learned if len(self.cases) == 1 else 0.0

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur recommend --json`` prints them, but for the sentences and a pilot study."""
        question = self.question
        pilot = pilot_record(self.pilot, self.price) if self.pilot else None
        return {
            "question": _question_record(question, self.sizes),
            "recommendation": {
                "choice": self.advice.choice,
                "decided_by": question.decides,
                "basis": self.advice.basis,
                "obstacles": [_obstacle(obstacle) for obstacle in self.advice.obstacles],
                "finding": asdict(self.advice.claim) if self.advice.claim else None,
                "method_without_figures": self.advice.absent,
                "cheapest_pilot": pilot,
            },
            "cases": [_case(case, question, self.price) for case in self.cases],
            "not_fitted": self.refused,
            "evidence": _evidence(self.evidence, question),
            "findings": [asdict(f) for f in by_relevance(question.granularity, question.ratio, question.distill)],
            "costs": costs(question, self.sizes, self.price, self.learned),
        }


def recommend(request: RecommendRequest) -> Recommendation:
    """Fit the evidence that bears on the question, and advise.

    Raises:
        UserError: if the method is unknown, or there are runs to go by and none of them can be fitted.
    """
    evidence = published() if request.study is None else of_study(Path(request.study))
    question, sizes = _question(request, evidence)
    price = None
    if request.cost_per_hour is not None and request.flops_per_second is not None:
        price = Price(request.cost_per_hour, request.flops_per_second, request.currency or "USD")
    obstacles = obstacles_of(evidence, question)
    cases: list[Case] = []
    refused: list[str] = []
    if not obstacles:
        cases, obstacles, refused = _cases(evidence, question, request.noise)
    return Recommendation(
        question, sizes, evidence, cases, refused, advise(evidence, question, cases, obstacles), price
    )


def _cases(evidence: Evidence, question: Question, noise: float | None) -> tuple[list[Case], list[Obstacle], list[str]]:
    """The fits that bear on the question, what is in the way of others, and why some runs cannot be fitted.

    Raises:
        UserError: if there are runs to go by and none of them can be fitted.
    """
    cases: list[Case] = []
    obstacles: list[Obstacle] = []
    refused: list[str] = []
    methods = bearing(evidence, question)
    with track("fit the curves", len(methods)) as progress:
        for points in methods.values():
            try:
                case = case_of(evidence, question, points, noise)
                (obstacles if isinstance(case, Obstacle) else cases).append(case)  # type: ignore[arg-type]
            except UserError as error:
                refused.append(str(error))
            progress.advance()
    if refused and not cases and not obstacles:
        raise UserError(f"{evidence.source}: {refused[0]}")
    return cases, obstacles if methods else [Obstacle("granularity")], refused


def _question(request: RecommendRequest, evidence: Evidence) -> tuple[Question, Sizes]:
    """Build the question, with the sizes of its models."""
    method, granularity = request.method, request.granularity
    if method is not None:
        granularities = {name: info.granularity for name, info in METHODS.items()} | {**evidence.granularity}
        if method not in granularities:
            raise UserError(f"`method`: {method!r} is not known{did_you_mean(method, granularities)}")
        if granularity not in (None, granularities[method]):
            raise UserError(
                f"`granularity`: {method} is of granularity {granularities[method]}, not {granularity}; leave it out"
            )
        granularity = granularities[method]
    shapes = _shapes(request.model, request.ratio, granularity) if request.model else None
    parent = float(shapes[0].total) if shapes else float(request.params or 0)
    terms = (request.ratio, request.tokens, granularity, method, request.must_train)
    question = Question(parent, *terms, request.parent_tokens, request.children, request.distill)
    target = float(shapes[1].total) if shapes else question.target(granularity)
    sizes = Sizes(parent, target, shapes)
    if shapes:
        question = replace(question, dearer=sizes.training(0, 1) / sizes.training(1, 1))
    return question, sizes


def _shapes(model: Any, ratio: float, granularity: str | None) -> tuple[Shape, Shape]:
    """The parent's shape, from its configuration, and the target's: narrower unless layers or nothing at all go."""
    from secateur.model.config_file import read_shape

    path = Path(model)
    if not path.is_file():
        path = local_checkpoint(model, weights=False) / "config.json"
    before, _ = read_shape(path)
    if granularity == "sparse":
        return before, before
    return before, solve_depth(before, ratio) if granularity == "depth" else solve_width(before, ratio)


def _question_record(question: Question, sizes: Sizes) -> dict[str, Any]:
    return {
        "parameters": question.parameters,
        "target_parameters": sizes.target,
        "ratio": question.ratio,
        "tokens": question.tokens,
        "granularity": question.granularity,
        "method": question.method,
        "parent": "must-train" if question.must_train else "have",
        "parent_tokens": question.parent_tokens,
        "children": question.children,
        "distill": question.distill,
    }


def _evidence(evidence: Evidence, question: Question) -> dict[str, Any]:
    """Where it is from, and what of it bears on the question without being a curve."""
    near = [a for a in evidence.accuracies if question.granularity in (None, a.granularity)]
    return {
        "source": evidence.source,
        "parent_parameters": evidence.parent_parameters,
        "parent_tokens": evidence.parent_tokens,
        "parent_loss": evidence.parent_loss,
        "runs": len(evidence.points),
        "runs_without_a_loss": evidence.absent,
        "accuracies": [asdict(accuracy) for accuracy in near],
        "published": evidence.published,
    }


def _case(case: Case, question: Question, price: Price | None) -> dict[str, Any]:
    curves = case.curves
    return {
        "method": case.method,
        "granularity": case.granularity,
        "ratios": list(case.ratios),
        "seeds": case.seeds,
        "forms": sorted({form.name for fit in curves.fits for form in fit.forms}) if curves else [],
        "noise": curves.noise if curves else None,
        "budgets": {path: case.budgets[path] for path in PATHS},
        "scale": case.scale,
        "pruned_loss": _plain(case.pruned_loss),
        "accounts": [_account(case, account, question) for account in case.accounts],
        "distances": [_distance(distance) for distance in case.distances],
        "next_runs": [_next_run(run, price) for run in case.next_runs[:3]],
    }


def _obstacle(obstacle: Obstacle) -> dict[str, Any]:
    fit = {"method": obstacle.method, "reason": obstacle.reason} if obstacle.method else {}
    return {"kind": obstacle.kind, **fit, **(_distance(obstacle.distance) if obstacle.distance else {})}


def _distance(distance: Distance) -> dict[str, Any]:
    span = {"low": distance.low, "high": distance.high}
    verdict = {"factor": distance.factor, "outside": distance.outside}
    return {"what": distance.quantity, "asked": distance.value, **span, **verdict}


def _account(case: Case, account: AdviceAccount, question: Question) -> dict[str, Any]:
    """One account in the question's tokens; None for a budget beyond what the runs can tell."""
    return {
        "name": account.name,
        "scratch_tokens": question.tokens + account.extra,
        "scratch_loss": _plain(account.scratch_loss),
        "difference": _plain(account.difference),
        "basis": "measured" if account.measured else "curves" if account.lead else None,
        "reason": account.measured.reason if account.measured else "",
        "seeds": account.measured.seeds if account.measured else case.seeds,
        "likely_pruned": account.lead.likely_pruned if account.lead and not account.measured else None,
        "winner": account.winner,
        "crossover": account.crossover.record(case.scale) if account.crossover else None,
    }


def _next_run(run: NextRun, price: Price | None) -> dict[str, Any]:
    """A further run of the evidence's own models, with its cost."""
    return {**asdict(run), "money": price.of(run.flops) if price and run.flops is not None else None}


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return asdict(interval) if interval else None
