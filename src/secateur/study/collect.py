"""From a store's records to what a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.errors import UserError
from secateur.report.results import Cell, Evaluation, Parent, Point, Pruned, Results, StageNote
from secateur.runtime import environment
from secateur.shapes import removed
from secateur.spec import fingerprint, identity
from secateur.study.spec import Study
from secateur.study.stages import Stage, unique
from secateur.study.store import Store

__all__ = ["collect"]


def collect(study: Study, stages: list[Stage], store: Store, study_yaml: str) -> Results:
    """Read the records of a study's stages; what is missing is None, never zero.

    Raises:
        UserError: if not even the corpus is there.
    """
    corpus_stage = stages[0]
    corpus = store.record(corpus_stage)
    if corpus is None:
        raise UserError(f"{store.out}: holds no finished stage of this study; run it first: secateur study run FILE")
    evaluations = {s.facts["of"]: _evaluation(store.record(s)) for s in stages if s.kind == "evaluate"}
    protocols = [r["protocol"] for s in stages if s.kind == "evaluate" and (r := store.record(s))]
    parent_stage = next(s for s in stages if s.facts.get("path") == "parent")
    return Results(
        name=study.name,
        title=study.title or study.name,
        fingerprint=fingerprint(study),
        parent_tokens=study.parent.tokens,
        retrain_tokens=study.retrain.tokens,
        parent=_parent(study, parent_stage, store, evaluations),
        pruned=tuple(_pruned(s, store, evaluations) for s in stages if s.kind == "prune"),
        cells=tuple(
            _cell(study, s, parent_stage, store, evaluations)
            for s in stages
            if s.kind == "train" and s is not parent_stage
        ),
        corpus=corpus,
        protocol=protocols[0] if protocols else {},
        recipe={**identity(study.recipe), "retrain_peak_rate": study.retrain.peak_rate or study.recipe.peak_rate},
        stages=tuple(_note(s, store) for s in unique(stages)),
        environment=_environment(stages, store),
        study_yaml=study_yaml,
    )


def _evaluation(record: Mapping[str, Any] | None) -> Evaluation | None:
    if record is None:
        return None
    return Evaluation(
        loss=record["loss"],
        perplexity=record["perplexity"],
        tokens=record["tokens"],
        protocol=record["protocol"]["fingerprint"],
        windows=tuple(record["windows"]),
        sparsity=record["sparsity"],
    )


def _curve(record: Mapping[str, Any] | None) -> tuple[Point, ...]:
    return tuple(Point(p["tokens"], p["loss"]) for p in record["curve"]) if record else ()


def _parent(study: Study, stage: Stage, store: Store, evaluations: Mapping[str, Evaluation | None]) -> Parent:
    shape = stage.facts["shape"]
    return Parent(
        shape=shape.as_dict(),
        parameters=shape.total,
        non_embedding=shape.non_embedding,
        tokens=study.parent.tokens,
        flops=stage.flops,
        curve=_curve(store.record(stage)),
        evaluation=evaluations.get(stage.fingerprint),
    )


def _pruned(stage: Stage, store: Store, evaluations: Mapping[str, Evaluation | None]) -> Pruned:
    record, facts = store.record(stage), stage.facts
    parent = stage.inputs["model"].facts["shape"]
    share = record["ratio"] if record else removed(parent, facts["shape"])
    return Pruned(
        method=facts["method"],
        granularity=facts["granularity"],
        ratio=facts["ratio"],
        ratio_total=share["total"],
        ratio_non_embedding=share["non_embedding"],
        shape=facts["shape"].as_dict(),
        calibration_tokens=stage.tokens,
        flops=stage.flops,
        detail=record["summary"]["detail"] if record else "not pruned yet",
        evaluation=evaluations.get(stage.fingerprint),
    )


def _cell(
    study: Study, stage: Stage, parent: Stage, store: Store, evaluations: Mapping[str, Evaluation | None]
) -> Cell:
    shape, facts = stage.facts["shape"], stage.facts
    from_parent = facts["path"] == "P-R"
    before = (parent.tokens, parent.flops + stage.inputs["model"].flops) if from_parent else (0, 0.0)
    return Cell(
        name=facts["path"],
        path="pruned" if from_parent else "scratch",
        method=facts["method"],
        granularity=facts["granularity"],
        ratio=facts["ratio"],
        seed=study.recipe.seed,
        parameters=shape.total,
        non_embedding=shape.non_embedding,
        train_tokens=stage.tokens,
        total_tokens=stage.tokens + before[0],
        train_flops=stage.flops,
        total_flops=stage.flops + before[1],
        curve=_curve(store.record(stage)),
        evaluation=evaluations.get(stage.fingerprint),
    )


def _note(stage: Stage, store: Store) -> StageNote:
    runtime = store.runtime(stage)
    state = "done" if store.done(stage) else "failed" if "error" in runtime else "missing"
    return StageNote(
        name=stage.name,
        kind=stage.kind,
        fingerprint=stage.fingerprint,
        state=state,
        seconds=runtime.get("seconds"),
        folder=f"stages/{store.folder(stage).name}",
        error=runtime.get("error", ""),
    )


def _environment(stages: list[Stage], store: Store) -> dict[str, str]:
    """Where the stages ran; several values of one field are all named."""
    seen: dict[str, set[str]] = {}
    for stage in stages:
        runtime = store.runtime(stage)
        found = {
            **runtime.get("environment", {}),
            **{k: str(runtime[k]) for k in ("device", "threads") if k in runtime},
        }
        for key, value in found.items():
            seen.setdefault(key, set()).add(value)
    return {key: ", ".join(sorted(values)) for key, values in seen.items()} or environment()
