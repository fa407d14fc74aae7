"""prune: score a checkpoint, decide what to keep, and write the pruned one."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secateur import distributed
from secateur.calibration.journal import Workspace
from secateur.cli.verbs.answer import Answer
from secateur.cli.verbs.directories import shared_directory
from secateur.cli.verbs.ids import calibration_of
from secateur.cli.verbs.learning import prune_learned
from secateur.data.tokenizer import check_vocabulary, load_tokenizer
from secateur.errors import UserError
from secateur.evaluation.lm_eval.tasks import Task
from secateur.files import BLOCKS, check_free, partial_directories
from secateur.formatting import byte_size, percent, points
from secateur.memory import ResourceUse, free_device_memory, free_memory, track_resources
from secateur.methods.base import LearnedMethod, Method
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.progress import clock_time, notify
from secateur.pruning.memory_estimate import MemoryEstimate, estimate_memory
from secateur.pruning.pipeline import (
    Calibration,
    describe_target,
    make_plan,
    reads_text,
    removed_shares,
    task_of,
    write_pruned,
)
from secateur.pruning.target import Target
from secateur.runtime import environment, pick_batch, pick_device, pick_dtype

__all__ = ["prune"]


def prune(arguments: Namespace) -> Answer:
    """``secateur prune MODEL OUT``. What can fail without reading weights fails first, the cheapest first."""
    options = _options(arguments.options)
    method = get_method(arguments.method, options)
    targets = _targets(arguments)
    for target in targets:
        target.check(method, arguments.method)
    task = _task(arguments, method)
    if reads_text(method) and arguments.calibration is None:
        raise UserError(
            f"--calibration: {arguments.method} is scored on text; name a source: "
            "stdlib, python, text:PATH, hf:NAME[:config] or tokens:FILE.npy"
        )
    device = pick_device(arguments.device)
    if arguments.states == "device" and device == "cpu":
        raise UserError("--states device: blocks are computed on the CPU here; its memory is --states ram")
    out = Path(arguments.out)
    checkpoint = Checkpoint(arguments.model)
    outputs = [target.shape(checkpoint.shape, method, arguments.method) for target in targets]
    check_free(out)
    if out.resolve().is_relative_to(checkpoint.directory.resolve()):
        raise UserError(f"{out}: lies in the model's directory {arguments.model}; name one outside it")
    _check_tokenizer(checkpoint)
    if isinstance(method, LearnedMethod):
        return _answer(arguments, *prune_learned(arguments, checkpoint, method, targets, outputs, device))
    calibration = _calibration(arguments, checkpoint, method)
    dtype = pick_dtype(arguments.dtype, device)
    states = _announce(arguments, checkpoint, method, calibration, outputs, device, dtype)
    asked = {
        "model": checkpoint.digest,
        "method": arguments.method,
        "options": options,
        "targets": [target.record(method) for target in targets],
        "calibration": calibration.record() if calibration else None,
        "batch": arguments.batch,
        "device": device.partition(":")[0] if distributed.world_size() > 1 else device,
        "dtype": str(dtype),
        "processes": distributed.world_size(),
        "versions": environment(),
    }
    work = partial_directories(out)[1]
    if arguments.resume and not any(work.glob(BLOCKS)):
        notify(f"--resume: there is no unfinished run in {work.parent}; this one starts from the beginning")
    directories = shared_directory(out, asked, "what to prune, and how", resume=arguments.resume, words=_WORDS)
    with track_resources(device) as use, directories as (fresh, work):
        workspace = Workspace(work, states)
        done: list[tuple[Path, Plan, dict[str, Any]]] = []
        for target in targets:
            plan = make_plan(
                checkpoint,
                arguments.method,
                target,
                calibration,
                options=options,
                task=task,
                batch=arguments.batch,
                device=device,
                dtype=dtype,
                workspace=workspace,
            )
            if not distributed.is_main():
                continue
            name = "" if len(targets) == 1 else f"ratio-{target.ratio:g}"
            (fresh / name).mkdir(exist_ok=True)
            content = write_pruned(checkpoint, plan, fresh / name, base=Path(arguments.model).name)
            done.append((out / name, plan, content))
    return _answer(arguments, done, use)


#: what an unfinished run was asked for, as the command line has it
_WORDS = {
    "model": "another MODEL",
    "method": "--method",
    "options": "--option",
    "targets": "--ratio, --shape, --pattern or what goes with them",
    "calibration": "--calibration, --windows or --seqlen",
    "batch": "--batch",
    "device": "--device",
    "dtype": "--dtype",
    "processes": "another number of processes",
    "versions": "other versions of Python's packages",
}


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows, even where it is only copied."""
    if any((checkpoint.directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        try:
            tokenizer = load_tokenizer(checkpoint.directory)
        except UserError as error:
            notify(f"{error}; it is copied as it is")
            return
        check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))


