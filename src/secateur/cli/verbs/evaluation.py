"""eval and compare: how good checkpoints are and what they cost, side by side; and whether a difference is one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.cli.verbs.answer import Answer
from secateur.cli.verbs.ids import protocol_of, window_length
from secateur.cli.verbs.scores import comparison_table, results_table
from secateur.comparison.items import compare_results
from secateur.data.token_files import is_token_file
from secateur.errors import UserError
from secateur.evaluation.cost import Workload, measure_cost
from secateur.evaluation.lm_eval.accuracy import check_tasks
from secateur.evaluation.lm_eval.groups import check_groups, measure_groups
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.loss import Protocol
from secateur.evaluation.results import LOSS, EvaluationResults, Measurement, check_same_protocols, items_file
from secateur.evaluation.suite import Suite, measure, text_protocols
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify
from secateur.runtime import environment, pick_device, pick_dtype

__all__ = ["compare", "evaluate"]

FEW = 1000  #: predicted tokens below which a loss says little


def evaluate(arguments: Namespace) -> Answer:
    """``secateur eval MODEL [MODEL ...]``."""
    suite = _suite(arguments)
    device = pick_device(arguments.device)
    checkpoints = [Checkpoint(model) for model in arguments.model]
    outputs = _outputs(arguments)
    listed = suite.task_list()
    given = arguments.tasks_data, arguments.task_limit, arguments.few_shot
    tasks = [Task(member.name, *given, member.changes, member.metric) for member in listed.members]
    for task in tasks:
        task.record()  # whatever is missing is told before anything is computed
    check_groups(listed.groups, tasks)
    for checkpoint in checkpoints:
        check_tasks(checkpoint, tasks)
    every = [_protocols(arguments, suite, checkpoint) for checkpoint in checkpoints]
    check_same_protocols(
        (str(checkpoint.directory), name, protocol.record())
        for checkpoint, protocols in zip(checkpoints, every, strict=True)
        for name, protocol in protocols.items()
    )
    room = [most for checkpoint in checkpoints if (most := max_positions(checkpoint.config)) is not None]
    workload = Workload().within(min(room, default=None))  # one for all, so that times may stand side by side
    found, notes, halves = [], [], []
    for checkpoint, protocols, path in zip(checkpoints, every, outputs, strict=True):
        model: Any = checkpoint.load(pick_dtype(arguments.dtype, device)).to(device)  # type: ignore[arg-type]
        about = {"device": device.partition(":")[0], "dtype": str(model.dtype).removeprefix("torch.")}
        if path is not None:
            about |= {"digest": checkpoint.digest, "environment": environment()}
        half = _Half(path, EvaluationResults(str(checkpoint.directory), about=about))
        measured = half.measurements(checkpoint, model, protocols, tasks, arguments.batch)
        measured += measure_groups(listed.groups, measured)
        cost = measure_cost(checkpoint, model, workload) if suite.cost else None
        del model  # before the next one is loaded
        found.append(EvaluationResults(str(checkpoint.directory), measured, cost, about))
        notes += _notes(arguments, checkpoint, protocols)
        halves.append(half)
    for result, path, half in zip(found, outputs, halves, strict=True):
        if path is not None and distributed.is_main():
            result.save(path)
            half.remove()
            notify(f"{result.model}: results in {path}, items in {items_file(path).name}")
    answer = {"results": [result.record() for result in found], "notes": list(dict.fromkeys(notes))}
    text = "\n".join([results_table(found), *(f"note: {note}" for note in answer["notes"])])
    return answer, text, 0


class _Half:
    """What is measured of a model so far, in a file until the command ends: one that was killed goes on from there.

    Args:
        path: where the results will lie; None where they are only printed.
        empty: of the model, with all that figures of one file have in common.
    """

    def __init__(self, path: Path | None, empty: EvaluationResults) -> None:
        self.path = path and path.with_name(f"{path.stem}.partial.json")
        self.empty = empty

    def measurements(
        self,
        checkpoint: Checkpoint,
        model: Any,
        protocols: Mapping[str, Protocol],
        tasks: Sequence[Task],
        batch: int | None,
    ) -> list[Measurement]:
        """Losses and tasks in the order in which they are asked for, those at hand not measured again."""
        prints = {name: protocol.record()["fingerprint"] for name, protocol in protocols.items()}
        prints |= {task.name: task.requests.protocol()["fingerprint"] for task in tasks}
        found = self._at_hand(prints)
        for measurement in measure(checkpoint, model, protocols, tasks, batch=batch, done=found.keys()):
            found[measurement.name] = measurement
            if self.path and distributed.is_main():
                replace(self.empty, measurements=list(found.values())).save(self.path)
        return [found[name] for name in prints]

    def _at_hand(self, prints: Mapping[str, str]) -> dict[str, Measurement]:
        try:
            before = EvaluationResults.load(self.path) if self.path else self.empty
        except UserError:  # there is none, or a kill came between its two files
            return {}
        if before.about != self.empty.about:
            return {}
        found = {m.name: m for m in before.measurements if prints.get(m.name) == m.protocol["fingerprint"]}
        if found:
            notify(f"{self.path}: {', '.join(found)} taken up from a run that did not end")
        return found

    def remove(self) -> None:
        """All results are written."""
        if self.path:
            self.path.unlink(missing_ok=True)
            items_file(self.path).unlink(missing_ok=True)


def _suite(arguments: Namespace) -> Suite:
    """What was asked for, once nothing in it contradicts itself."""
    suite = Suite.parse(arguments.suite, arguments.protocol) if arguments.suite else Suite(loss=True)
    if suite.loss and not arguments.data:
        told = "--suite paper measures the held-out loss too" if arguments.suite else "there is nothing to measure"
        raise UserError(f"--data: {told}; name held-out text, e.g. shards:DIR or text:FILE, or a --suite without it")
    for option, given, needed in (
        ("--text-data", arguments.text_data, suite.texts),
        ("--tasks-data", arguments.tasks_data, suite.tasks),
        ("--task-limit", arguments.task_limit, suite.tasks),
        ("--few-shot", arguments.few_shot, suite.tasks),
    ):
        if given is not None and not needed:
            raise UserError(f"{option}: nothing that was asked for reads it; name a --suite that does")
    if suite.cost and distributed.world_size() > 1:
        raise UserError("--suite cost: is measured in one process; run it without torchrun")
    return suite


def _protocols(arguments: Namespace, suite: Suite, checkpoint: Checkpoint) -> dict[str, Protocol]:
    """The windows of every loss, in the checkpoint's own tokens."""
    asked = {"windows": arguments.windows, "seqlen": arguments.seqlen, "stride": arguments.stride}
    found = {}
    if arguments.data:
        found[LOSS] = protocol_of(checkpoint, arguments.data, field=arguments.field, **asked)
    return found | text_protocols(checkpoint, suite.texts, data=arguments.text_data, **asked)


