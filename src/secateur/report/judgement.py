"""The judgement of a study: verdicts, findings, their sentences, and all of it as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secateur.comparison.ablation import Part, parts
from secateur.comparison.decision import Decision
from secateur.comparison.findings import Finding, find
from secateur.comparison.index import Group, Index
from secateur.comparison.items import decision_record
from secateur.comparison.objectives import objective_rows
from secateur.comparison.quality import QualityRow, contradicting, quality_rows
from secateur.comparison.question import decisive, margin_of
from secateur.comparison.records import StudyResults
from secateur.comparison.regime import Regime, regimes
from secateur.comparison.served import ServedVerdict, served_verdicts
from secateur.comparison.steps import steps_rows
from secateur.comparison.sweeps import sweep_rows
from secateur.comparison.twins import Setting, Verdict, adjust_verdicts, compare_twins, settings_of
from secateur.forecast.ladder import Forecasts, forecast
from secateur.forecast.ratios import MethodLaw, across_ratios
from secateur.report.forecast_prose import forecasts_json, laws_json
from secateur.report.prose import (
    contradiction_sentence,
    finding_sentence,
    headline,
    objective_sentence,
    steps_sentence,
    study_answer,
    verdict_sentence,
)
from secateur.report.question_prose import QuestionText, question_json, question_text
from secateur.report.regime_prose import caution, regime_json

__all__ = ["Judgement", "answer_json", "judge"]


@dataclass(frozen=True)
class Judgement:
    """All verdicts of a study and its answer."""

    index: Index = field(compare=False)
    settings: tuple[Setting, ...]  #: the settings that the study has runs for
    verdicts: tuple[Verdict, ...]  #: by setting, then by comparison; pooled over seeds
    sentences: tuple[str, ...]  #: one for each verdict
    by_seed: tuple[Verdict, ...]  #: one for each seed; empty if the study has one seed
    headlines: dict[Setting, str]  #: one for each setting
    answer: str
    findings: tuple[Finding, ...]
    quality: tuple[QualityRow, ...]  #: perplexities, tasks and losses by domain
    contradictions: tuple[str, ...]  #: comparisons where tasks and held-out loss disagree
    served: tuple[ServedVerdict, ...] = ()  #: with the weights in each form that the study serves; empty without any

    @property
    def results(self) -> StudyResults:
        """The results that the judgement is about."""
        return self.index.results

    @cached_property
    def regimes(self) -> tuple[Regime, ...]:
        """For each parent, whether the study's regime is that of its question."""
        return regimes(self.index)

    @property
    def caution(self) -> str:
        """Why the study tells little about pruning a well-trained parent; empty where nothing shows that."""
        return caution(self.regimes)

    @cached_property
    def question(self) -> QuestionText:
        """The study's question with the verdicts that decide it."""
        return question_text(self.results, self.verdicts, self.sentences)

    @cached_property
    def forecasts(self) -> Forecasts:
        """Forecasts of the study's ladders; fitted at the first access, which takes seconds."""
        return forecast(self.index, self.verdicts)

    @cached_property
    def laws(self) -> tuple[MethodLaw, ...]:
        """Laws across ratios, of each method that has several ratios and a ladder."""
        return across_ratios(self.index)

    def parts(self, group: Group) -> tuple[Part, ...]:
        """The parts of a comparison's advantage at equal training tokens; empty without a control."""
        verdicts = (v for v in self.verdicts if v.setting == "training" and v.group == group)
        return parts(self.index, group, next((verdict.decision for verdict in verdicts), None))

    def verdicts_in(self, setting: Setting) -> list[tuple[Verdict, str]]:
        """The verdicts of one setting, each with its sentence."""
        pairs = zip(self.verdicts, self.sentences, strict=True)
        return [(verdict, text) for verdict, text in pairs if verdict.setting == setting]


_NO_TWINS = "No model of this study was trained from scratch; it compares pruned models with each other."


