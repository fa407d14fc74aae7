"""Run a prune request: check, estimate, score, cut and write; or cut a model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur import distributed
from secateur.calibration.block_walk import default_batch
from secateur.calibration.journal import Workspace
from secateur.config import identity as identity_of
from secateur.data.tokenizer import id_bound, load_tokenizer
from secateur.errors import UserError
from secateur.files import FINISHED_BLOCKS, check_disk, partial_directories, require_new_directory, shared_directory
from secateur.formatting import byte_size
from secateur.hub import check_token, create_repository, is_hub_name, local_checkpoint, repository_of, upload
from secateur.memory import ResourceUse, free_device_memory, free_memory, track_resources
from secateur.methods.base import LearnedMethod
from secateur.model.card import Ancestry, family_change
from secateur.model.checkpoint import Checkpoint
from secateur.model.companions import vocabulary_files
from secateur.model.live import LiveCheckpoint, cut_model
from secateur.model.plan import Plan, load_masks
from secateur.model.runtimes import Support
from secateur.model.shapes import Shape
from secateur.model.wrappers import tower_names
from secateur.progress import notify
from secateur.pruning.calibration import Calibration, read_calibration, save_tokenizer
from secateur.pruning.goals import reached
from secateur.pruning.image_samples import IMAGES, ImageSamples
from secateur.pruning.iterations import PruningStep, pruning_steps
from secateur.pruning.latency import latency_target, measure_latency, save_latency_target
from secateur.pruning.learned_job import prune_learned
from secateur.pruning.memory_estimate import MemoryEstimate, estimate_memory, with_reconstruction
from secateur.pruning.pipeline import removed_shares, runtimes_of, write_pruned
from secateur.pruning.pruner import Pruner
from secateur.pruning.reconstruction import why_not_reconstructed
from secateur.pruning.request import RESUME_LABELS, PruneRequest
from secateur.pruning.target import Target
from secateur.runtime import environment, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Pruned", "open_checkpoint", "prune_directory", "prune_model"]


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint. ``os.fspath`` gives its directory, so that it serves wherever a path does."""

    path: Path
    plan: Plan = field(repr=False)  #: kept layers, channels and heads, masks and scores; too long to print
    fingerprint: str  #: of the plan
    use: ResourceUse = field(default_factory=ResourceUse)  #: time and memory of the whole run
    runs_in: tuple[Support, ...] = ()  #: what is known of each runtime and this checkpoint
    goal: dict[str, Any] | None = None  #: parameters, memory or latency to reach, and what was reached; None without

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.plan.method

    @property
    def removed(self) -> dict[str, float]:
        """Shares removed: ``total``, ``non_embedding`` and, for masks, ``block_weights``."""
        shares = removed_shares(self.plan)
        return {key: shares[key] for key in ("total", "non_embedding", "block_weights") if key in shares}

    @property
    def shape(self) -> Shape:
        """The shape after the cut."""
        return self.plan.after

    @property
    def calibration(self) -> dict[str, Any]:
        """What the scores were computed on."""
        return self.plan.calibration

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur prune --json`` prints them."""
        goal = {"goal": self.goal} if self.goal else {}
        return {"out": str(self.path), **_report(self.plan, self.runs_in), **goal, "plan": self.fingerprint}

    @property
    def family_change(self) -> str | None:
        """A sentence about the family that it is written as; None where that is the model's own."""
        return family_change(self.plan.before, self.plan.after)


def _report(plan: Plan, runs_in: Sequence[Support]) -> dict[str, Any]:
    """What a plan asked for and reached, and where it runs, as plain values."""
    return {
        "method": plan.method,
        "asked": plan.request,
        "ratio": removed_shares(plan),
        "shape": plan.after.as_dict(),
        "family": plan.after.family.name,
        "calibration": plan.calibration,
        "summary": plan.summary,
        "runs_in": [support.record() for support in runs_in],
    }


def open_checkpoint(model: Any) -> Checkpoint:
    """Open a checkpoint directory, a Hub model or a live ``PreTrainedModel``."""
    if isinstance(model, torch.nn.Module):
        return LiveCheckpoint(model)  # type: ignore[arg-type]
    return Checkpoint(local_checkpoint(model))


