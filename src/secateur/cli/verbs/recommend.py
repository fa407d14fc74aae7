"""recommend: prune or train from scratch, by the evidence nearest to the question, with its cost."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from secateur.cli.verbs.answer import Answer
from secateur.cli.verbs.costs import Price, Sizes, costs
from secateur.cli.verbs.pilot import write_pilot
from secateur.cli.verbs.recommend_text import text
from secateur.errors import UserError, did_you_mean
from secateur.forecast.advice import AdviceAccount, Case, Question, advise, bearing, case_of
from secateur.forecast.curve import PATHS
from secateur.forecast.evidence import Evidence, of_study
from secateur.forecast.published import published
from secateur.methods.registry import METHODS
from secateur.model.shapes import Shape, solve_depth, solve_width
from secateur.progress import track
from secateur.report.forecast_prose import crossover_json

__all__ = ["recommend"]


def recommend(arguments: Namespace) -> Answer:
    """``secateur recommend``."""
    if arguments.like is not None and arguments.pilot is None:
        raise UserError("--like: goes with --pilot, which writes a study like that one")
    evidence = published() if arguments.study is None else of_study(Path(arguments.study))
    question, sizes = _question(arguments, evidence)
    price = _price(arguments)
    cases, refused = _cases(evidence, question, arguments.noise)
    advice = advise(evidence, question, cases)
    pilot = None
    if arguments.pilot is not None:
        like = None if arguments.like is None else Path(arguments.like)
        pilot = write_pilot(Path(arguments.pilot), question, cases, like)
    answer = {
        "question": _question_record(question, sizes),
        "recommendation": {
            "choice": advice.choice,
            "decided_by": question.decides,
            "why": advice.why,
            "extrapolates": advice.extrapolates,
        },
        "cases": [_case(case, question) for case in cases],
        "not_fitted": refused,
        "evidence": _evidence(evidence, question),
        "costs": costs(question, sizes, price),
        "pilot": pilot,
    }
    return answer, text(answer), 0


def _cases(evidence: Evidence, question: Question, noise: float | None) -> tuple[list[Case], list[str]]:
    """The fits that bear on the question, and why others are not among them.

    Raises:
        UserError: if there are runs to go by and none of them can be fitted.
    """
    cases: list[Case] = []
    refused: list[str] = []
    groups = bearing(evidence, question)
    with track("fit the curves", len(groups)) as progress:
        for points in groups:
            try:
                cases.append(case_of(evidence, question, points, noise))
            except UserError as error:
                refused.append(str(error))
            progress.advance()
    if refused and not cases:
        raise UserError(f"{evidence.source}: {refused[0]}")
    return cases, refused


def _question(arguments: Namespace, evidence: Evidence) -> tuple[Question, Sizes]:
    """Build the question, with the sizes of its models."""
    method, granularity = arguments.method, arguments.granularity
    if method is not None:
        granularities = {name: info.granularity for name, info in METHODS.items()} | {**evidence.granularity}
        if method not in granularities:
            raise UserError(f"--method: {method!r} is not known{did_you_mean(method, granularities)}")
        if granularity not in (None, granularities[method]):
            raise UserError(
                f"--granularity: {method} is of granularity {granularities[method]}, not {granularity}; leave it out"
            )
        granularity = granularities[method]
    must_train = arguments.parent == "must-train"
    if must_train and arguments.parent_tokens is None:
        raise UserError("--parent must-train: say on how many tokens: --parent-tokens T")
    if arguments.children != 1 and not must_train:
        raise UserError("--children: share the parent's cost, which is sunk; goes with --parent must-train")
    shapes = _shapes(arguments.model, arguments.ratio, granularity) if arguments.model else None
    parent = float(shapes[0].total) if shapes else float(arguments.params)
    terms = (arguments.ratio, arguments.tokens, granularity, method, must_train)
    question = Question(parent, *terms, arguments.parent_tokens, arguments.children)
    target = float(shapes[1].total) if shapes else question.target(granularity)
    sizes = Sizes(parent, target, shapes)
    if shapes:
        question = replace(question, dearer=sizes.training(0, 1) / sizes.training(1, 1))
    return question, sizes


def _shapes(model: str, ratio: float, granularity: str | None) -> tuple[Shape, Shape]:
    """The parent's shape, from its configuration, and the target's: narrower unless layers or nothing at all go."""
    from secateur.model.checkpoint import read_config

    path = Path(model)
    _, _, before = read_config(path / "config.json" if path.is_dir() else path)
    if granularity == "sparse":
        return before, before
    return before, solve_depth(before, ratio) if granularity == "depth" else solve_width(before, ratio)


def _price(arguments: Namespace) -> Price | None:
    hour, flops = arguments.cost_per_hour, arguments.flops_per_second
    if (hour is None) != (flops is None):
        missing = "--flops-per-second" if flops is None else "--cost-per-hour"
        raise UserError(f"{missing}: is missing; money needs both an accelerator's price and what it sustains")
    return None if hour is None else Price(hour, flops)


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
        "findings": [asdict(finding) for finding in evidence.findings],
    }


def _case(case: Case, question: Question) -> dict[str, Any]:
    fit = case.fit
    return {
        "method": case.method,
        "granularity": case.granularity,
        "ratio": case.ratio,
        "form": fit.form.name,
        "noise": fit.noise,
        "budgets": {path: fit.budgets(path) for path in PATHS},
        "scale": case.scale,
        "pruned_loss": asdict(fit.at("pruned", question.tokens / case.scale)),
        "accounts": [_account(case, account, question) for account in case.accounts],
        "distances": [{**asdict(d), "factor": d.factor, "outside": d.outside} for d in case.distances],
        "next_runs": [asdict(run) for run in case.next_runs[:3]],
    }


def _account(case: Case, account: AdviceAccount, question: Question) -> dict[str, Any]:
    """One account in the question's tokens; None for a budget beyond what the runs can tell."""
    tokens = question.tokens + account.extra
    return {
        "name": account.name,
        "scratch_tokens": tokens,
        "scratch_loss": asdict(case.fit.at("scratch", tokens / case.scale)),
        "difference": asdict(account.lead.difference),
        "likely_pruned": account.lead.likely_pruned,
        "winner": account.winner,
        "crossover": crossover_json(account.crossover, case.scale),
    }