def judge(results: StudyResults) -> Judgement:
    """Compare every pruned run with its from-scratch twins. Depends on ``results`` alone.

    Verdicts are corrected for their number by Holm's method: those that decide the study's question together, the
    others of each setting together. Where there is a question, its verdicts alone are the answer.
    """
    index = Index(results)
    settings = settings_of(index)
    margin, named = margin_of(results.question), decisive(results.question)
    verdicts = adjust_verdicts(compare_twins(index, index.comparisons, margin), named)
    answers = [v for v in verdicts if (v.setting, v.group.pooled) in named] or verdicts
    headlines: dict[Setting, str] = {
        setting: headline([verdict for verdict in verdicts if verdict.setting == setting]) for setting in settings
    }
    quality = quality_rows(index, margin)
    return Judgement(
        index=index,
        settings=settings,
        verdicts=verdicts,
        sentences=tuple(verdict_sentence(verdict, index.comparisons, results.seeds_vary) for verdict in verdicts),
        by_seed=adjust_verdicts(compare_twins(index, index.groups, margin), named) if index.several_seeds else (),
        headlines=headlines,
        answer=study_answer(answers) if settings or not results.cells else _NO_TWINS,
        findings=find(index, verdicts),
        quality=tuple(quality),
        contradictions=tuple(
            contradiction_sentence(*pair, index.comparisons) for pair in contradicting(verdicts, quality)
        ),
        served=served_verdicts(index, verdicts, margin, named),
    )


def answer_json(judgement: Judgement) -> dict[str, Any]:
    """The judgement as plain values. Verdicts pooled over seeds have no seed."""
    groups = judgement.index.groups
    pairs = [*zip(judgement.verdicts, judgement.sentences, strict=True)]
    pairs += [
        (verdict, verdict_sentence(verdict, groups, judgement.results.seeds_vary)) for verdict in judgement.by_seed
    ]
    return {
        "answer": judgement.answer,
        "question": question_json(judgement.results, judgement.question),
        "caution": judgement.caution or None,
        "regime": [regime_json(regime) for regime in judgement.regimes],
        "verdicts": [{**_verdict_json(judgement.index, verdict), "sentence": text} for verdict, text in pairs],
        "findings": [
            {
                "finding": finding.key,
                "claim": finding.claim,
                "who": row.scope,
                "answer": row.answer,
                "holds_in": len(row.measured) - len(row.exceptions),
                "measured": len(row.measured),
                "planned": len(row.cases),
                **_mean_json(row.mean),
                "exceptions": [
                    {**dataclasses.asdict(case.group), **_mean_json(case.decision)} for case in row.exceptions
                ],
                "sentence": finding_sentence(row, judgement.index.comparisons),
            }
            for finding in judgement.findings
            for row in finding.rows
        ],
        "quality": [
            {"setting": row.setting, **dataclasses.asdict(row.group), "winner": row.winner, **row.comparison.record()}
            for row in judgement.quality
        ],
        "contradictions": list(judgement.contradictions),
        "served": [
            {"weights": row.weights, "bytes": row.bytes, **_verdict_json(judgement.index, row.verdict)}
            for row in judgement.served
        ],
        "inherited": [
            {**dataclasses.asdict(group), "without": part.against, "with": part.of, **_mean_json(part.mean)}
            for group in judgement.index.comparisons
            for part in judgement.parts(group)
        ],
        "objectives": [
            {
                "equal": row.equal,
                "first": dataclasses.asdict(row.first),
                "second": dataclasses.asdict(row.second),
                **_mean_json(row.mean),
                "sentence": objective_sentence(row),
            }
            for row in objective_rows(judgement.index)
        ],
        "steps": [
            {
                "first": {**dataclasses.asdict(row.first), "steps": row.first_steps},
                "second": {**dataclasses.asdict(row.second), "steps": row.second_steps},
                **_mean_json(row.mean),
                "sentence": steps_sentence(row),
            }
            for row in steps_rows(judgement.index)
        ],
        **forecasts_json(judgement.forecasts),
        "across_ratios": laws_json(judgement.laws),
        "sweeps": sweep_rows(judgement.index),
    }


def _mean_json(mean: Decision | None) -> dict[str, Any]:
    """A paired difference with its verdict; None if it was not measured."""
    decision = mean or Decision("not measured")
    return {"verdict": decision.verdict, **decision_record(decision)}


def _verdict_json(index: Index, verdict: Verdict) -> dict[str, Any]:
    return {
        "setting": verdict.setting,
        **dataclasses.asdict(verdict.group),
        "ratio": index.ratio(verdict.group.model),
        "winner": verdict.winner,
        **decision_record(verdict.decision),
        "unit": verdict.unit,
        "seeds": verdict.seeds,
        "flop_ratio": verdict.flop_ratio,
    }