def prune_model(request: PruneRequest) -> PreTrainedModel:
    """Prune in memory.

    Returns:
        The cut model, with attributes ``plan``, ``masks`` (parameter name -> bool, True where kept;
        empty unless sparse) and ``report`` (plain values, as :meth:`Pruned.record` gives them).

    Raises:
        UserError: if the request does not fit the model, or the method has to train.
    """
    if isinstance(request.prototype, LearnedMethod):
        raise UserError(f"`out`: {request.method} trains the model and needs a directory to write")
    target, *more = request.targets
    if more:
        raise UserError("`ratio`: a model in memory is cut to one ratio; name `out` for several")
    checkpoint = open_checkpoint(request.model)
    device = pick_device(request.device)
    _check_reconstruction(request, checkpoint)
    target = latency_target(checkpoint, target, request.prototype, request.method, device)
    calibration = _calibration(request, checkpoint)
    plan = Pruner(request, checkpoint, calibration, device, pick_dtype(request.dtype, device)).plan(target, Workspace())
    model: Any = cut_model(checkpoint, plan)
    if isinstance(checkpoint, LiveCheckpoint):
        model = model.to(checkpoint.model.device)
    names = tower_names(model.state_dict(), plan.after.family) if checkpoint.whole else {}
    masks = {names.get(name, name): mask for name, mask in plan.masks.items()}
    model.plan, model.masks, model.report = plan, masks, _report(plan, runtimes_of(checkpoint, plan))
    return model


def prune_directory(request: PruneRequest) -> list[Pruned]:
    """Prune into the directory ``out``, one checkpoint for each target; all processes together.

    What can fail without reading weights fails first, the cheapest first.

    Returns:
        One entry for each target; empty in all processes but the first.
    """
    check_token(request.push_to_hub)
    device = pick_device(request.device)
    if request.states == "device" and device == "cpu":
        raise UserError("`states`: device: blocks are computed on the CPU here; its memory is ram")
    out = Path(request.out)
    checkpoint = open_checkpoint(request.model)
    work = partial_directories(out)[1]
    targets = [
        latency_target(checkpoint, target, request.prototype, request.method, device, work if request.resume else None)
        for target in request.targets
    ]
    steps = _steps(request, checkpoint, targets)
    _check_reconstruction(request, checkpoint)
    require_new_directory(out)
    if out.resolve().is_relative_to(checkpoint.directory.resolve()):
        raise UserError(f"{out}: lies in the model's directory {checkpoint.directory}; name one outside it")
    if isinstance(checkpoint, LiveCheckpoint):
        checkpoint.directory = _origin_of(checkpoint)
    ancestry = Ancestry.read(checkpoint.directory, repository_of(request.model, checkpoint.directory))
    _check_tokenizer(checkpoint, request)
    if isinstance(request.prototype, LearnedMethod):
        outputs = [last.after for *_, last in steps]
        results = _results(checkpoint, *prune_learned(request, checkpoint, ancestry, targets, outputs, device))
        upload(out, request.push_to_hub)
        return results
    calibration = _calibration(request, checkpoint)
    dtype = pick_dtype(request.dtype, device)
    states = _estimate(request, checkpoint, calibration, [first.after for first, *_ in steps], device, dtype)
    identity = {
        "model": checkpoint.digest,
        "method": request.method,
        "options": dict(request.options),
        "targets": [target.record(request.prototype) for target in targets],
        "calibration": calibration.record() if calibration else None,
        **({"iterations": [request.iterations, request.iteration_schedule]} if request.iterations > 1 else {}),
        **({"reconstruct": identity_of(request.reconstruction)} if request.reconstruction else {}),
        "batch": request.batch,
        "device": device.partition(":")[0] if distributed.world_size() > 1 else device,
        "dtype": str(dtype),
        "processes": distributed.world_size(),
        "versions": environment(),
        **checkpoint.masks_identity,
    }
    if request.resume and not any(work.glob(FINISHED_BLOCKS)):
        notify(f"`resume`: there is no unfinished run in {work.parent}; this one starts from the beginning")
    create_repository(request.push_to_hub)
    directories = shared_directory(out, identity, "what to prune, and how", resume=request.resume, labels=RESUME_LABELS)
    done: list[tuple[Path, Plan, dict[str, Any]]] = []
    with track_resources(device) as use, directories as (fresh, work):
        workspace, pruner = Workspace(work, states), Pruner(request, checkpoint, calibration, device, dtype)
        if distributed.is_main():
            for target, sized in zip(request.targets, targets, strict=True):
                save_latency_target(checkpoint, target, sized, device, work)
        for target, parts in zip(targets, steps, strict=True):
            name, last = "" if len(targets) == 1 else f"ratio-{target.ratio:g}", None
            if len(parts) == 1:
                plan = pruner.plan(target, workspace)
            else:
                plan, last = pruner.plan_in_steps(target, parts, work / name, states)
            if not distributed.is_main():
                continue
            (fresh / name).mkdir(exist_ok=True)
            measured = measure_latency(checkpoint, plan, device) if _has_latency(plan) else None
            card: dict[str, Any] = {"ancestry": ancestry, "repository": request.push_to_hub, "measured": measured}
            content = write_pruned(checkpoint, plan, fresh / name, **card, last=last)
            save_tokenizer(request, fresh / name)
            done.append((out / name, plan, {**content, "goal": reached(plan, measured)}))
    upload(out, request.push_to_hub)
    return _results(checkpoint, done, use)


