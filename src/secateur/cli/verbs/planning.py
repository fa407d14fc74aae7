"""study plan: what a study will run and what it will cost, before anything starts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from secateur.cli.verbs.answer import Answer
from secateur.cli.verbs.studies import open_study
from secateur.formatting import count, scientific
from secateur.study.planner import tokens_needed, trunk_savings
from secateur.study.stage import Stage, unique

__all__ = ["study_plan"]

_SPEED = 4e14  #: FLOPs a second: about 40% of what an H100 promises in bfloat16
#: stages that train and score nothing, which are counted and not listed
_BESIDES = {
    "evaluate": "evaluations",
    "cost": "measurements of what a model costs to run",
    "select": "choices of a rate",
}
_FORMULA = (
    "FLOPs of a token forwards: 2 for each weight of the blocks' linears and of the head, and 4 x heads x head_dim for "
    "each layer and attended position, of which there are (sequence + 1) / 2 on average. Training: three times that. A "
    "teacher, and scoring: by the passes they take. Zeros of sparse weights count in full."
)


def study_plan(arguments: Namespace) -> Answer:
    """``secateur study plan FILE``."""
    study, stages, _ = open_study(arguments)
    stages = unique(stages)
    speed = arguments.flops_per_second or _SPEED
    flops = sum(stage.flops for stage in stages)
    trained, alone = trunk_savings(stages)
    answer: dict[str, Any] = {
        "study": study.name,
        "stages": [_row(stage) for stage in stages],
        "training_tokens": trained,
        "training_tokens_without_trunks": alone,
        "corpus_tokens": tokens_needed(stages),
        "flops": flops,
        "flops_by": _by_purpose(stages),
        "device_hours": {"flops_per_second": speed, "hours": flops / speed / 3600},
        "formula": _FORMULA,
    }
    return answer, "\n".join(_text(answer, stages)), 0


def _row(stage: Stage) -> dict[str, Any]:
    figures = {"tokens": stage.tokens, "flops": stage.flops}
    return {"kind": stage.kind, "name": stage.name, **figures, "fingerprint": stage.fingerprint}


def _by_purpose(stages: Sequence[Stage]) -> dict[str, float]:
    """FLOPs by what they are for."""
    purposes = {"parent": "parents", "pruned": "pruning", "P-R": "retraining", "scratch": "from scratch"}
    purposes |= {"control": "controls", "trunk": "trunks", "trial": "rate sweeps"}
    found: dict[str, float] = {}
    for stage in stages:
        if stage.flops:
            name = purposes[stage.facts["path"]]
            found[name] = found.get(name, 0.0) + stage.flops
    return found


def _text(answer: dict[str, Any], stages: Sequence[Stage]) -> list[str]:
    shown = [stage for stage in stages if stage.kind not in _BESIDES]
    width = max(len(stage.name) for stage in shown)
    lines = [
        f"{answer['study']}: {len(stages)} stages",
        "",
        f"{'kind':6}  {'stage':{width}}  {'tokens':>10}  {'FLOPs':>10}",
    ]
    for stage in shown:
        tokens, cost = (count(stage.tokens), f"{stage.flops:.2e}") if stage.tokens else ("-", "-")
        lines.append(f"{stage.kind:6}  {stage.name:{width}}  {tokens:>10}  {cost:>10}")
    besides = {words: sum(stage.kind == kind for stage in stages) for kind, words in _BESIDES.items()}
    lines.append("and " + ", ".join(f"{number} {words}" for words, number in besides.items() if number))
    parts = ", ".join(f"{name} {scientific(flops)}" for name, flops in answer["flops_by"].items())
    hours, speed = answer["device_hours"]["hours"], answer["device_hours"]["flops_per_second"]
    lines += [
        "",
        f"{answer['training_tokens']:,} training tokens, {scientific(answer['flops'])} FLOPs in all: {parts}.",
        f"About {hours:,.3g} device-hours at {scientific(speed)} FLOPs a second.",
        f"The corpus has to have {answer['corpus_tokens']:,} training tokens.",
    ]
    trained, alone = answer["training_tokens"], answer["training_tokens_without_trunks"]
    if trained < alone:
        lines.append(
            f"Ladders share their trunks: {trained:,} tokens instead of {alone:,}, {1 - trained / alone:.0%} less."
        )
    return [*lines, _FORMULA, "Nothing has been run."]
