"""What to prune, and how: the request that Python, the command line and studies share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.config import AnyPath, Positive, load_yaml, spec
from secateur.data.conversations import RowFormat
from secateur.data.documents import OnBadRow
from secateur.errors import UserError
from secateur.hub import check_repository
from secateur.model.goal import Goal
from secateur.pruning.cost import reads_text, task_of
from secateur.pruning.iterations import IterationSchedule
from secateur.pruning.reconstruction import Reconstruction, why_not_reconstructed
from secateur.pruning.target import Allocation, Target

__all__ = ["RESUME_LABELS", "PruneRequest"]

#: fields of text windows, which a method that reads no text ignores
_TEXT_FIELDS = ("windows", "seqlen", "field", "format", "on_bad_row")

#: fields of a request by the keys that identify an unfinished run
RESUME_LABELS = {
    "model": "another `model`",
    "masks": "the masks of `model`",
    "method": "`method`",
    "options": "`options`",
    "targets": "`ratio`, `shape`, `pattern`, `ratios_by_layer`, another goal or what goes with them",
    "iterations": "`iterations` or `iteration_schedule`",
    "reconstruct": "`reconstruct` or `reconstruct_rate`",
    "calibration": "`calibration`, `windows` or `seqlen`",
    "batch": "`batch`",
    "device": "`device`",
    "dtype": "`dtype`",
    "processes": "another number of processes",
    "versions": "other versions of Python's packages",
}


@spec
class PruneRequest:
    """A pruning: which model, by which method, how far, scored on what, computed where.

    Attributes:
        model: a checkpoint directory, a Hub name (``org/name[@revision]``) or a ``PreTrainedModel``.
        method: a name from the registry.
        out: new directory to write; None to cut in memory.
        ratio: share to remove, or several, which give one checkpoint each below ``out``.
        of: parameters that the ratio counts, ``total`` or ``non-embedding``; None for the latter.
        shape: sizes to reach instead of a ratio: ``"hidden=3072,ffn=9216"`` or a mapping.
        pattern: ``"N:M"`` zeros for sparse methods.
        axes: spaces that a width method narrows: ``"kv,ffn"`` or a sequence.
        allocation: ``uniform``: every layer keeps as many channels or zeros; ``global``: layers compete; for sparse
            methods also ``owl``, ``alpha`` and ``evolve``.
        ratios_by_layer: share of zeros of each layer, for sparse methods, instead of a ratio: a list, or a JSON or YAML
            file that holds one.
        step: multiple that hidden and FFN sizes are rounded to; None for the default steps.
        keep_pattern: depth methods keep the period of the layer kinds that other runtimes take from a constant; None
            for yes, where the family has one and the model follows it.
        propagate: methods that remove experts: a block is scored on what the blocks before it put out as they are
            (``unpruned``), or with their kept experts alone (``pruned``).
        iterations: steps in which the model is pruned; ``reconstruct`` is divided among them.
        iteration_schedule: how the share removed grows from step to step: ``linear``, or ``cubic``, fast at first.
        params: all parameters to reach, e.g. ``"4B"``, instead of a ratio.
        active_params: parameters of a mixture that a token uses, likewise.
        memory: bytes to serve the model in, never exceeded: ``"8GiB"``; weights, KV cache and activations.
        latency: share of the model's own latency to reach, measured on ``device``: ``"0.7x"``.
        context: tokens of a sequence, for ``memory`` (None: 2048, or the model's positions if less) and ``latency``
            (None: 512, likewise).
        sequences: sequences served at once, for both; None for 1.
        weights: type of the stored weights, for both: bf16, float32, int8 or int4; None for bf16, and for a latency the
            type that the device computes in.
        latency_of: ``decode`` (also for None) or ``prefill``.
        reconstruct: steps of AdamW that tune each part of a pruned block to the dense block's output; None for none.
        reconstruct_rate: their peak learning rate, as a share of the root mean square of a tensor's weights; None for
            0.02.
        options: options of the method.
        calibration: a source of text (``text:PATH``, ``hf:NAME``, ``tokens:FILE.npy`` ...), ids [windows, positions],
            or an iterable of texts; for image-text models also ``images:FILE.jsonl``, or a list of what the processor
            returns for each conversation.
        tokenizer: for texts; None for the model's own.
        field: the field of the text, or of the messages, where records have fields; None for ``text`` or ``messages``.
        format: of the records: ``text`` (also for None), or ``messages`` or ``prompt-completion``, which go through the
            chat template.
        on_bad_row: what becomes of a record that is malformed or not text: ``error`` (also for None) or ``skip``.
        windows: calibration windows, at most.
        seqlen: tokens in a window.
        tasks_data: folder of the data of the task that minitron-depth measures.
        task_limit: examples of that task, at most.
        device: ``auto``, ``cpu`` or ``cuda``.
        batch: windows at once; None for what suits the device.
        dtype: of the forward passes.
        states: where hidden states between blocks lie.
        resume: continue a run that was interrupted.
        push_to_hub: repository of the Hugging Face Hub, ``ORG/NAME``, that the output is uploaded to.

    Raises:
        UserError: if a field is out of range, or fields contradict each other or the method.
    """

    model: Any
    method: str
    out: AnyPath = None
    ratio: Any = None  # checked by Target
    of: Literal["total", "non-embedding"] | None = None
    shape: str | Mapping[str, int] | None = None
    pattern: str | None = None
    axes: str | tuple[str, ...] | None = None
    allocation: Allocation = "uniform"
    ratios_by_layer: Any = None
    step: Positive | None = None
    keep_pattern: bool | None = None
    propagate: Literal["unpruned", "pruned"] = "unpruned"
    iterations: Positive = 1
    iteration_schedule: IterationSchedule = "linear"
    params: Any = None  # read by Goal, as the next three
    active_params: Any = None
    memory: Any = None
    latency: Any = None
    context: Positive | None = None
    sequences: Positive | None = None
    weights: str | None = None
    latency_of: str | None = None
    reconstruct: Positive | None = None
    reconstruct_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Any = None
    tokenizer: Any = None
    field: str | None = None
    format: RowFormat | None = None
    on_bad_row: OnBadRow | None = None
    windows: Positive | None = None
    seqlen: Positive | None = None
    tasks_data: str | None = None
    task_limit: Positive | None = None
    device: str = "auto"
    batch: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    states: Literal["auto", "device", "ram", "disk"] = "auto"
    resume: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        check_repository(self.push_to_hub)
        if self.push_to_hub is not None and (self.out is None or len(self.targets) > 1):
            reason = "a model in memory is not uploaded; name `out`" if self.out is None else "goes with one `ratio`"
            raise UserError(f"`push_to_hub`: {reason}")
        for target in self.targets:
            target.check(self.prototype, self.method)
        if self.context is not None and self.memory is None and self.latency is None:
            raise UserError("`context`: goes with `memory` or `latency`; leave it out")
        if self.reconstruct is None and self.reconstruct_rate is not None:
            raise UserError("`reconstruct_rate`: no block is tuned; give the steps with `reconstruct`")
        if self.reconstruct and (reason := why_not_reconstructed(self.prototype.granularity, experts=0)):
            raise UserError(f"`reconstruct`: does not go with {self.method}: {reason}")
        self._check_iterations()
        if self.reads_text and self.calibration is None:
            reader = f"{self.method} is scored" if self.scores_text else "blocks are tuned"
            raise UserError(
                f"`calibration`: {reader} on text; name a source: "
                "stdlib, python, text:PATH, hf:NAME[:config] or tokens:FILE.npy"
            )
        if not self.task:
            for name in ("tasks_data", "task_limit"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"`{name}`: no task is measured; it goes with the method minitron-depth and its option "
                        "task=winogrande"
                    )

    def _check_iterations(self) -> None:
        """Refuse what does not go with pruning in several steps."""
        if self.iterations == 1 and self.iteration_schedule != "linear":
            raise UserError("`iteration_schedule`: goes with `iterations` of 2 or more; leave it out")
        if self.iterations > 1 and self.out is None:
            raise UserError("`iterations`: the models between steps need a directory; name `out`")
        if self.reconstruct and self.reconstruct < self.iterations:
            raise UserError(
                f"`reconstruct`: {self.reconstruct} steps, too few for {self.iterations} `iterations`, which share "
                "them; give one to each at least"
            )

    @cached_property
    def prototype(self) -> Any:
        """The method with its options."""
        from secateur.methods.registry import get_method

        return get_method(self.method, self.options)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """What pruning should reach, one target for each ratio."""
        names = ("of", "shape", "pattern", "axes", "allocation", "step", "keep_pattern", "propagate")
        fields = {name: getattr(self, name) for name in names}
        fields["layer_ratios"] = _read_ratios(self.ratios_by_layer)
        return Target.parse_several(self.ratio, goal=self.goal, **fields)

    @cached_property
    def goal(self) -> Goal | None:
        """Parameters, memory or latency to reach; None where the request names none."""
        names = ("params", "active_params", "memory", "latency", "context", "sequences", "weights", "latency_of")
        return Goal.parse(**{name: getattr(self, name) for name in names})

    @property
    def task(self) -> str:
        """The task that the method goes by; empty for none."""
        return task_of(self.prototype)

    @property
    def scores_text(self) -> bool:
        """Whether the method scores on calibration text."""
        return reads_text(self.prototype)

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is read: the method scores on it, or blocks are tuned on it."""
        return self.scores_text or self.reconstruct is not None

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How blocks are tuned; None where they are not."""
        rate = {} if self.reconstruct_rate is None else {"rate": self.reconstruct_rate}
        return None if self.reconstruct is None else Reconstruction(steps=self.reconstruct, **rate)

    @property
    def idle_fields(self) -> list[str]:
        """Names of fields that are set and have no effect, because the method reads no text."""
        if self.reads_text:
            return []
        fields = {"states": self.states != "auto", "dtype": self.dtype != "auto"}
        if not self.task:
            fields["batch"] = self.batch is not None
        if self.calibration is None:  # else they go with it
            fields |= {name: getattr(self, name) is not None for name in _TEXT_FIELDS}
        return [name for name, is_set in fields.items() if is_set]


def _read_ratios(source: Any) -> tuple[Any, ...]:
    """The ratios of the layers: a list, or a file of one.

    Raises:
        UserError: if there is no list.
    """
    if source is None:
        return ()
    ratios = load_yaml(Path(source)) if isinstance(source, str | Path) else source
    if not isinstance(ratios, list | tuple) or not ratios:
        raise UserError("`ratios_by_layer`: should be a list with a share for each layer, as in [0.4, 0.5, 0.6]")
    return tuple(ratios)
