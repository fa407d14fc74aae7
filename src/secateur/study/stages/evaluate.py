"""The stages that measure a finished model: how good it is, and what it costs to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.evaluation.cost import measure_cost, sparsity
from secateur.evaluation.job import ResumableResults
from secateur.evaluation.lm_eval.groups import TaskGroup, check_groups
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.loss import measure_loss, window_losses
from secateur.evaluation.measure import text_protocols
from secateur.evaluation.protocols import PROTOCOLS
from secateur.evaluation.results import LOSS, EvaluationResults, Measurement, served_protocol
from secateur.evaluation.workload import Workload
from secateur.files import write_json
from secateur.model.checkpoint import Checkpoint
from secateur.model.quantisation import serve
from secateur.progress import track
from secateur.runtime import pick_device, pick_dtype
from secateur.study.stage import Stage
from secateur.study.stages.inputs import check_parents, corpus_tokens, holdout_protocol, model_of
from secateur.study.store import Store

__all__ = ["COST", "RESULTS", "cost_stage", "evaluate_stage"]

RESULTS = "results.json"  #: every figure of a model, as ``secateur eval --out`` writes them, with the items beside it
COST = "cost.json"  #: what was timed; no two runs give the same, so that it is no part of the record


def evaluate_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Measure the held-out loss, and the perplexities and tasks that the study's suite names.

    What an earlier attempt has measured of the suite is not measured again.

    Returns:
        Of the held-out loss ``loss`` (nats per predicted token), ``perplexity``, ``tokens``, ``windows`` (the mean loss
        of each), ``documents`` (of each its number, tokens and summed loss), ``by_position``, ``by_domain`` where there
        are several, and its ``protocol``; ``sparsity``; ``suite``, the figures of the suite; and, of weights in another
        form than the stored one, ``served``.
    """
    identity = stage.identity
    check_parents(stage, store, identity["seqlen"])
    checkpoint = Checkpoint(model_of(stage, store))
    tokens = corpus_tokens(stage, store, checkpoint.shape.vocabulary)
    protocol = holdout_protocol(tokens, identity["windows"], identity["seqlen"])
    device = pick_device(stage.runtime.get("device", "auto"))
    model: Any = checkpoint.load_language_model(pick_dtype(identity.get("dtype", "float32"), device)).to(device)  # type: ignore[arg-type]
    weights = identity.get("weights")
    served = serve(checkpoint, model, weights) if weights else None
    with track(f"evaluate {stage.name}", sum(part.numel() for part in protocol.windows)) as progress:
        losses = window_losses(model, protocol, advance=progress.advance)
    loss = measure_loss(losses, LOSS)
    suite = _measure_suite(stage, checkpoint, model, work / RESULTS, loss)
    return {
        **loss.details,
        **losses.summary(),
        "sparsity": sparsity(checkpoint),
        "protocol": served_protocol(protocol.record(), weights),
        "suite": [measurement.record() for measurement in suite],
        **({"served": served.record()} if served else {}),
    }


def _measure_suite(
    stage: Stage, checkpoint: Checkpoint, model: Any, path: Path, loss: Measurement
) -> list[Measurement]:
    """Measure the figures of the suite, each written to ``path`` behind the held-out loss as soon as it is known."""
    suite, runtime = stage.identity.get("suite", {}), stage.runtime
    texts = [text for protocol in PROTOCOLS.values() for text in protocol if text.name in suite.get("texts", {})]
    protocols = text_protocols(checkpoint, texts, data=runtime.get("text_data"))
    settings, groups = suite.get("settings", {}), [TaskGroup(**group) for group in suite.get("groups", ())]
    tasks = [
        Task(name, runtime.get("tasks_data"), suite["task_limit"], suite.get("few_shot"), **settings.get(name, {}))
        for name in suite.get("tasks", {})
    ]
    if groups:
        check_groups(groups, tasks)
    results = ResumableResults(path, EvaluationResults(stage.name), [loss], stage.identity.get("weights"))
    return results.measure(checkpoint, model, protocols, tasks, groups, of=stage.name)


def cost_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Measure what a model costs to run; the figures go to ``cost.json``, since times differ from run to run.

    Returns:
        ``workload``, as the study requests it.
    """
    device = pick_device(stage.runtime.get("device", "auto"))
    checkpoint = Checkpoint(model_of(stage, store))
    model: Any = checkpoint.load_language_model(pick_dtype("auto", device)).to(device)  # type: ignore[arg-type]
    requested = stage.identity["workload"]
    workload = Workload(**{**requested, "batches": tuple(requested["batches"])})
    write_json(work / COST, measure_cost(checkpoint, model, workload))
    return {"workload": requested}
