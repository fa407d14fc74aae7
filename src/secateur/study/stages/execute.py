"""Run a stage by its kind: read the folders of its inputs, write its own folder and return its result.

Under ``torchrun`` all processes call :func:`run_stage` together. Training and pruning share their work; rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.config import parse
from secateur.data.corpus import CorpusSpec, build_corpus
from secateur.data.shards import TokenStore
from secateur.errors import UserError
from secateur.hub import local_checkpoint
from secateur.model.checkpoint import Checkpoint
from secateur.study.resolve import SHARDS
from secateur.study.stage import Stage
from secateur.study.stages.evaluate import cost_stage, evaluate_stage
from secateur.study.stages.prune import prune_stage
from secateur.study.stages.reconstruct import reconstruct_stage
from secateur.study.stages.select import select_stage
from secateur.study.stages.teach import teach_stage
from secateur.study.stages.train import train_stage
from secateur.study.store import Store

__all__ = ["run_stage"]


def run_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Run a stage in the folder ``work`` and return its result as plain values."""
    return _KINDS[stage.kind](stage, store, work)


def _corpus(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    places = {key: value for key, value in stage.runtime.items() if key in ("source", "tokenizer")}
    raw = {key: value for key, value in stage.identity.items() if key != "digest"} | places
    source = raw["source"]
    if not source.startswith(SHARDS):
        return build_corpus(parse(CorpusSpec, raw, origin="corpus"), work)
    tokens = TokenStore(Path(source.removeprefix(SHARDS)))
    for entry in tokens.folder.iterdir():  # links, since shards may be larger than any study
        if not (work / entry.name).exists():
            os.symlink(entry.resolve(), work / entry.name)
    counts = {side: tokens.tokens(side) for side in tokens.manifest.splits}
    return {"source": f"{SHARDS}{tokens.folder.name}", "tokens": counts, "fingerprint": tokens.fingerprint}


def _fetch(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Link an existing checkpoint into the stage's folder."""
    directory = local_checkpoint(stage.runtime["checkpoint"])
    checkpoint = Checkpoint(directory)
    sizes, expected = checkpoint.shape.as_dict(), stage.identity["shape"]
    key = next((key for key, value in sizes.items() if expected.get(key, value) != value), None)
    if key:
        raise UserError(f"{directory}: has {key} {sizes[key]}, but the study file {expected[key]}")
    (work / "model").unlink(missing_ok=True)
    os.symlink(directory.resolve(), work / "model")
    return {"checkpoint": directory.name, "parameters": {"total": checkpoint.shape.total}}


_KINDS: dict[str, Callable[[Stage, Store, Path], dict[str, Any]]] = {
    "corpus": _corpus,
    "fetch": _fetch,
    "prune": prune_stage,
    "reconstruct": reconstruct_stage,
    "teach": teach_stage,
    "train": train_stage,
    "select": select_stage,
    "evaluate": evaluate_stage,
    "cost": cost_stage,
}