def _has_latency(plan: Plan) -> bool:
    return plan.request.get("goal", {}).get("kind") == "latency"


def _steps(request: PruneRequest, checkpoint: Checkpoint, targets: Sequence[Target]) -> list[tuple[PruningStep, ...]]:
    """The steps to each target; several without recovery between them get a notice."""
    how = (request.prototype, request.method, checkpoint.shape, request.iterations, request.iteration_schedule)
    steps = [pruning_steps(target, *how) for target in targets]
    if request.iterations > 1 and request.reconstruct is None:
        notify(
            "`iterations`: no recovery between the steps; each scores what the one before left. `reconstruct` tunes "
            "sparse and narrow models between them, and a study trains"
        )
    return steps


def _check_reconstruction(request: PruneRequest, checkpoint: Checkpoint) -> None:
    """Refuse to tune the blocks of a mixture, or in several processes."""
    if request.reconstruction is None:
        return
    if reason := why_not_reconstructed(request.prototype.granularity, checkpoint.shape.experts):
        raise UserError(f"`reconstruct`: not of this model: {reason}")
    if distributed.world_size() > 1:
        raise UserError("`reconstruct`: blocks are tuned in one process; start it without torchrun")


def _results(
    checkpoint: Checkpoint, done: Sequence[tuple[Path, Plan, dict[str, Any]]], use: ResourceUse
) -> list[Pruned]:
    results = []
    for path, plan, content in done:
        masks = load_masks(path) if plan.masks else {}  # the journal that the plan's masks were views of is gone
        plan = dataclasses.replace(plan, masks=masks, weights={})
        runs_in, goal = runtimes_of(checkpoint, plan), content.get("goal", reached(plan))
        results.append(Pruned(path, plan, content["fingerprint"], use, runs_in, goal))
    return results


def _origin_of(checkpoint: LiveCheckpoint) -> Path:
    """The directory that a model in memory was loaded from, with its tokenizer and licence, as far as it names one."""
    name = str(checkpoint.directory)
    if not is_hub_name(name):
        return checkpoint.directory
    try:
        return local_checkpoint(name, weights=False)
    except UserError as error:
        notify(f"{error}; the output gets no files of {name}")
        return checkpoint.directory


def _check_tokenizer(checkpoint: Checkpoint, request: PruneRequest) -> None:
    """Report a tokenizer that cannot be loaded, or that has ids without a row in the embedding."""
    files = vocabulary_files(checkpoint.directory)
    if isinstance(checkpoint, LiveCheckpoint) and request.tokenizer is None and not files:
        notify("a model in memory has no tokenizer: the output has none either, unless `tokenizer` gives one")
        return
    if files:
        try:
            tokenizer = load_tokenizer(checkpoint.directory)
        except UserError as error:
            notify(f"{error}; it is copied as it is")
            return
        bound, rows = id_bound(tokenizer), checkpoint.shape.vocabulary
        if bound > rows and not request.reads_text:  # text that is read is checked itself
            notify(
                f"{checkpoint.directory}: its tokenizer has ids up to {bound - 1}, and the embedding {rows} rows; "
                "text that uses an id without a row is refused"
            )


