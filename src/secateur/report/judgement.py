"""What the study says: every verdict, the sentences that state them, and the same as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secateur.comparison.ablation import parts
from secateur.comparison.findings import Finding, find
from secateur.comparison.index import Index
from secateur.comparison.objectives import objective_rows
from secateur.comparison.quality import QualityRow, contradicting, quality_rows
from secateur.comparison.records import StudyResults
from secateur.comparison.twins import MeanDifference, Setting, Verdict, compare_twins, settings_of
from secateur.forecast.ladder import Forecasts, forecast
from secateur.forecast.ratios import MethodLaw, across_ratios
from secateur.report.forecast_prose import forecasts_json, laws_json
from secateur.report.prose import answer, contradiction, headline, sentence

__all__ = ["Judgement", "answer_json", "judge"]


@dataclass(frozen=True)
class Judgement:
    """Every verdict of a study and what they say together."""

    index: Index = field(compare=False)
    settings: tuple[Setting, ...]  #: those that the study has runs for
    verdicts: tuple[
        Verdict, ...
    ]  #: setting by setting, one for each comparison; over its seeds where there are several
    sentences: tuple[str, ...]  #: one for each verdict
    by_seed: tuple[Verdict, ...]  #: the same for each seed by itself; empty where there is but one
    headlines: dict[Setting, str]  #: one for each setting
    answer: str
    findings: tuple[Finding, ...]
    quality: tuple[QualityRow, ...]  #: what was measured besides the held-out loss
    contradictions: tuple[str, ...]  #: where tasks decide for the other path than the held-out loss

    @property
    def results(self) -> StudyResults:
        """What was judged."""
        return self.index.results

    @cached_property
    def forecasts(self) -> Forecasts:
        """Of its ladders; fitted when first asked for, since that takes seconds."""
        return forecast(self.index, self.verdicts)

    @cached_property
    def laws(self) -> tuple[MethodLaw, ...]:
        """Across the ratios of each method that has several and a ladder."""
        return across_ratios(self.index)

    def of(self, setting: Setting) -> list[tuple[Verdict, str]]:
        """The verdicts of one setting with their sentences."""
        pairs = zip(self.verdicts, self.sentences, strict=True)
        return [(verdict, text) for verdict, text in pairs if verdict.setting == setting]


_NO_TWINS = "No model of this study was trained from scratch: it compares pruned ones with one another."


def judge(results: StudyResults) -> Judgement:
    """Compare every pruned run with its from-scratch twins. A pure function: the same results, the same judgement."""
    index = Index(results)
    settings = settings_of(index)
    verdicts = compare_twins(index, index.comparisons)
    headlines: dict[Setting, str] = {
        setting: headline([verdict for verdict in verdicts if verdict.setting == setting]) for setting in settings
    }
    quality = quality_rows(index)
    return Judgement(
        index=index,
        settings=settings,
        verdicts=verdicts,
        sentences=tuple(sentence(verdict, index.comparisons) for verdict in verdicts),
        by_seed=compare_twins(index, index.groups) if index.several_seeds else (),
        headlines=headlines,
        answer=answer(verdicts) if settings or not results.cells else _NO_TWINS,
        findings=find(index),
        quality=tuple(quality),
        contradictions=tuple(contradiction(*pair, index.comparisons) for pair in contradicting(verdicts, quality)),
    )


def answer_json(judgement: Judgement) -> dict[str, Any]:
    """The judgement as plain values: answer, verdicts (pooled ones have no seed), and what else the report tells."""
    groups = judgement.index.groups
    pairs = [*zip(judgement.verdicts, judgement.sentences, strict=True)]
    pairs += [(verdict, sentence(verdict, groups)) for verdict in judgement.by_seed]
    return {
        "answer": judgement.answer,
        "verdicts": [_verdict_json(judgement.index, verdict, text) for verdict, text in pairs],
        "findings": [
            {
                "finding": finding.key,
                "claim": finding.claim,
                "who": row.who,
                "answer": row.answer,
                **_mean_json(row.mean),
                "sentence": row.sentence,
            }
            for finding in judgement.findings
            for row in finding.rows
        ],
        "quality": [
            {"setting": row.setting, **dataclasses.asdict(row.group), "winner": row.winner, **row.comparison.record()}
            for row in judgement.quality
        ],
        "contradictions": list(judgement.contradictions),
        "inherited": [
            {**dataclasses.asdict(group), "without": part.against, "with": part.of, **_mean_json(part.mean)}
            for group in judgement.index.comparisons
            for part in parts(judgement.index, group)
        ],
        "objectives": [
            {
                "equal": row.equal,
                "first": dataclasses.asdict(row.first),
                "second": dataclasses.asdict(row.second),
                **_mean_json(row.mean),
                "sentence": row.sentence,
            }
            for row in objective_rows(judgement.index)
        ],
        **forecasts_json(judgement.forecasts),
        "across_ratios": laws_json(judgement.laws),
    }


def _mean_json(mean: MeanDifference | None) -> dict[str, Any]:
    """A paired difference; None where it was not measured."""
    return {"difference": mean.value if mean else None, "interval": [mean.low, mean.high] if mean else None}


def _verdict_json(index: Index, verdict: Verdict, text: str) -> dict[str, Any]:
    return {
        "setting": verdict.setting,
        **dataclasses.asdict(verdict.group),
        "ratio": index.ratio(verdict.group.model),
        "seeds": verdict.seeds,
        "winner": verdict.winner,
        "difference": verdict.difference,
        "interval": None if verdict.low is None else [verdict.low, verdict.high],
        "flop_ratio": verdict.flop_ratio,
        "reason": verdict.reason,
        "sentence": text,
    }
