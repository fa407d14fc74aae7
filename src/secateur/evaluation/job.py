"""Run an evaluate request: check everything, then measure model after model, resuming where a kill came between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.data.token_files import is_token_file
from secateur.data.tokenizer_match import tokenizer_hash
from secateur.errors import UserError
from secateur.evaluation.cost import measure_cost
from secateur.evaluation.lm_eval.accuracy import check_tasks
from secateur.evaluation.lm_eval.groups import TaskGroup, check_groups, measure_groups
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.loss import Protocol
from secateur.evaluation.measure import measure, text_protocols
from secateur.evaluation.names import distinct_names
from secateur.evaluation.request import EvaluateRequest
from secateur.evaluation.results import (
    LOSS,
    EvaluationResults,
    Measurement,
    check_same_protocols,
    items_file,
    served_protocol,
)
from secateur.evaluation.token_windows import heldout_protocol, window_length
from secateur.evaluation.workload import Workload
from secateur.files import require_writable
from secateur.formatting import plural
from secateur.hub import local_checkpoint
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.model.quantisation import WeightKind, require_quantiser, serve
from secateur.progress import notify
from secateur.runtime import environment, pick_device, pick_dtype

__all__ = ["ResumableResults", "evaluate"]

FEW_TOKENS = 1000  #: predicted tokens below which a loss says little


class ResumableResults:
    """The measurements of a model so far, written to a file after each one, so that a killed run can resume.

    Args:
        path: the results file; None to keep measurements in memory.
        empty: results of the model without measurements, with everything that the file's figures have in common.
        first: measurements that stand first in the file and are made by the caller.
        weights: that the model is served with; None for the stored ones.
    """

    def __init__(
        self,
        path: Path | None,
        empty: EvaluationResults,
        first: Sequence[Measurement] = (),
        weights: WeightKind | None = None,
    ) -> None:
        self.path, self.empty = path, empty
        self.weights: WeightKind | None = weights
        self.first = [self._served(measurement) for measurement in first]

    def measure(
        self,
        checkpoint: Checkpoint,
        model: Any,
        protocols: Mapping[str, Protocol],
        tasks: Sequence[Task],
        groups: Sequence[TaskGroup] = (),
        *,
        batch: int | None = None,
        of: str | None = None,
    ) -> list[Measurement]:
        """Measure losses, tasks and averages of groups in the order of the request, but those in the file already.

        Args:
            protocols: name of a loss -> its windows.
            groups: whose averages follow the tasks.
            batch: windows at once; None for what suits the device.
            of: the name that progress shows; None for the default.
        """
        records = {name: protocol.record() for name, protocol in protocols.items()}
        records |= {task.name: task.requests.protocol() for task in tasks}
        prints = {name: served_protocol(record, self.weights)["fingerprint"] for name, record in records.items()}
        measurements = self._load(prints)
        done, label = measurements.keys(), {} if of is None else {"of": of}
        self._save(list(measurements.values()))
        for measurement in measure(checkpoint, model, protocols, tasks, batch=batch, done=done, **label):
            measurements[measurement.name] = self._served(measurement)
            self._save(list(measurements.values()))
        results = [measurements[name] for name in prints]
        if groups:
            results += map(self._served, measure_groups(groups, results))
            self._save(results)
        return results

    def _served(self, measurement: Measurement) -> Measurement:
        return replace(measurement, protocol=served_protocol(measurement.protocol, self.weights))

    def _save(self, measurements: Sequence[Measurement]) -> None:
        if self.path and distributed.is_main() and (measurements or self.first):
            replace(self.empty, measurements=[*self.first, *measurements]).save(self.path)

    def _load(self, prints: Mapping[str, str]) -> dict[str, Measurement]:
        """The measurements of an earlier attempt under the same protocols."""
        try:
            results = EvaluationResults.load(self.path) if self.path else self.empty
        except UserError:  # there is none, or a kill came between its two files
            return {}
        if results.about != self.empty.about:
            return {}
        matches = {m.name: m for m in results.measurements if prints.get(m.name) == m.protocol["fingerprint"]}
        if matches:
            notify(f"{self.path}: {', '.join(matches)} taken from a run that did not end")
        return matches

    def remove(self) -> None:
        """Remove the file, once the results are written elsewhere."""
        if self.path:
            self.path.unlink(missing_ok=True)
            items_file(self.path).unlink(missing_ok=True)


def evaluate(request: EvaluateRequest) -> tuple[list[EvaluationResults], list[str]]:
    """Measure all models of a request, and write results and items where it names a folder.

    Everything that may be missing is checked before anything is computed.

    Returns:
        The results of each model, and notes of caution.

    Raises:
        UserError: if a model, text or task cannot be had, or figures of one name would be measured in different ways.
    """
    suite = request.measured
    if suite.cost and distributed.world_size() > 1:
        raise UserError("`suite`: cost is measured in one process; run it without torchrun")
    require_quantiser(request.weights)
    device = pick_device(request.device)
    checkpoints = [Checkpoint(local_checkpoint(model)) for model in request.models]
    names = request.names or distinct_names(request.models)
    if request.weights and not request.names:
        names = [f"{name}-{request.weights}" for name in names]
    outputs = _output_files(request, names)
    task_list = suite.task_list()
    data = request.tasks_data, request.task_limit, request.few_shot
    tasks = [Task(member.name, *data, member.changes, member.metric) for member in task_list.members]
    for task in tasks:
        task.record()  # reports missing data now, not after hours
    check_groups(task_list.groups, tasks)
    for checkpoint in checkpoints:
        check_tasks(checkpoint, tasks)
    protocols = [_protocols(request, checkpoint) for checkpoint in checkpoints]
    check_same_protocols(
        (str(checkpoint.directory), name, protocol.record())
        for checkpoint, by_name in zip(checkpoints, protocols, strict=True)
        for name, protocol in by_name.items()
    )
    limits = [limit for checkpoint in checkpoints if (limit := max_positions(checkpoint.config)) is not None]
    workload = Workload().within(min(limits, default=None))  # one for all models, so that times may stand side by side
    on_ids = request.data is not None and request.data.startswith(("shards:", "tokens:"))
    results, notes, partials = [], [], []
    for checkpoint, by_name, name, path in zip(checkpoints, protocols, names, outputs, strict=True):
        model: Any = checkpoint.load_language_model(pick_dtype(request.dtype, device)).to(device)  # type: ignore[arg-type]
        about: dict[str, Any] = {"device": device.partition(":")[0], "dtype": str(model.dtype).removeprefix("torch.")}
        served = serve(checkpoint, model, request.weights) if request.weights else None
        if served:
            about["served"] = served.record()
        if on_ids and (digest := tokenizer_hash(checkpoint.directory)):
            about["tokenizer"] = digest
        if path is not None:
            about |= {"digest": checkpoint.digest, "environment": environment()}
        empty = EvaluationResults(str(checkpoint.directory), about=about, name=name)
        partial = ResumableResults(path and path.with_name(f"{name}.partial.json"), empty, weights=request.weights)
        measurements = partial.measure(checkpoint, model, by_name, tasks, task_list.groups, batch=request.batch)
        cost = measure_cost(checkpoint, model, workload, served) if suite.cost else None
        del model  # before the next one is loaded
        results.append(replace(empty, measurements=measurements, cost=cost))
        notes += _notes(request, checkpoint, by_name)
        partials.append(partial)
    for result, path, partial in zip(results, outputs, partials, strict=True):
        if path is not None and distributed.is_main():
            result.save(path)
            partial.remove()
            notify(f"{result.model}: results in {path}, items in {items_file(path).name}")
    return results, list(dict.fromkeys(notes))


def _protocols(request: EvaluateRequest, checkpoint: Checkpoint) -> dict[str, Protocol]:
    """The windows of every loss, in the checkpoint's own tokens."""
    cut: dict[str, Any] = {"windows": request.windows, "seqlen": request.seqlen, "stride": request.stride}
    cut["on_bad_row"] = request.on_bad_row
    protocols = {}
    if request.data:
        fields = {"field": request.field, "format": request.format}
        protocols[LOSS] = heldout_protocol(checkpoint, request.data, **fields, **cut)
        _report_targets(protocols[LOSS])
    return protocols | text_protocols(checkpoint, request.measured.texts, data=request.text_data, **cut)


