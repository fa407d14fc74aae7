"""prune: score a checkpoint, decide what to keep, and write the pruned one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.errors import UserError
from secateur.evaluate.tasks import Task
from secateur.files import atomic_directory
from secateur.methods import Method, get_method
from secateur.plan import Plan
from secateur.progress import say
from secateur.prune import Calibration, achieved, asked_words, make_plan, reads_text, task_of, write_pruned
from secateur.report.words import points, share
from secateur.runtime import pick_device
from secateur.target import Target
from secateur.verbs.answer import Answer
from secateur.verbs.ids import calibration_of

__all__ = ["prune"]


def prune(arguments: Namespace) -> Answer:
    """``secateur prune MODEL OUT``. What can fail without reading weights fails first, the cheapest first."""
    options = _options(arguments.option)
    method = get_method(arguments.method, options)
    target = Target.parse(
        ratio=arguments.ratio,
        of=arguments.of,
        shape=arguments.shape,
        pattern=arguments.pattern,
        axes=arguments.axes,
        allocation=arguments.allocation,
    )
    target.check(method, arguments.method)
    task = _task(arguments, method)
    if reads_text(method) and arguments.calibration is None:
        raise UserError(
            f"--calibration: {arguments.method} is scored on text; name a source: "
            "stdlib, text:PATH, hf:NAME[:config] or tokens:FILE.npy"
        )
    device = pick_device(arguments.device)
    checkpoint = Checkpoint(arguments.model)
    target.shape(checkpoint.shape, method, arguments.method)
    with atomic_directory(Path(arguments.out)) as work:
        calibration = _calibration(arguments, checkpoint, method)
        plan = make_plan(
            checkpoint,
            arguments.method,
            target,
            calibration,
            options=options,
            task=task,
            batch=arguments.batch,
            device=device,
        )
        content = write_pruned(checkpoint, plan, work, base=Path(arguments.model).name)
    return _answer(arguments, plan, content)


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
        return Task(task_of(method), data=arguments.tasks_data, limit=arguments.task_limit)
    for option, given in (("--tasks-data", arguments.tasks_data), ("--task-limit", arguments.task_limit)):
        if given is not None:
            raise UserError(
                f"{option}: no task is measured; it goes with --method minitron-depth --option task=winogrande"
            )
    return None


def _calibration(arguments: Namespace, checkpoint: Checkpoint, method: Method) -> Calibration | None:
    """What to score on; None where the method reads no text, which is said aloud if some was given."""
    source = arguments.calibration
    if reads_text(method):
        return calibration_of(
            checkpoint, source, field=arguments.field, windows=arguments.windows, seqlen=arguments.seqlen
        )
    if source is not None:
        reason = f"goes by the task {task_of(method)}" if task_of(method) else "looks at no text"
        say(f"--calibration {source}: is not read, since {arguments.method} {reason}")
    return None


def _answer(arguments: Namespace, plan: Plan, content: dict[str, Any]) -> Answer:
    ratio = achieved(plan)
    answer = {
        "out": str(arguments.out),
        "method": arguments.method,
        "asked": plan.asked,
        "ratio": ratio,
        "shape": content["after"],
        "calibration": plan.calibration,
        "plan": content["fingerprint"],
        "summary": plan.summary,
    }
    removed = (
        f"{share(ratio['total'])} of all parameters, {share(ratio['non_embedding'])} of those outside the embeddings"
    )
    if "block_weights" in ratio:
        removed += f", {share(ratio['block_weights'])} of the weights of the blocks' linears"
    lines = [
        f"{arguments.out}: {arguments.method}, {plan.summary['detail']}",
        f"asked        {asked_words(plan.asked)}",
        f"removed      {removed}",
    ]
    if ratio["drift"] is not None:
        lines.append(f"drift        {points(ratio['drift'])} points from the ratio asked")
    lines += [
        f"calibration  {_calibration_words(plan)}",
        f"next         secateur eval {arguments.out} --data text:FILE",
    ]
    return answer, "\n".join(lines), 0


def _calibration_words(plan: Plan) -> str:
    used = plan.calibration
    if used["source"]:
        hashed = used["hash"][:16]
        return f"{used['windows']} windows of {used['seqlen']} tokens of {used['source']}, hash {hashed}"
    if "task" in plan.summary:
        return f"none, scored by the task {plan.summary['task']['name']}"
    return "none, no text was read"