def _outputs(arguments: Namespace) -> list[Path | None]:
    """Where the results of each model go."""
    if arguments.out is None:
        return [None] * len(arguments.model)
    paths = [Path(arguments.out) / f"{Path(model).resolve().name}.json" for model in arguments.model]
    if len(set(paths)) < len(paths):
        raise UserError("--out: two of the models have the same name, and with it the same file; evaluate them apart")
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists; remove it, or name another --out")
    return list(paths)


def _notes(arguments: Namespace, checkpoint: Checkpoint, protocols: dict[str, Protocol]) -> list[str]:
    """Words of caution: figures of little text, and of text that may have been seen."""
    notes = [f"{name}: {protocol.note}" for name, protocol in protocols.items() if protocol.note]
    for name, protocol in protocols.items():
        if protocol.tokens < FEW:
            few = f"{protocol.tokens:,} predicted tokens are few"
            notes.append(f"{name}: {few}: the figure may be far off; measure on more text")
        elif (
            name == LOSS
            and not is_token_file(protocol.source)
            and protocol.windows[0].shape[1] < (length := window_length(checkpoint, arguments.seqlen))
        ):
            notes.append(f"the text is shorter than one window of {length:,} tokens; measure on more text")
    return notes


def compare(arguments: Namespace) -> Answer:
    """``secateur compare A[,A...] B[,B...]``."""
    a, b = (_load(side) for side in (arguments.a, arguments.b))
    found = compare_results(a, b)
    if not found:
        raise UserError(
            f"{arguments.a}, {arguments.b}: hold no measurement; run `secateur eval` with --data or --suite"
        )
    names = [[result.model for result in side] for side in (a, b)]
    answer = {"a": names[0], "b": names[1], "comparisons": [comparison.record() for comparison in found]}
    return answer, comparison_table(found, *names), 0


def _load(side: str) -> Sequence[EvaluationResults]:
    return [EvaluationResults.load(Path(name.strip())) for name in side.split(",")]
