"""Collect the records of a study's stages into the results that a report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from secateur.comparison.records import (
    Cell,
    Cost,
    DocumentLoss,
    Evaluation,
    Parent,
    Point,
    PrunedModel,
    Running,
    StageNote,
    StudyResults,
    Teaching,
)
from secateur.config import fingerprint
from secateur.errors import UserError
from secateur.evaluation.results import LOSS, Measurement
from secateur.evaluation.results import EvaluationResults as MeasuredResults
from secateur.files import read_json
from secateur.formatting import plural
from secateur.model.shapes import removed, train_flops
from secateur.runtime import environment
from secateur.study.spec import StudySpec
from secateur.study.stage import Stage, unique, with_inputs
from secateur.study.stages.evaluate import COST, RESULTS
from secateur.study.store import Store
from secateur.study.sweeps import choice_of, sweep_cost, sweep_records, trial_of
from secateur.study.window_documents import WindowDocuments

__all__ = ["collect"]


def collect(study: StudySpec, stages: list[Stage], store: Store, study_yaml: str) -> StudyResults:
    """Read the records of a study's stages. A missing value is None, never zero.

    Raises:
        UserError: if not even the corpus is finished.
    """
    corpus = store.record(stages[0])
    if corpus is None:
        raise UserError(f"{store.out}: has no finished stage of this study; run the study first")
    records = _Records(study, stages, store)
    return StudyResults(
        name=study.name,
        title=study.title or study.name,
        fingerprint=fingerprint(study),
        parents=tuple(records.parent(stage) for stage in stages if stage.facts.get("path") == "parent"),
        pruned=tuple(map(records.pruned, _pruned_models(stages))),
        cells=tuple(records.cell(stage) for stage in stages if stage.facts.get("path") in _CELLS),
        corpus=corpus,
        protocol=records.protocol(),
        recipe=_recipe(study),
        stages=tuple(_note(stage, store) for stage in unique(stages)),
        environment=_environment(stages, store),
        study_yaml=study_yaml,
        sweeps=sweep_records(
            [s for s in stages if s.facts.get("path") in ("parent", *_CELLS)], records.records, records.cost
        ),
        seeds_vary=study.seeds.vary,
    )


def _recipe(study: StudySpec) -> dict[str, Any]:
    """The keys of the recipe by their names in a study file, which are not all those of its identity."""
    recipe = {key: value for key, value in asdict(study.recipe).items() if key not in _HIDDEN_KEYS}
    return {**recipe, "retrain_peak_rate": study.retrain.peak_rate or study.recipe.peak_rate}


_HIDDEN_KEYS = ("init_std", "micro_batch")  #: an older spelling; not part of the result
_CELLS = ("P-R", "scratch", "control")
_MODEL = ("parent", "method", "granularity", "target", "ratio")  #: facts that identify a pruned model


class _Records:
    """The records of a study, each read once."""

    def __init__(self, study: StudySpec, stages: list[Stage], store: Store) -> None:
        self.study, self.store = study, store
        self.stages = unique(stages)
        self.window_documents = WindowDocuments(store)
        self.records = {stage.fingerprint: store.record(stage) for stage in self.stages}
        self.seconds = {stage.fingerprint: _seconds(store.runtime(stage)) for stage in self.stages}
        self.evaluations = {
            stage.facts["of"]: stage for stage in stages if "of" in stage.facts and stage.kind == "evaluate"
        }
        self.served: dict[
            str, dict[str, Stage]
        ] = {}  #: fingerprint of a model -> form of its weights -> its evaluation
        for stage in stages:
            if "served" in stage.facts:
                self.served.setdefault(stage.facts["served"], {})[stage.facts["weights"]] = stage
        self.timings = {stage.facts["of"]: stage for stage in stages if stage.kind == "cost"}
        self.prunings = _pruned_models(stages)

    def protocol(self) -> dict[str, Any]:
        records = (self.records[stage.fingerprint] for stage in self.evaluations.values())
        return next((record["protocol"] for record in records if record), {})

    def evaluation(self, stage: Stage) -> Evaluation | None:
        return self._evaluation(self.evaluations.get(stage.fingerprint))

    def _evaluation(self, evaluation: Stage | None) -> Evaluation | None:
        record = self.records[evaluation.fingerprint] if evaluation else None
        if evaluation is None or record is None:
            return None
        measured = _measurements(self.store.folder(evaluation) / RESULTS)
        documents = _documents(record, measured)
        size = record["protocol"]["seqlen"] - 1  # predicted tokens of all windows but the last, which may be shorter
        last = record["tokens"] - size * (len(record["windows"]) - 1)
        return Evaluation(
            loss=record["loss"],
            perplexity=record["perplexity"],
            tokens=record["tokens"],
            protocol=record["protocol"]["fingerprint"],
            windows=tuple(record["windows"]),
            sparsity=record["sparsity"],
            measured=measured,
            documents=documents,
            window_documents=() if documents else self.window_documents.of(evaluation, record),
            window_tokens=tuple(record.get("window_tokens", (*(size,) * (len(record["windows"]) - 1), last))),
            bytes=record["served"]["bytes"] if "served" in record else None,
        )

    def running(self, stage: Stage) -> Running | None:
        timing = self.timings.get(stage.fingerprint)
        if timing is None or self.records[timing.fingerprint] is None:
            return None
        cost = read_json(self.store.folder(timing) / COST)
        return Running(cost["device"], cost["dtype"], tuple(cost["figures"]), cost["sparsity"]["note"])

    def curve(self, stage: Stage) -> tuple[Point, ...]:
        """The curves of the runs that this one continues and of the run itself, end to end."""
        points: list[Point] = []
        for part in (*stage.facts.get("before", ()), stage):
            record = self.records[part.fingerprint]
            if record is None:
                return ()
            done = points[-1].tokens if points else 0
            points += [Point(done + p["tokens"], p["loss"]) for p in record["curve"] if p["tokens"] or not points]
        return tuple(points)

    def cost(self, stages: Iterable[Stage]) -> Cost:
        """The total cost of stages, each counted in full even if others share it."""
        costs = [self._cost(stage) for stage in stages]
        return sum(costs[1:], costs[0])

    def _cost(self, stage: Stage) -> Cost:
        """The cost of one stage; that of a run which is the best of several trials is the trial's."""
        if stage.kind != "select":
            return Cost(stage.tokens, stage.flops, self.seconds[stage.fingerprint])
        (tokens, flops), trial = stage.facts["cost"], trial_of(stage, self.records)
        return Cost(tokens, flops, self.seconds[trial.fingerprint] if trial else None)

    def sweep(self, stage: Stage) -> Cost | None:
        """The cost of the trials that chose a run's rate; None without a sweep."""
        choice = choice_of(stage)
        return sweep_cost(choice, self.records, self.cost) if choice else None

    def parent(self, stage: Stage) -> Parent:
        shape, name = stage.facts["shape"], stage.facts["parent"]
        spec = self.study.all_parents[name]
        if stage.kind != "fetch":
            cost = self.cost([stage])
        else:  # the same formula, if the checkpoint's tokens are known
            flops = train_flops(shape, spec.tokens or 0, self.study.recipe.sequence)
            cost = Cost(spec.tokens, flops) if spec.tokens else None
        return Parent(
            name=name,
            shape=shape.as_dict(),
            parameters=shape.total,
            non_embedding=shape.non_embedding,
            cost=cost,
            children=self.study.children or self.children(stage),
            curve=self.curve(stage) if stage.kind != "fetch" else (),
            evaluation=self.evaluation(stage),
            running=self.running(stage),
            sweep=self.sweep(stage),
            seed=stage.facts["seed"],
        )

    def children(self, parent: Stage) -> int:
        """The number of models that are pruned from a parent; prunings that differ in their seed alone count as one."""
        pruned = [stage for stage in self.prunings if _steps(stage)[0].inputs["model"] is parent]
        seeds = {stage.fingerprint: stage.facts["seed"] for stage in pruned}
        models = Counter(seeds.values())
        return models.pop(None, 0) + max(models.values(), default=0)

    def pruned(self, stage: Stage) -> PrunedModel:
        record, facts, steps = self.records[stage.fingerprint], stage.facts, _steps(stage)
        parent = steps[0].inputs["model"].facts["shape"]
        share = record["ratio"] if record and _of_parent(stage) else removed(parent, facts["shape"])
        several = len(steps) > 1
        return PrunedModel(
            **{key: facts[key] for key in _MODEL},
            ratio_total=share["total"],
            ratio_non_embedding=share["non_embedding"],
            shape=facts["shape"].as_dict(),
            cost=self.cost(steps),
            detail=self._detail(steps),
            evaluation=self.evaluation(stage),
            layers=self._layers(steps),
            running=self.running(stage),
            seed=facts["seed"],
            training_tokens=facts["training_tokens"],
            tuned="reconstruct" in stage.identity,
            steps=facts["steps"] if several else (),
            schedule=facts["schedule"] if several else "",
            series=facts["series"],
        )

    def _detail(self, steps: Sequence[Stage]) -> str:
        """What a pruning removed; of several steps, the last."""
        record = self.records[steps[-1].fingerprint]
        if record is None:
            return "not pruned yet"
        detail = record["summary"]["detail"]
        return (
            detail if len(steps) == 1 else f"in {plural(len(steps), 'step')} with recovery between, the last: {detail}"
        )

    def _layers(self, steps: Sequence[Stage]) -> tuple[dict[str, Any], ...]:
        """What each layer of the parent keeps after all steps; empty where one is not finished."""
        layers: list[dict[str, Any]] = []
        for number, stage in enumerate(steps):
            record = self.records[stage.fingerprint]
            if record is None:
                return ()
            rows = iter(record["layers"])
            layers = [next(rows) if row["kept"] else row for row in layers] if number else record["layers"]
        return tuple(layers)

    def cell(self, stage: Stage) -> Cell:
        shape, facts = stage.facts["shape"], stage.facts
        record = self.records[stage.fingerprint]
        pruning = facts.get("pruning")
        return Cell(
            name=facts["name"],
            path="pruned" if facts["path"] == "P-R" else facts["path"],
            **{key: facts[key] for key in (*_MODEL, "init", "retrain_tokens", "objective", "seed")},
            parameters=shape.total,
            non_embedding=self._remaining(shape, pruning),
            training=self.cost((*facts["before"], stage)),
            pruning=self.cost(_steps(pruning)) if pruning else None,
            sweep=self.sweep(stage),
            peak_rate=record["peak_rate"] if record else facts["peak_rate"],
            curve=self.curve(stage),
            evaluation=self.evaluation(stage),
            shape=shape.as_dict(),
            stages=tuple(part.fingerprint for part in self.provenance(stage)),
            teaching=self.teaching(facts["teaching"]) if "teaching" in facts else None,
            served={form: self._evaluation(s) for form, s in self.served.get(stage.fingerprint, {}).items()},
        )

    def teaching(self, stage: Stage) -> Teaching:
        record, facts = self.records[stage.fingerprint], stage.facts
        size = record["bytes"] if record else None
        return Teaching(facts["parent"], stage.identity["top_k"], self.cost([stage]), size, stage.fingerprint)

    def provenance(self, stage: Stage) -> list[Stage]:
        """The inputs of a run, each after its own inputs, then the run and its measurements."""
        return [
            *with_inputs([stage]),
            *(s for s in self.stages if stage.fingerprint in (s.facts.get("of"), s.facts.get("served"))),
        ]

    def _remaining(self, shape: Any, pruning: Stage | None) -> int:
        """Parameters outside the embeddings that the mask keeps."""
        if pruning is None or pruning.facts["granularity"] != "sparse":
            return shape.non_embedding
        record = self.records[pruning.fingerprint]
        if record is None:
            return shape.non_embedding - round(pruning.facts["ratio"] * shape.block_weights)
        return round(shape.non_embedding * (1 - record["ratio"]["non_embedding"]))