def _targets(arguments: Namespace) -> list[Target]:
    """What pruning should come to; several ratios give one each."""
    return [
        Target.parse(
            ratio=ratio,
            of=arguments.of,
            shape=arguments.shape,
            pattern=arguments.pattern,
            axes=arguments.axes,
            allocation=arguments.allocation,
        )
        for ratio in arguments.ratio or [None]
    ]


def _announce(
    arguments: Namespace,
    checkpoint: Checkpoint,
    method: Method,
    calibration: Calibration | None,
    outputs: Sequence[Shape],
    device: str,
    dtype: torch.dtype,
) -> str:
    """Say what the run will need; decide where states lie: ``device``, ``ram`` or ``disk``.

    Raises:
        UserError: if the disk has not that much room.
    """
    windows, seqlen = distributed.shard(calibration.windows, 0).shape if calibration else (0, 0)
    needs = estimate_memory(
        method,
        checkpoint.shape,
        windows,
        seqlen,
        arguments.batch or pick_batch(seqlen or 1, device),
        dtype,
        checkpoint.stored_bytes,
        outputs,
    )
    where = _place_of_states(needs, device) if arguments.states == "auto" else arguments.states
    parent = next(folder for folder in Path(arguments.out).absolute().parents if folder.exists())
    room, disk = shutil.disk_usage(parent).free, needs.disk(where, distributed.world_size())
    said = [f"{byte_size(needs.host(device, where))} of memory above the program's own"]
    if distributed.world_size() > 1:
        said[0] += f" in each of {distributed.world_size()} processes"
    if device != "cpu":
        said.append(f"{byte_size(needs.device(where))} on the device")
    said.append(f"{byte_size(disk)} of disk (free: {byte_size(room)})")
    states = f"; states ({byte_size(needs.states)}) {_PLACES[where]}" if windows else ""
    notify(f"estimate: {', '.join(said)}{states}; the time shows after the first block")
    if disk > room:
        raise UserError(
            f"{arguments.out}: needs about {byte_size(disk)} of disk, and {byte_size(room)} are free; write elsewhere"
        )
    return where


_PLACES = {"device": "on the device", "ram": "in memory", "disk": "on disk"}
_SMALL = 8e9  #: bytes on a GPU; 128 windows of 2048 tokens are 2.1 GB of states of a model with 8B parameters


def _place_of_states(needs: MemoryEstimate, device: str) -> str:
    """On a GPU, where they are computed, if all stays small there; else in memory, or on disk where that is short."""
    if device.startswith("cuda") and needs.device("device") <= min(free_device_memory(device) / 2, _SMALL):
        return "device"
    free, here = free_memory(), distributed.local_rank()[1]
    return "disk" if free is not None and here * needs.host(device, "ram") > 0.6 * free else "ram"


