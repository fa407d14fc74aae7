"""The stage that saves a parent's log-probabilities of a slice, for the students that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.model.checkpoint import Checkpoint
from secateur.runtime import pick_batch, pick_device
from secateur.study.stage import Stage
from secateur.study.stages.inputs import check_parents, corpus_tokens, model_of
from secateur.study.store import Store
from secateur.training.batches import Slice
from secateur.training.parallel import Execution
from secateur.training.teach import save_logits, windows_recipe

__all__ = ["LOGITS", "teach_stage"]

LOGITS = "logits"  #: folder of the log-probabilities


def teach_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Save the log-probabilities of the stage's slice; all processes together.

    Returns:
        ``tokens``, ``rows`` (predicted tokens), ``bytes``, ``shards``, ``top_k`` and ``teacher``, its digest.
    """
    identity, how = stage.identity, stage.runtime
    check_parents(stage, store, identity["sequence"])
    teacher = Checkpoint(model_of(stage, store))
    tokens = corpus_tokens(stage, store, teacher.shape.vocabulary)
    start, stop = identity["slice"]
    device = pick_device(how["device"])
    manifest, _ = save_logits(
        teacher,
        Slice(tokens, start, stop, windows_recipe(identity["sequence"], identity["attention"])),
        work / LOGITS,
        work / "checkpoints",
        corpus=tokens.fingerprint,
        top_k=identity["top_k"],
        temperature=identity["temperature"],
        execution=Execution(device, identity["dtype"], how["replicas"] if how["processes"] > 1 else 1),
        batch=pick_batch(identity["sequence"], device),
        label=stage.name,
    )
    return {
        "tokens": stop - start,
        "rows": sum(shard.rows for shard in manifest.shards),
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "top_k": manifest.top_k,
        "teacher": manifest.teacher,
    }
