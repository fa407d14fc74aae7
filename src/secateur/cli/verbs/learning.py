"""prune, with a method that learns what to cut: data, estimate, training, and the cut."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.cli.verbs.directories import shared_directory
from secateur.cli.verbs.ids import calibration_of, window_length
from secateur.config import identity
from secateur.data.domains import ByDomain
from secateur.data.shards import TokenStore
from secateur.errors import RunError, UserError
from secateur.evaluation.loss import Protocol
from secateur.formatting import byte_size, scientific
from secateur.memory import ResourceUse, track_resources
from secateur.methods.base import LearnedMethod
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.progress import notify
from secateur.pruning.learned import learn, learning_recipe, track_domain_losses
from secateur.pruning.memory_estimate import estimate_training_memory
from secateur.pruning.pipeline import scoring_flops, write_pruned
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
from secateur.training.watchdog import stop_on_signals

__all__ = ["prune_learned"]

_BEGUN = "**/checkpoints/step-*/state.json"
_HELD_OUT = 32  #: windows of each domain that a loss along the way is measured on


@dataclass
class Lesson:
    """What is trained on."""

    tokens: Tokens
    ranges: Mapping[str, tuple[int, int]]  #: domain -> its tokens; of one name, the empty one, where there are none
    record: dict[str, Any]  #: what identifies it
    sequence: int
    protocols: Mapping[str, Protocol] = field(default_factory=dict)  #: domain -> held-out windows

    def mixture(self, recipe: Recipe, steps: int) -> Mixture:
        """It, from the beginning."""
        return Mixture(self.tokens, self.ranges, recipe, steps)


def prune_learned(
    arguments: Namespace,
    checkpoint: Checkpoint,
    method: LearnedMethod,
    targets: Sequence[Target],
    outputs: Sequence[Shape],
    device: str,
) -> tuple[list[tuple[Path, Plan, dict[str, Any]]], ResourceUse]:
    """Learn, cut and write one model for each target.

    Returns:
        Directory, plan and content of plan.json of each, none but in the first process; and what it took.

    Raises:
        UserError: on data that does not fit, or a target that the model has no shape for.
        RunError: if the gates did not come near the target, or training ended early.
    """
    out = Path(arguments.out)
    dtype = str(pick_dtype(arguments.dtype, device)).removeprefix("torch.")
    execution = Execution(device, "bfloat16" if dtype == "bfloat16" else "float32")
    lesson = _lesson(arguments, checkpoint, method)
    recipe = learning_recipe(method, lesson.sequence, arguments.batch or pick_batch(lesson.sequence, device))
    lesson.mixture(recipe, method.steps)  # which refuses what has no whole window
    _announce(arguments, checkpoint, method, lesson, recipe, outputs, execution)
    asked = {
        "model": checkpoint.digest,
        "method": arguments.method,
        "options": identity(method),
        "targets": [target.record(method) for target in targets],
        "calibration": lesson.record,
        "dtype": dtype,
    }
    directories = shared_directory(
        out, asked, "what to prune, and how", resume=arguments.resume, begun=_BEGUN, words=_WORDS
    )
    done: list[tuple[Path, Plan, dict[str, Any]]] = []
    with stop_on_signals() as stop, track_resources(device) as use, directories as (fresh, work):
        for target, after in zip(targets, outputs, strict=True):
            name = "" if len(targets) == 1 else f"ratio-{target.ratio:g}"
            flops = scoring_flops(checkpoint.shape, after, method, method.tokens(lesson.sequence), lesson.sequence)
            house = RunOptions(
                folder=work / name / "checkpoints",
                label=f"learn {name or out.name}",
                save_every=max(1, method.steps // 10),
                behind=device.startswith("cuda"),
                metrics=Metrics(work / name / "metrics.jsonl" if distributed.is_main() else None),
                meter=Meter(flops / method.tokens(lesson.sequence)),
                stop=stop,
            )
            plan, trained = _learn(arguments, checkpoint, method, target, lesson, recipe, execution, house)
            if distributed.is_main():
                (fresh / name).mkdir(exist_ok=True)
                content = write_pruned(trained, plan, fresh / name, base=Path(arguments.model).name)
                shutil.move(work / name / "metrics.jsonl", fresh / name)
                done.append((out / name, plan, content))
    return done, use


#: what an unfinished run was asked for, as the command line has it
_WORDS = {
    "model": "another MODEL",
    "method": "--method",
    "options": "--option",
    "targets": "--ratio, --shape or what goes with them",
    "calibration": "--calibration, --windows or --seqlen",
    "dtype": "--dtype",
}


def _learn(
    arguments: Namespace,
    checkpoint: Checkpoint,
    method: LearnedMethod,
    target: Target,
    lesson: Lesson,
    recipe: Recipe,
    execution: Execution,
    house: RunOptions,
) -> tuple[Plan, Checkpoint]:
    """One target's training."""
    mixture = lesson.mixture(recipe, method.steps)

    def tell(losses: Mapping[str, float]) -> None:
        told = {"losses": losses, "shares": mixture.weights, "passes": mixture.passes}
        house.metrics.write({"step": mixture.step, "domains": told})

    measure = track_domain_losses(mixture, lesson.protocols, recipe.micro_batch, tell)
    trained = house.folder.with_name("trained")
    if distributed.is_main():
        shutil.rmtree(trained, ignore_errors=True)
        trained.mkdir(parents=True)
    try:
        plan, dense = learn(
            checkpoint,
            arguments.method,
            target,
            mixture,
            method=method,
            record=lesson.record,
            execution=execution,
            house=house,
            measure=measure,
            out=trained,
        )
    except UserError as error:  # such as shards that are damaged further on: what has been done stays
        raise RunError(str(error), 2) from None
    house.metrics.close()
    if len(lesson.ranges) > 1:
        plan.summary["domains"] = {"shares": mixture.weights, "passes": mixture.passes}
    return plan, dense