def _options(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``--option key=value``, given any number of times."""
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"--option {pair}: is not KEY=VALUE, as in --option task=winogrande")
        if key in options:
            raise UserError(f"--option {key}: is given twice")
        options[key] = value
    return options


def _task(arguments: Namespace, method: Method) -> Task | None:
    """The task that the method goes by, with where its data lies; None for methods that go by none."""
    if task_of(method):
        return Task(task_of(method), data=arguments.tasks_data, limit=arguments.task_limit, few_shot=0)
    for option, given in (("--tasks-data", arguments.tasks_data), ("--task-limit", arguments.task_limit)):
        if given is not None:
            raise UserError(
                f"{option}: no task is measured; it goes with --method minitron-depth --option task=winogrande"
            )
    return None


def _calibration(arguments: Namespace, checkpoint: Checkpoint, method: Method) -> Calibration | None:
    """What to score on; None where the method reads no text, which is said aloud if any was given."""
    source = arguments.calibration
    if reads_text(method):
        return calibration_of(
            checkpoint, source, field=arguments.field, windows=arguments.windows, seqlen=arguments.seqlen
        )
    reason = f"{arguments.method} " + (f"goes by the task {task_of(method)}" if task_of(method) else "looks at no text")
    if source is not None:
        notify(f"--calibration {source}: is not read, since {reason}")
    given = {"--states": arguments.states != "auto", "--dtype": arguments.dtype != "auto"}
    if not task_of(method):
        given["--batch"] = arguments.batch
    if source is None:  # else they go with it
        given |= {"--windows": arguments.windows, "--seqlen": arguments.seqlen, "--field": arguments.field}
    if unused := [option for option, is_given in given.items() if is_given]:
        notify(f"{', '.join(unused)}: without effect, since {reason}")
    return None


def _answer(arguments: Namespace, done: Sequence[tuple[Path, Plan, dict[str, Any]]], use: ResourceUse) -> Answer:
    if not distributed.is_main():
        return {}, "", 0
    told = [_told(arguments, *one) for one in done]
    used = {"seconds": use.seconds, "memory": use.memory, "device": use.device, "processes": distributed.world_size()}
    answer = {**told[0][0], "used": used}
    if len(told) > 1:
        answer = {"out": str(arguments.out), "outputs": [one for one, _ in told], "used": used}
    said = f"{clock_time(use.seconds)}" + (
        f", at most {byte_size(use.memory)} of memory" if use.memory is not None else ""
    )
    said += f", {byte_size(use.device)} on the device" if use.device is not None else ""
    said += f" (the first of {distributed.world_size()} processes)" if distributed.world_size() > 1 else ""
    lines = [line for _, lines in told for line in [*lines, ""]]
    lines[-1] = f"used         {said}"
    lines.append(f"next         secateur eval {done[0][0]} --data text:FILE")
    return answer, "\n".join(lines), 0


def _told(arguments: Namespace, out: Path, plan: Plan, content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """One output, for programs and for people."""
    ratio = removed_shares(plan)
    answer = {
        "out": str(out),
        "method": arguments.method,
        "asked": plan.asked,
        "ratio": ratio,
        "shape": content["after"],
        "calibration": plan.calibration,
        "plan": content["fingerprint"],
        "summary": plan.summary,
    }
    outside = percent(ratio["non_embedding"])
    removed = f"{percent(ratio['total'])} of all parameters, {outside} of those outside the embeddings"
    if "block_weights" in ratio:
        removed += f", {percent(ratio['block_weights'])} of the weights of the blocks' linears"
    lines = [
        f"{out}: {arguments.method}, {plan.summary['detail']}",
        f"asked        {describe_target(plan.asked)}",
        f"removed      {removed}",
    ]
    if ratio["drift"] is not None:
        lines.append(f"drift        {points(ratio['drift'])} points from the ratio asked")
    return answer, [*lines, f"calibration  {_calibration_words(plan)}"]


def _calibration_words(plan: Plan) -> str:
    used = plan.calibration
    if used["source"]:
        hashed = used["hash"][:16]
        return f"{used['windows']} windows of {used['seqlen']} tokens of {used['source']}, hash {hashed}"
    if "task" in plan.summary:
        return f"none, scored by the task {plan.summary['task']['name']}"
    return "none, no text was read"