def _calibration(request: PruneRequest, checkpoint: Checkpoint) -> Calibration | ImageSamples | None:
    """The calibration windows; None where the method reads no text, with a notice about fields without effect."""
    if request.reads_text:
        calibration = read_calibration(request, checkpoint, request.windows)
        if request.reconstruct and isinstance(calibration, ImageSamples):
            raise UserError("`reconstruct`: blocks are tuned on text, and `calibration` holds images; name text")
        if checkpoint.whole and isinstance(calibration, Calibration):
            notify(
                "`calibration`: text alone never shows the model an image, so that what images need may score low; "
                f"{IMAGES}FILE.jsonl calibrates on images with text"
            )
        return calibration
    reason = f"{request.method} " + (f"goes by the task {request.task}" if request.task else "looks at no text")
    if request.calibration is not None:
        source = request.calibration
        name = source if isinstance(source, str) else f"a {type(source).__name__}"
        notify(f"`calibration`: {name} is not read, since {reason}")
    if request.idle_fields:
        names = ", ".join(f"`{name}`" for name in request.idle_fields)
        notify(f"{names}: without effect, since {reason}")
    return None


def _estimate(
    request: PruneRequest,
    checkpoint: Checkpoint,
    calibration: Calibration | ImageSamples | None,
    outputs: Sequence[Shape],
    device: str,
    dtype: torch.dtype,
) -> str:
    """Print the memory and disk that the run needs; choose where states lie: ``device``, ``ram`` or ``disk``.

    Raises:
        UserError: if the disk has too little room.
    """
    windows, seqlen = calibration.size if calibration else (0, 0)
    if isinstance(calibration, Calibration):
        windows = len(distributed.shard(calibration.windows, 0))
    batch = request.batch or default_batch(checkpoint.family, seqlen or 1, device)
    stored = max(checkpoint.stored_bytes, checkpoint.read_bytes)  # packed experts are written unpacked
    needs = estimate_memory(request.prototype, checkpoint.shape, windows, seqlen, batch, dtype, stored, outputs)
    if request.reconstruct:
        needs = with_reconstruction(needs, checkpoint.shape, outputs, windows, seqlen, batch, dtype)
    if request.iterations > 1:  # a model that the step before left, and one that is being written
        masks = checkpoint.shape.block_weights if request.prototype.granularity == "sparse" else 0
        needs = dataclasses.replace(needs, output=needs.output + 2 * (stored + masks))
    if isinstance(calibration, ImageSamples) and checkpoint.image_text:  # all of it at once, before the first block
        around = (checkpoint.image_text.parameters + checkpoint.shape.embedding) * dtype.itemsize
        needs = dataclasses.replace(needs, block=max(needs.block, around))
    where = _place_states(needs, device) if request.states == "auto" else request.states
    processes = distributed.world_size()
    parts = [f"{byte_size(needs.host(device, where))} of memory above the program's own"]
    if processes > 1:
        parts[0] += f" in each of {processes} processes"
    if device != "cpu":
        parts.append(f"{byte_size(needs.device(where))} on the device")
    disk = needs.disk(where, processes)
    parts.append(check_disk(Path(request.out), disk))
    states = f"; states ({byte_size(needs.states)}) {_PLACES[where]}" if windows else ""
    notify(f"estimate: {', '.join(parts)}{states}; the time shows after the first block")
    return where


_PLACES = {"device": "on the device", "ram": "in memory", "disk": "on disk"}
_SMALL = 8e9  #: bytes on a GPU; 128 windows of 2048 tokens are 2.1 GB of states of a model with 8B parameters


def _place_states(needs: MemoryEstimate, device: str) -> str:
    """On a GPU, where they are computed, if all stays small there; else in memory, or on disk where that is short."""
    if device.startswith("cuda") and needs.device("device") <= min(free_device_memory(device) / 2, _SMALL):
        return "device"
    free, local = free_memory(), distributed.local_rank()[1]
    return "disk" if free is not None and local * needs.host(device, "ram") > 0.6 * free else "ram"