def _lesson(arguments: Namespace, checkpoint: Checkpoint, method: LearnedMethod) -> Lesson:
    """The text to train on: shards, by domain, or windows as other methods are calibrated on.

    Raises:
        UserError: if it cannot be read or does not fit the model.
    """
    source, sequence = arguments.calibration, window_length(checkpoint, arguments.seqlen)
    windows = arguments.windows or method.steps * method.windows
    if not source.startswith("shards:"):
        found = calibration_of(checkpoint, source, field=arguments.field, windows=windows, seqlen=arguments.seqlen)
        tokens = WindowTokens(found.windows)
        return Lesson(tokens, {"": (0, tokens.tokens)}, found.record(), found.windows.shape[1])
    store = TokenStore(Path(source.removeprefix("shards:")))
    if store.vocabulary > checkpoint.shape.vocabulary:
        raise UserError(
            f"--calibration {source}: has ids up to {store.vocabulary - 1}, but the model's vocabulary is "
            f"{checkpoint.shape.vocabulary}; build the data with the model's tokenizer"
        )
    stop = min(windows * sequence, store.tokens("train"))
    view = ByDomain(store, "train", 0, stop, sequence)
    for name, left in view.left_out.items():
        notify(f"domain {name!r}: its {left} tokens are less than a window of {sequence}, and are not read")
    count = sum((end - start) // sequence for start, end in view.ranges.values())
    record = {"source": source, "windows": count, "seqlen": sequence, "tokens": stop, "hash": store.fingerprint}
    return Lesson(view, view.ranges, record, sequence, domain_protocols(store, sequence, _HELD_OUT))


def _announce(
    arguments: Namespace,
    checkpoint: Checkpoint,
    method: LearnedMethod,
    lesson: Lesson,
    recipe: Recipe,
    outputs: Sequence[Shape],
    execution: Execution,
) -> None:
    """Say what the run will need, and what of the command line does nothing here.

    Raises:
        UserError: if the disk has not that much room.
    """
    if arguments.states != "auto":
        notify(f"--states: without effect, since {arguments.method} trains the whole model and keeps no states")
    tokens, shape = method.tokens(lesson.sequence), checkpoint.shape
    if limit := max_positions(checkpoint.config):
        assert lesson.sequence <= limit
    memory, disk = estimate_training_memory(shape, outputs, recipe, trained=method.rate > 0, dtype=execution.dtype)
    disk += checkpoint.stored_bytes
    parent = next(folder for folder in Path(arguments.out).absolute().parents if folder.exists())
    room = shutil.disk_usage(parent).free
    passes = tokens / (lesson.record["windows"] * lesson.sequence)
    flops = scoring_flops(shape, outputs[0], method, tokens, lesson.sequence)
    again = f", the text read {passes:.1f} times" if passes > 1.05 else ""
    notify(
        f"estimate: {tokens:,} tokens in {method.steps} steps{again}, {scientific(flops)} FLOPs"
        + (" for each ratio" if len(outputs) > 1 else "")
        + f"; {byte_size(memory / distributed.world_size())} of memory above the program's own"
        + (f" in each of {distributed.world_size()} processes" if distributed.world_size() > 1 else "")
        + f", {byte_size(disk)} of disk (free: {byte_size(room)})"
    )
    if disk > room:
        raise UserError(
            f"{arguments.out}: needs about {byte_size(disk)} of disk, and {byte_size(room)} are free; write elsewhere"
        )
