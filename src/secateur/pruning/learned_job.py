"""Prune by a method that learns what to cut: its data, the estimate, the training, and the cut."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.config import identity
from secateur.data.domains import DomainTokens
from secateur.data.shards import TokenStore
from secateur.data.tokenizer_match import check_encoded_for
from secateur.errors import RunError, UserError
from secateur.evaluation.loss import Protocol
from secateur.evaluation.token_windows import clipped_length, open_shards, report_idle_fields, window_length
from secateur.files import check_disk, shared_directory
from secateur.formatting import byte_size, plural, scientific
from secateur.hub import create_repository
from secateur.memory import ResourceUse, track_resources
from secateur.methods.base import LearnedMethod
from secateur.model.card import Ancestry
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.progress import notify
from secateur.pruning.calibration import load_request_tokenizer, read_calibration, save_tokenizer
from secateur.pruning.cost import scoring_flops
from secateur.pruning.image_samples import ImageSamples
from secateur.pruning.learned import learn, learning_recipe, track_domain_losses
from secateur.pruning.memory_estimate import estimate_training_memory
from secateur.pruning.pipeline import write_pruned
from secateur.pruning.request import RESUME_LABELS, PruneRequest
from secateur.pruning.target import Target
from secateur.runtime import pick_batch, pick_dtype
from secateur.training.batches import Tokens, WindowTokens
from secateur.training.heldout import domain_protocols
from secateur.training.loop import RunOptions
from secateur.training.metrics import Metrics
from secateur.training.mixture import Mixture
from secateur.training.parallel import Execution
from secateur.training.recipe import Recipe
from secateur.training.throughput import Meter
from secateur.training.watchdog import StopSignal, stop_on_signals

__all__ = ["LearningData", "learn_and_cut", "learning_options", "prune_learned"]

_CHECKPOINTS = "**/checkpoints/step-*/state.json"
_HELDOUT_WINDOWS = 32  #: windows of each domain that a loss along the way is measured on


@dataclass(frozen=True)
class LearningData:
    """The tokens that gates are learned on."""

    tokens: Tokens
    ranges: Mapping[str, tuple[int, int]]  #: domain -> its tokens; of one name, the empty one, where there are none
    record: dict[str, Any]  #: what identifies it
    sequence: int  #: tokens in a window
    protocols: Mapping[str, Protocol] = field(default_factory=dict)  #: domain -> held-out windows

    @classmethod
    def of_store(cls, store: TokenStore, start: int, stop: int, sequence: int, source: str) -> LearningData:
        """Read training tokens ``start`` to ``stop`` of a corpus, domain by domain.

        Raises:
            UserError: if no domain has a whole window.
        """
        view = DomainTokens(store, "train", start, stop, sequence)
        for name, rest in view.short_domains.items():
            notify(f"domain {name!r}: not read: {plural(rest, 'token')}, less than a window of {sequence}")
        windows = sum((end - begin) // sequence for begin, end in view.ranges.values())
        record = {"source": source, "windows": windows, "seqlen": sequence, "hash": store.fingerprint}
        return cls(view, view.ranges, record, sequence, domain_protocols(store, sequence, _HELDOUT_WINDOWS))

    def mixture(self, recipe: Recipe, steps: int) -> Mixture:
        """The data of a run, from its first step."""
        return Mixture(self.tokens, self.ranges, recipe, steps)


def learn_and_cut(
    checkpoint: Checkpoint,
    name: str,
    method: LearnedMethod,
    target: Target,
    data: LearningData,
    execution: Execution,
    options: RunOptions,
    *,
    micro_batch: int,
    out: Path,
    ancestry: Ancestry | None = None,
    repository: str | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Train under gates, cut, and write the pruned model into the existing ``out``; all processes together.

    Args:
        options: checkpoints of the run, metrics, progress; the trained model lies beside their folder.
        out: an existing folder; written by the first process.
        ancestry: of the model; None for what its own files say.
        repository: where the result will be on the Hub; None if it stays on disk.

    Returns:
        The plan, and the content of plan.json (empty in all processes but the first).
    """
    recipe = learning_recipe(method, data.sequence, micro_batch)
    mixture = data.mixture(recipe, method.steps)

    def report(losses: Mapping[str, float]) -> None:
        domains = {"losses": losses, "shares": mixture.weights, "passes": mixture.passes}
        options.metrics.write({"step": mixture.step, "domains": domains})

    trained = options.folder.with_name("trained")
    if distributed.is_main():
        shutil.rmtree(trained, ignore_errors=True)
        trained.mkdir(parents=True)
    distributed.barrier()
    plan, dense = learn(
        checkpoint,
        name,
        target,
        mixture,
        method=method,
        record=data.record,
        execution=execution,
        options=options,
        measure=track_domain_losses(mixture, data.protocols, micro_batch, report),
        out=trained,
    )
    options.metrics.close()
    if len(data.ranges) > 1:
        plan.summary["domains"] = {"shares": mixture.weights, "passes": mixture.passes}
    if not distributed.is_main():
        return plan, {}
    ancestry = ancestry or Ancestry.read(checkpoint.directory)
    return plan, write_pruned(dense, plan, out, ancestry=ancestry, repository=repository)