def _report_targets(protocol: Protocol) -> None:
    """Print how much of chat data the loss is on."""
    if protocol.targets:
        total = sum(part.numel() for part in protocol.windows)
        notify(
            f"{protocol.source}: the loss is on {plural(protocol.tokens, 'target')} of {plural(total, 'token')}, those "
            "of the assistant; attention stays within conversations"
        )


def _output_files(request: EvaluateRequest, names: Sequence[str]) -> list[Path | None]:
    """The results file of each model."""
    if request.out is None:
        return [None] * len(names)
    require_writable(Path(request.out))
    paths = [Path(request.out) / f"{name}.json" for name in names]
    if len(set(paths)) < len(paths):
        raise UserError("`out`: two of the models have the same name, since they are one; leave one out")
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists; remove it, or name another `out`, or another name with `names`")
    return list(paths)


def _notes(request: EvaluateRequest, checkpoint: Checkpoint, protocols: Mapping[str, Protocol]) -> list[str]:
    """Notes of caution: figures of little text, and of text that the model may have seen."""
    notes = [f"{name}: {protocol.note}" for name, protocol in protocols.items() if protocol.note]
    for name, protocol in protocols.items():
        length = window_length(checkpoint, request.seqlen)
        if protocol.tokens < FEW_TOKENS:
            few = f"measured on only {plural(protocol.tokens, 'predicted token')}"
            notes.append(f"{name}: {few}: the figure may be far off; measure on more text")
        elif name == LOSS and not is_token_file(protocol.source) and protocol.windows[0].shape[1] < length:
            notes.append(f"the text is shorter than one window of {plural(length, 'token')}; measure on more text")
    return notes
