"""Save a teacher's likeliest next ids on a slice of tokens, so that students train on them without the teacher.

Windows are divided into shards and batches in a way that depends on the slice and the batch alone. A batch is computed
by one process, so that the bytes are the same for any number of processes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from secateur import distributed
from secateur.config import identity
from secateur.data.shards import TokenStore
from secateur.data.tokenizer_match import check_encoded_for
from secateur.errors import UserError
from secateur.evaluation.token_windows import check_shards, open_shards
from secateur.files import (
    check_disk,
    read_json,
    require_new_directory,
    sha256_file,
    shared_directory,
    write_bytes,
    write_json,
)
from secateur.formatting import count, plural, scientific
from secateur.hub import local_checkpoint
from secateur.losses.top_k import TopK, top_k_of
from secateur.model.checkpoint import Checkpoint, max_positions, skeleton
from secateur.model.shapes import teacher_flops
from secateur.progress import notify, track
from secateur.runtime import environment, pick_batch, pick_device, pick_dtype
from secateur.training.batches import Batch, Slice, Span
from secateur.training.distill import frozen_readout, tokens_hash
from secateur.training.init import stored_weights
from secateur.training.logits_size import count_windows, logits_size, windows_per_shard
from secateur.training.parallel import Execution, place_teacher
from secateur.training.recipe import Recipe
from secateur.training.teach_request import TeachRequest
from secateur.training.teacher_logits import (
    MANIFEST,
    Columns,
    LogitsManifest,
    LogitsShard,
    encode,
)
from secateur.version import __version__

__all__ = ["SavedLogits", "save_logits", "teach", "windows_recipe"]


@dataclass(frozen=True)
class SavedLogits:
    """A folder of a teacher's log-probabilities. ``str`` gives ``logits:DIR``, the spelling that training takes."""

    path: Path
    manifest: LogitsManifest
    flops: float  #: of the teacher's forward passes
    seconds: float  #: of this call; a resumed run has computed the rest before
    speed: float | None  #: tokens a second of this call, of all processes; None where nothing was left to compute

    def __str__(self) -> str:
        return f"logits:{self.path}"

    def __fspath__(self) -> str:
        return str(self.path)

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur teach --json`` prints them."""
        manifest = self.manifest
        tokens = manifest.stop - manifest.first
        return {
            "out": str(self.path),
            "tokens": tokens,
            "predicted": sum(shard.rows for shard in manifest.shards),
            "top_k": manifest.top_k,
            "bytes": manifest.bytes,
            "bytes_per_token": manifest.bytes / tokens,
            "shards": len(manifest.shards),
            "flops": self.flops,
            "tokens_per_second": self.speed,
            "seconds": self.seconds,
        }


def teach(request: TeachRequest) -> SavedLogits:
    """Write the log-probabilities of a slice into the directory ``out``; all processes together.

    What can fail without reading weights fails first.

    Raises:
        UserError: if the data, the teacher and the request do not fit together, or the disk is too small.
    """
    out = Path(request.out)
    device = pick_device(request.device)
    dtype = "bfloat16" if pick_dtype(request.dtype, device) is torch.bfloat16 else "float32"
    execution = Execution(device, dtype, request.replicas)
    require_new_directory(out)
    store = open_shards(request.data, "data")
    teacher = Checkpoint(local_checkpoint(request.teacher))
    data = _slice(request, store, teacher)
    needed = logits_size(data.tokens, request.sequence, request.top_k, teacher.shape.vocabulary)
    disk = check_disk(out, needed)
    flops = teacher_flops(teacher.shape, data.tokens, request.sequence)
    notify(
        f"{count(teacher.shape.total)} parameters read {plural(data.tokens, 'token')}, {scientific(flops)} FLOPs; the "
        f"likeliest {request.top_k:,} of {teacher.shape.vocabulary:,} ids take {needed / data.tokens:.0f} bytes a "
        f"token: {disk}"
    )
    run_identity = {
        "teacher": teacher.digest,
        "data": store.fingerprint,
        "slice": [data.start, data.stop],
        "windows": [request.sequence, request.attention],
        "top_k": request.top_k,
        "temperature": request.temperature,
        "dtype": dtype,
    }
    directories = shared_directory(
        out, run_identity, "what to save", resume=True, progress_files="finished/*", labels=_RESUME_LABELS
    )
    with directories as (fresh, work):
        started = time.monotonic()
        manifest, tokens = save_logits(
            teacher,
            data,
            work / "shards",
            work / "finished",
            corpus=store.fingerprint,
            top_k=request.top_k,
            temperature=request.temperature,
            execution=execution,
            batch=request.batch or pick_batch(request.sequence, device),
            label=f"teach {out.name}",
        )
        seconds = time.monotonic() - started
        if distributed.is_main():
            for path in (work / "shards").iterdir():
                shutil.move(path, fresh / path.name)
    return SavedLogits(out, manifest, flops, seconds, tokens / seconds if tokens else None)


#: fields of a request by the keys that identify an unfinished run
_RESUME_LABELS = {
    "teacher": "`teacher`",
    "data": "`data`",
    "slice": "`tokens` or `skip`",
    "windows": "`sequence` or `attention`",
    "top_k": "`top_k`",
    "temperature": "`temperature`",
    "dtype": "`dtype`",
}


def _slice(request: TeachRequest, store: TokenStore, teacher: Checkpoint) -> Slice:
    """The windows that the teacher reads.

    Raises:
        UserError: if there are not enough tokens, or the teacher cannot take them.
    """
    available, vocabulary = store.tokens("train"), teacher.shape.vocabulary
    first = request.skip
    last = available if request.tokens is None else first + request.tokens
    if last > available or last - first < 2:
        raise UserError(
            f"`tokens`: {request.data} has {plural(available, 'token')}, not {first:,} to {max(last, first + 2):,}; "
            "lower `tokens` or `skip`, or build a larger corpus"
        )
    if request.top_k > vocabulary:
        raise UserError(f"`top_k`: {request.top_k} is more than the teacher's vocabulary of {vocabulary}; lower it")
    check_shards(store, request.data, "data", vocabulary)
    check_encoded_for(teacher.directory, store.tokenizer, request.data, "`data`")
    limit = max_positions(teacher.config)
    if limit and request.sequence > limit:
        raise UserError(f"`sequence`: {request.sequence} is more than the teacher's {limit} positions; set {limit}")
    return Slice(store, first, last, windows_recipe(request.sequence, request.attention))


def windows_recipe(sequence: int, attention: Any) -> Recipe:
    """The keys of a recipe that decide what windows are."""
    return Recipe(sequence=sequence, tokens_per_step=sequence, attention=attention)


def save_logits(
    teacher: Checkpoint,
    data: Slice,
    folder: Path,
    notes: Path,
    *,
    corpus: str,
    top_k: int,
    temperature: float,
    execution: Execution,
    batch: int,
    label: str,
) -> tuple[LogitsManifest, int]:
    """Write shards and the manifest into ``folder``; all processes together. Finished shards are not computed again.

    Args:
        folder: may have shards of a run with the same arguments that was killed.
        notes: folder of a note for each finished shard, which a killed run needs to resume.
        corpus: fingerprint of the token shards.
        batch: windows at once in a process.

    Returns:
        The manifest, and the number of tokens that this call has computed.
    """
    recipe = data.recipe
    shards = _spans(data)
    missing = _missing(folder, notes, len(shards))
    if missing:
        model = place_teacher(skeleton(teacher.config, teacher.directory), stored_weights(teacher), execution)

        def rows(spans: Sequence[Span]) -> TopK | None:
            windows = data.batch(spans) if spans else Batch.empty()
            positions = None if windows.positions is None else windows.positions.to(execution.device)
            with frozen_readout(model, windows.ids.to(execution.device), positions) as factors:
                return top_k_of(factors, top_k, temperature=temperature) if spans else None

        shares = [missing[rank :: distributed.world_size()] for rank in range(distributed.world_size())]
        share = shares[distributed.rank()]
        _write_shards(folder, notes, shards, share, rows, teacher.shape.vocabulary, batch, label)
        if execution.splits_model:  # processes that share a teacher make equal numbers of forward passes
            passes = [sum(len(_batches(shards[number], batch)) for number in numbers) for numbers in shares]
            for _ in range(max(passes) - passes[distributed.rank()]):
                rows(())
    distributed.barrier()
    entries = [read_json(_note(notes, number)) for number in range(len(shards))]
    manifest = LogitsManifest(
        teacher=teacher.digest,
        corpus=corpus,
        first=data.start,
        stop=data.stop,
        sequence=recipe.sequence,
        attention=recipe.attention,
        vocabulary=teacher.shape.vocabulary,
        tokens_sha256=tokens_hash(teacher.directory),
        top_k=top_k,
        temperature=temperature,
        dtype=execution.dtype,
        windows_per_shard=windows_per_shard(data.tokens, recipe.sequence),
        shards=tuple(LogitsShard(**entry) for entry in entries),
        provenance={"secateur": __version__, "versions": environment()},
    )
    if distributed.is_main():
        write_json(folder / MANIFEST, identity(manifest) | {"provenance": manifest.provenance})
    return manifest, sum(stop - start for number in missing for start, stop in shards[number])


def _spans(data: Slice) -> list[list[Span]]:
    """The windows of each shard, in the order of the corpus."""
    length, each = data.recipe.sequence, windows_per_shard(data.tokens, data.recipe.sequence)
    starts = [data.start + number * length for number in range(count_windows(data.tokens, length))]
    spans = [(start, min(start + length, data.stop)) for start in starts]
    return [spans[at : at + each] for at in range(0, len(spans), each)]


def _note(notes: Path, number: int) -> Path:
    return notes / f"{number:05}.json"


def _missing(folder: Path, notes: Path, shards: int) -> list[int]:
    """The numbers of the shards that are still to be computed, the same in all processes; damaged ones are deleted."""
    if distributed.is_main():
        for path in notes.glob("*.json"):
            entry = read_json(path)
            if not (folder / entry["file"]).is_file() or sha256_file(folder / entry["file"]) != entry["sha256"]:
                path.unlink()
    distributed.barrier()
    missing = [number for number in range(shards) if not _note(notes, number).is_file()]
    distributed.barrier()  # before any process writes one
    return missing


def _write_shards(
    folder: Path,
    notes: Path,
    shards: Sequence[Sequence[Span]],
    share: Sequence[int],
    rows: Callable[[Sequence[Span]], TopK | None],
    vocabulary: int,
    batch: int,
    label: str,
) -> None:
    """Compute and write the shards of this process's share."""
    total = sum(stop - start for number in share for start, stop in shards[number])
    with track(label, total) as progress:
        for number in share:
            parts: list[Columns] = []
            for spans in _batches(shards[number], batch):
                top = rows(spans)
                assert top is not None
                parts.append(encode(top, vocabulary))
                progress.advance(sum(stop - start for start, stop in spans))
            _write_shard(folder, notes, number, {k: np.concatenate([part[k] for part in parts]) for k in parts[0]})


def _batches(spans: Sequence[Span], size: int) -> list[list[Span]]:
    """Windows of one length at once; the last window of the slice, if it is shorter, alone."""
    whole = [span for span in spans if span[1] - span[0] == spans[0][1] - spans[0][0]]
    groups = [whole[at : at + size] for at in range(0, len(whole), size)]
    return groups + [[span] for span in spans[len(whole) :]]


def _write_shard(folder: Path, notes: Path, number: int, columns: Columns) -> None:
    """Write a shard, then the note that it is finished."""
    file, data = f"logits-{number:05}.safetensors", save(columns)
    write_bytes(folder / file, data)
    entry = {"file": file, "rows": len(columns["top"]), "bytes": len(data), "sha256": sha256_file(folder / file)}
    write_json(_note(notes, number), entry)