def learning_options(
    method: LearnedMethod, folder: Path, label: str, device: str, stop: StopSignal, **extra: Any
) -> RunOptions:
    """Options of a run that learns gates: ten checkpoints along the way."""
    background = device.startswith("cuda")
    return RunOptions(
        folder=folder, label=label, save_every=max(1, method.steps // 10), background=background, stop=stop, **extra
    )


def prune_learned(
    request: PruneRequest,
    checkpoint: Checkpoint,
    ancestry: Ancestry,
    targets: Sequence[Target],
    outputs: Sequence[Shape],
    device: str,
) -> tuple[list[tuple[Path, Plan, dict[str, Any]]], ResourceUse]:
    """Learn, cut and write one model for each target.

    Returns:
        Directory, plan and content of plan.json of each, empty in all processes but the first; and the resources used.

    Raises:
        UserError: if the data does not fit, or the model has no shape for a target.
        RunError: if the gates did not come near the target, or training ended early.
    """
    out, method = Path(request.out), request.prototype
    dtype = str(pick_dtype(request.dtype, device)).removeprefix("torch.")
    execution = Execution(device, "bfloat16" if dtype == "bfloat16" else "float32")
    data = _learning_data(request, checkpoint)
    micro_batch = request.batch or pick_batch(data.sequence, device)
    recipe = learning_recipe(method, data.sequence, micro_batch)
    data.mixture(recipe, method.steps)  # refuses data without a whole window
    _estimate(request, checkpoint, data, recipe, outputs, execution)
    run_identity = {
        "model": checkpoint.digest,
        "method": request.method,
        "options": identity(method),
        "targets": [target.record(method) for target in targets],
        "calibration": data.record,
        "dtype": dtype,
        **checkpoint.masks_identity,
    }
    create_repository(request.push_to_hub)
    directories = shared_directory(
        out,
        run_identity,
        "what to prune, and how",
        resume=request.resume,
        progress_files=_CHECKPOINTS,
        labels=RESUME_LABELS,
    )
    done: list[tuple[Path, Plan, dict[str, Any]]] = []
    with stop_on_signals() as stop, track_resources(device) as use, directories as (fresh, work):
        for target, after in zip(targets, outputs, strict=True):
            name = "" if len(targets) == 1 else f"ratio-{target.ratio:g}"
            tokens = method.tokens(data.sequence)
            flops = scoring_flops(checkpoint.shape, after, method, tokens, data.sequence)
            metrics = work / name / "metrics.jsonl"
            options = learning_options(
                method,
                work / name / "checkpoints",
                f"learn {name or out.name}",
                device,
                stop,
                metrics=Metrics(metrics if distributed.is_main() else None),
                meter=Meter(flops / tokens),
                resuming="run the same command with `resume` to go on",
            )
            if distributed.is_main():
                (fresh / name).mkdir(exist_ok=True)
            try:
                plan, content = learn_and_cut(
                    checkpoint,
                    request.method,
                    method,
                    target,
                    data,
                    execution,
                    options,
                    micro_batch=micro_batch,
                    out=fresh / name,
                    ancestry=ancestry,
                    repository=request.push_to_hub,
                )
            except UserError as error:  # such as shards that are damaged further on: finished steps stay
                raise RunError(str(error), 2) from None
            if distributed.is_main():
                save_tokenizer(request, fresh / name)
                shutil.move(metrics, fresh / name)
                done.append((out / name, plan, content))
    return done, use


def _learning_data(request: PruneRequest, checkpoint: Checkpoint) -> LearningData:
    """Read the text to train on: shards, by domain, or windows as other methods are calibrated on.

    Raises:
        UserError: if it cannot be read or does not fit the model.
    """
    source, sequence = request.calibration, window_length(checkpoint, request.seqlen)
    windows = request.windows or request.prototype.steps * request.prototype.windows
    if not isinstance(source, str) or not source.startswith("shards:"):
        calibration = read_calibration(request, checkpoint, windows)
        if isinstance(calibration, ImageSamples):
            raise UserError(f"`calibration`: {request.method} trains on text alone; name a source of text")
        tokens = WindowTokens(calibration.windows)
        return LearningData(tokens, {"": (0, tokens.tokens)}, calibration.record(), calibration.windows.shape[1])
    report_idle_fields(source, **{name: getattr(request, name) for name in ("field", "format", "on_bad_row")})
    store = open_shards(source, "calibration", checkpoint.shape.vocabulary)
    tokenizer = load_request_tokenizer(request) or checkpoint.directory
    check_encoded_for(tokenizer, store.tokenizer, source, "`calibration`", name=str(checkpoint.directory))
    clipped_length(checkpoint, request.seqlen)
    stop = min(windows * sequence, store.tokens("train"))
    data = LearningData.of_store(store, 0, stop, sequence, source)
    data.record["tokens"] = stop
    return data


def _estimate(
    request: PruneRequest,
    checkpoint: Checkpoint,
    data: LearningData,
    recipe: Recipe,
    outputs: Sequence[Shape],
    execution: Execution,
) -> None:
    """Print what the run needs, and which field has no effect.

    Raises:
        UserError: if the disk has too little room.
    """
    method = request.prototype
    if request.states != "auto":
        notify(f"`states`: without effect, since {request.method} trains the whole model and keeps no states")
    tokens, shape, processes = method.tokens(data.sequence), checkpoint.shape, distributed.world_size()
    memory, disk = estimate_training_memory(shape, outputs, recipe, trained=method.rate > 0, dtype=execution.dtype)
    room = check_disk(Path(request.out), disk + checkpoint.stored_bytes)
    passes = tokens / (data.record["windows"] * data.sequence)
    flops = scoring_flops(shape, outputs[0], method, tokens, data.sequence)
    repeats = f", the text read {passes:.1f} times" if passes > 1.05 else ""
    notify(
        f"estimate: {plural(tokens, 'token')} in {plural(method.steps, 'step')}{repeats}, {scientific(flops)} FLOPs"
        + (" for each ratio" if len(outputs) > 1 else "")
        + f"; {byte_size(memory / processes)} of memory above the program's own"
        + (f" in each of {processes} processes" if processes > 1 else "")
        + f", {room}"
    )
