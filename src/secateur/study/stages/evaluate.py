"""The stages that measure a finished model: how good it is, and what it costs to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import UserError
from secateur.evaluation.cost import Workload, measure_cost, sparsity
from secateur.evaluation.lm_eval.groups import TaskGroup, check_groups, measure_groups
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.loss import measure_loss, window_losses
from secateur.evaluation.protocols import PROTOCOLS
from secateur.evaluation.results import LOSS, EvaluationResults, Measurement
from secateur.evaluation.suite import measure, text_protocols
from secateur.files import write_json
from secateur.model.checkpoint import Checkpoint
from secateur.progress import track
from secateur.runtime import pick_device, pick_dtype
from secateur.study.stage import Stage
from secateur.study.stages.inputs import corpus_tokens, holdout_protocol, model_of
from secateur.study.store import Store

__all__ = ["COST", "RESULTS", "cost_stage", "evaluate_stage"]

RESULTS = "results.json"  #: every figure of a model, as ``secateur eval --out`` writes them, with the items beside it
COST = "cost.json"  #: what was timed; no two runs give the same, so that it is no part of the record


def evaluate_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Measure the held-out loss, and the perplexities and tasks that the study's suite names.

    What an earlier attempt has measured of the suite is not measured again.

    Returns:
        Of the held-out loss ``loss`` (nats per predicted token), ``perplexity``, ``tokens``, ``windows`` (the mean loss
        of each), ``by_position``, ``by_domain`` where there are several, and its ``protocol``; ``sparsity``; and
        ``suite``, the figures of the suite.
    """
    asked = stage.identity
    protocol = holdout_protocol(corpus_tokens(stage, store), asked["windows"], asked["seqlen"])
    checkpoint = Checkpoint(model_of(stage, store))
    device = pick_device(stage.runtime.get("device", "auto"))
    model: Any = checkpoint.load(pick_dtype(asked.get("dtype", "float32"), device)).to(device)  # type: ignore[arg-type]
    with track(f"evaluate {stage.name}", sum(part.numel() for part in protocol.windows)) as progress:
        losses = window_losses(model, protocol, advance=progress.advance)
    loss = measure_loss(losses, LOSS)
    suite = _suite(stage, checkpoint, model, work / RESULTS, loss)
    return {
        **loss.details,
        **losses.summary(),
        "sparsity": sparsity(checkpoint),
        "protocol": protocol.record(),
        "suite": [measurement.record() for measurement in suite],
    }


def _suite(stage: Stage, checkpoint: Checkpoint, model: Any, path: Path, loss: Measurement) -> list[Measurement]:
    """The figures of the suite, each written to ``path`` as soon as it is there, behind the held-out loss."""
    asked, told = stage.identity.get("suite", {}), stage.runtime
    texts = [text for protocol in PROTOCOLS.values() for text in protocol if text.name in asked.get("texts", {})]
    protocols = text_protocols(checkpoint, texts, data=told.get("text_data"))
    settings, groups = asked.get("settings", {}), [TaskGroup(**group) for group in asked.get("groups", ())]
    tasks = [
        Task(name, told.get("tasks_data"), asked["task_limit"], asked.get("few_shot"), **settings.get(name, {}))
        for name in asked.get("tasks", {})
    ]
    if groups:
        check_groups(groups, tasks)
    found = _measured(path)
    EvaluationResults(stage.name, [loss, *found]).save(path)
    for measurement in measure(checkpoint, model, protocols, tasks, done={m.name for m in found}, of=stage.name):
        found.append(measurement)
        EvaluationResults(stage.name, [loss, *found]).save(path)
    if groups:
        found += measure_groups(groups, found)
        EvaluationResults(stage.name, [loss, *found]).save(path)
    return found


def _measured(path: Path) -> list[Measurement]:
    """What an attempt before this one has measured, but for the held-out loss and the averages of groups."""
    try:
        return [m for m in EvaluationResults.load(path).measurements if m.name != LOSS and "tasks" not in m.protocol]
    except UserError:  # nothing, or a kill between two files
        return []


def cost_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Measure what a model costs to run; the figures go to ``cost.json``, since times differ from run to run.

    Returns:
        ``workload``, as it was asked.
    """
    device = pick_device(stage.runtime.get("device", "auto"))
    checkpoint = Checkpoint(model_of(stage, store))
    model: Any = checkpoint.load(pick_dtype("auto", device)).to(device)  # type: ignore[arg-type]
    asked = stage.identity["workload"]
    workload = Workload(**{**asked, "batches": tuple(asked["batches"])})
    write_json(work / COST, measure_cost(checkpoint, model, workload))
    return {"workload": asked}