def _pruned_models(stages: Iterable[Stage]) -> list[Stage]:
    """The stages that end in a pruned model: of a pruning in steps, the last, and of several budgets, the first."""
    models: dict[tuple[Any, ...], Stage] = {}
    for stage in stages:
        if stage.kind == "prune" and stage.facts["path"] == "pruned":
            models.setdefault((*(stage.facts[key] for key in _MODEL), stage.facts["seed"]), stage)
    return list(models.values())


def _steps(pruned: Stage) -> tuple[Stage, ...]:
    """The steps of a pruning, the last of which is ``pruned``."""
    return (*pruned.facts["before"], pruned)


def _of_parent(pruned: Stage) -> bool:
    """Whether the shares in a pruning's record are of the parent: a cut in steps has those of its last step."""
    return not pruned.facts["before"] or pruned.facts["granularity"] == "sparse"


def _measurements(path: Path) -> tuple[Measurement, ...]:
    """The measurements of a model; their items are reduced to what comparisons need."""
    needed = ("value", "tokens", "domain")
    return tuple(
        replace(measurement, items=[{key: item[key] for key in needed if key in item} for item in measurement.items])
        for measurement in MeasuredResults.load(path).measurements
    )


def _documents(record: Mapping[str, Any], measured: Iterable[Measurement]) -> tuple[DocumentLoss, ...]:
    """The loss by document; of older versions, from the items of the measurement."""
    if "documents" in record:
        columns = record["documents"]
        rows = zip(columns["number"], columns["tokens"], columns["loss_sum"], strict=True)
        return tuple(DocumentLoss(*row) for row in rows)
    loss = next((m for m in measured if m.name == LOSS and m.unit == "documents"), None)
    items = loss.items if loss else ()
    return tuple(DocumentLoss(n, i["tokens"], i["value"] * i["tokens"]) for n, i in enumerate(items))


def _seconds(runtime: Mapping[str, Any]) -> float | None:
    """Device seconds: seconds times processes."""
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
    """Versions, device and threads of the stages' runs; different values are joined."""
    values_of: dict[str, set[str]] = {}
    for stage in stages:
        runtime = store.runtime(stage)
        facts = {
            **runtime.get("environment", {}),
            **{k: str(runtime[k]) for k in ("device", "threads") if k in runtime},
        }
        for key, value in facts.items():
            values_of.setdefault(key, set()).add(value)
    return {key: ", ".join(sorted(values)) for key, values in values_of.items()} or environment()
