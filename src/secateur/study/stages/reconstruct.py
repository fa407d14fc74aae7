"""The stage that reconstructs the blocks of a pruned model, and how a pruning reads the windows to do so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.journal import Workspace
from secateur.data.tokenizer import load_tokenizer
from secateur.model.card import Ancestry, model_card
from secateur.model.checkpoint import Checkpoint
from secateur.model.checkpoint_writing import write_checkpoint
from secateur.model.companions import copy_companions
from secateur.model.plan import TENSOR_FILE, Plan
from secateur.model.safetensors_io import TensorFile
from secateur.model.surgery import cut_tensors
from secateur.pruning.block_reconstruction import reconstruct
from secateur.pruning.reconstruction import Reconstruction, describe_reconstruction
from secateur.runtime import pick_device
from secateur.study.stage import Stage
from secateur.study.stages.inputs import check_parents, corpus_tokens, model_of
from secateur.study.store import Store

__all__ = ["reconstruct_stage", "tuning_arguments"]


def reconstruct_stage(stage: Stage, store: Store, work: Path) -> dict[str, Any]:
    """Tune the blocks of the pruned model to those of its parent, on the stage's slice.

    Returns:
        ``reconstruction``, the record of :func:`secateur.pruning.block_reconstruction.reconstruct`; ``tokens``,
        ``parameters`` and ``peak_rate``, as a training stage has them, and an empty ``curve``.
    """
    identity = stage.identity
    check_parents(stage, store, identity["seqlen"])
    dense, pruned = Checkpoint(model_of(stage, store, "dense")), Checkpoint(model_of(stage, store))
    windows, how, arguments = tuning_arguments(stage, store, work, identity, identity["seqlen"], identity["dtype"])
    keep_hidden = TensorFile(pruned.directory / TENSOR_FILE).tensor("keep.hidden")
    channels = keep_hidden if len(keep_hidden) < dense.shape.hidden else None
    tuned, record = reconstruct(dense, pruned, windows, how, channels=channels, **arguments)
    out = work / "model"
    out.mkdir(exist_ok=True)
    plan = Plan.keeping_all("reconstruct", "sparse", {}, pruned.shape, tuned=tuned)
    origin = {"origin": pruned.provenance} if pruned.provenance else {}
    ancestry = Ancestry.read(pruned.directory)
    write_checkpoint(
        out,
        pruned.raw_config,
        cut_tensors(pruned, plan),
        provenance={"kind": "reconstructed", "stage": stage.fingerprint, "reconstruction": record, **origin},
        card=model_card(
            f"{ancestry.subject(pruned.shape)}, reconstructed",
            ancestry,
            [f"Tuned block by block by secateur: {describe_reconstruction(record)}.", "", f"- shape: {pruned.shape}"],
            tags=("pruning",),
        ),
    )
    copy_companions(pruned.directory, out)
    load_tokenizer(store.folder(stage.inputs["corpus"]) / "tokenizer").save_pretrained(out)
    shape = Checkpoint(out).shape
    return {
        "tokens": record["tokens"],
        "peak_rate": how.rate,
        "curve": [],
        "parameters": {"total": shape.total, "non_embedding": shape.non_embedding},
        "reconstruction": record,
    }


def tuning_arguments(
    stage: Stage, store: Store, work: Path, settings: Mapping[str, Any], seqlen: int, dtype: str
) -> tuple[Tensor, Reconstruction, dict[str, Any]]:
    """The windows of a slice, how many steps read them once, and where and in which order they are computed.

    Args:
        settings: ``slice``, ``tokens_per_step``, ``rate`` and ``seed``.
        dtype: of matrix products and states.
    """
    start, stop = settings["slice"]
    tokens = corpus_tokens(stage, store)
    windows = torch.from_numpy(tokens.read("train", start, stop)).reshape(-1, seqlen)
    step_windows = max(1, settings["tokens_per_step"] // seqlen)
    workspace = Workspace(work / "checkpoints", "disk")
    arguments = {
        "step_windows": step_windows,
        "seed": settings["seed"],
        "device": pick_device(stage.runtime["device"]),
        "dtype": getattr(torch, dtype),
        "store": workspace.store("reconstruct"),
        "journal": workspace.journal("reconstruct"),
    }
    return windows, Reconstruction(steps=-(-len(windows) // step_windows), rate=settings["rate"]), arguments
