"""From a store's records to what a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.comparison.records import Cell, Cost, Evaluation, Parent, Point, Pruned, Running, StageNote, StudyResults
from secateur.config import fingerprint, identity
from secateur.errors import UserError
from secateur.evaluation.results import EvaluationResults as MeasuredResults
from secateur.evaluation.results import Measurement
from secateur.files import read_json
from secateur.model.shapes import removed, train_flops
from secateur.runtime import environment
from secateur.study.spec import StudySpec
from secateur.study.stage import Stage, unique, with_inputs
from secateur.study.stages.evaluate import COST, RESULTS
from secateur.study.store import Store

__all__ = ["collect"]


def collect(study: StudySpec, stages: list[Stage], store: Store, study_yaml: str) -> StudyResults:
    """Read the records of a study's stages; what is missing is None, never zero.

    Raises:
        UserError: if not even the corpus is there.
    """
    corpus = store.record(stages[0])
    if corpus is None:
        raise UserError(f"{store.out}: holds no finished stage of this study; run it first: secateur study run FILE")
    found = _Records(study, stages, store)
    return StudyResults(
        name=study.name,
        title=study.title or study.name,
        fingerprint=fingerprint(study),
        parents=tuple(found.parent(stage) for stage in stages if stage.facts.get("path") == "parent"),
        pruned=tuple(found.pruned(stage) for stage in stages if stage.kind == "prune"),
        cells=tuple(found.cell(stage) for stage in stages if stage.facts.get("path") in _CELLS),
        corpus=corpus,
        protocol=found.protocol(),
        recipe={**identity(study.recipe), "retrain_peak_rate": study.retrain.peak_rate or study.recipe.peak_rate},
        stages=tuple(_note(stage, store) for stage in unique(stages)),
        environment=_environment(stages, store),
        study_yaml=study_yaml,
    )


_CELLS = ("P-R", "scratch", "control")


class _Records:
    """The records of a study, each read once."""

    def __init__(self, study: StudySpec, stages: list[Stage], store: Store) -> None:
        self.study, self.store = study, store
        self.stages = unique(stages)
        self.records = {stage.fingerprint: store.record(stage) for stage in self.stages}
        self.seconds = {stage.fingerprint: _seconds(store.runtime(stage)) for stage in self.stages}
        self.measured = {stage.facts["of"]: stage for stage in stages if stage.kind == "evaluate"}
        self.timed = {stage.facts["of"]: stage for stage in stages if stage.kind == "cost"}
        pruned = {(stage.facts["parent"], stage.fingerprint) for stage in stages if stage.kind == "prune"}
        self.children = {name: sum(parent == name for parent, _ in pruned) for name in study.all_parents}

    def protocol(self) -> dict[str, Any]:
        records = (self.records[stage.fingerprint] for stage in self.measured.values())
        return next((record["protocol"] for record in records if record), {})

    def evaluation(self, stage: Stage) -> Evaluation | None:
        measured = self.measured.get(stage.fingerprint)
        record = self.records[measured.fingerprint] if measured else None
        if measured is None or record is None:
            return None
        return Evaluation(
            loss=record["loss"],
            perplexity=record["perplexity"],
            tokens=record["tokens"],
            protocol=record["protocol"]["fingerprint"],
            windows=tuple(record["windows"]),
            sparsity=record["sparsity"],
            measured=_figures(self.store.folder(measured) / RESULTS),
        )

    def running(self, stage: Stage) -> Running | None:
        timed = self.timed.get(stage.fingerprint)
        if timed is None or self.records[timed.fingerprint] is None:
            return None
        found = read_json(self.store.folder(timed) / COST)
        return Running(found["device"], found["dtype"], tuple(found["figures"]), found["sparsity"]["note"])

    def curve(self, stage: Stage) -> tuple[Point, ...]:
        """Of the run, and before it of those that it continues, end to end."""
        points: list[Point] = []
        for part in (*stage.facts.get("before", ()), stage):
            record = self.records[part.fingerprint]
            if record is None:
                return ()
            done = points[-1].tokens if points else 0
            points += [Point(done + p["tokens"], p["loss"]) for p in record["curve"] if p["tokens"] or not points]
        return tuple(points)

    def cost(self, stages: Iterable[Stage]) -> Cost:
        """Of stages together, as if each had been run for this alone."""
        together = [Cost(s.tokens, s.flops, self.seconds[s.fingerprint]) for s in stages]
        first, *others = together
        return sum(others, first)

    def parent(self, stage: Stage) -> Parent:
        shape, name = stage.facts["shape"], stage.facts["parent"]
        spec = self.study.all_parents[name]
        if stage.kind == "train":
            cost = self.cost([stage])
        else:  # by the same formula, if its tokens are known
            flops = train_flops(shape, spec.tokens or 0, self.study.recipe.sequence)
            cost = Cost(spec.tokens, flops) if spec.tokens else None
        return Parent(
            name=name,
            shape=shape.as_dict(),
            parameters=shape.total,
            non_embedding=shape.non_embedding,
            cost=cost,
            children=self.study.children or self.children[name],
            curve=self.curve(stage) if stage.kind == "train" else (),
            evaluation=self.evaluation(stage),
            running=self.running(stage),
        )

    def pruned(self, stage: Stage) -> Pruned:
        record, facts = self.records[stage.fingerprint], stage.facts
        parent = stage.inputs["model"].facts["shape"]
        share = record["ratio"] if record else removed(parent, facts["shape"])
        return Pruned(
            parent=facts["parent"],
            method=facts["method"],
            granularity=facts["granularity"],
            target=facts["target"],
            ratio=facts["ratio"],
            ratio_total=share["total"],
            ratio_non_embedding=share["non_embedding"],
            shape=facts["shape"].as_dict(),
            cost=self.cost([stage]),
            detail=record["summary"]["detail"] if record else "not pruned yet",
            evaluation=self.evaluation(stage),
            layers=tuple(record["layers"]) if record else (),
            running=self.running(stage),
        )

    def cell(self, stage: Stage) -> Cell:
        shape, facts = stage.facts["shape"], stage.facts
        record = self.records[stage.fingerprint]
        pruning, sweep = facts.get("pruning"), facts.get("sweep")
        return Cell(
            name=facts["name"],
            path="pruned" if facts["path"] == "P-R" else facts["path"],
            init=facts["init"],
            parent=facts["parent"],
            method=facts["method"],
            granularity=facts["granularity"],
            target=facts["target"],
            ratio=facts["ratio"],
            retrain_tokens=facts["retrain_tokens"],
            objective=facts["objective"],
            seed=facts["seed"],
            parameters=shape.total,
            non_embedding=self._kept(shape, pruning),
            training=self.cost((*facts["before"], stage)),
            pruning=self.cost([pruning]) if pruning else None,
            sweep=self.cost(sweep.facts["trials"]) if sweep else None,
            peak_rate=record["peak_rate"] if record else facts["peak_rate"],
            curve=self.curve(stage),
            evaluation=self.evaluation(stage),
            shape=shape.as_dict(),
            stages=tuple(part.fingerprint for part in self.behind(stage)),
        )

    def behind(self, stage: Stage) -> list[Stage]:
        """All that a run is made from, each stage after its inputs, then itself and what measured it."""
        return [*with_inputs([stage]), *(s for s in self.stages if s.facts.get("of") == stage.fingerprint)]

    def _kept(self, shape: Any, pruning: Stage | None) -> int:
        """Parameters outside the embeddings that no mask drops."""
        if pruning is None or pruning.facts["granularity"] != "sparse":
            return shape.non_embedding
        record = self.records[pruning.fingerprint]
        if record is None:
            return shape.non_embedding - round(pruning.facts["ratio"] * shape.block_weights)
        return round(shape.non_embedding * (1 - record["ratio"]["non_embedding"]))


def _figures(path: Path) -> tuple[Measurement, ...]:
    """The figures of a model, their items without what no comparison needs."""
    needed = ("value", "tokens", "domain")
    return tuple(
        replace(found, items=[{key: item[key] for key in needed if key in item} for item in found.items])
        for found in MeasuredResults.load(path).measurements
    )


def _seconds(runtime: Mapping[str, Any]) -> float | None:
    """Seconds times processes."""
    return runtime["seconds"] * runtime.get("processes", 1) if "seconds" in runtime else None


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
