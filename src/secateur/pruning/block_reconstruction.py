"""Block reconstruction: tune the weights that pruning left, block by block, to the outputs of the dense blocks.

Attention and FFN are tuned one after the other (arXiv:2510.14444), in a walk of its own behind the scoring. It carries
the states of the dense model and those of the pruned one, and has one block in memory at a time. A block reads the
states of the pruned and tuned blocks before it, as it will in use; its target is the dense block's output on the dense
model's states. So each block makes up for what earlier ones lost. Where hidden channels were removed, the target is
that output on the channels that stay.

The steps, the rate and the size of a step are our choice; ``docs/methods.md`` has what they were measured on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.block import Block, States
from secateur.calibration.block_tuning import block_parts, ffn_entry, relative_error, run_parts, tune_part
from secateur.calibration.block_walk import BlockWalk, default_batch
from secateur.calibration.journal import Journal, StateStore
from secateur.config import identity
from secateur.data.tokenizer import token_hash
from secateur.errors import UserError
from secateur.formatting import percent
from secateur.model.checkpoint import Checkpoint, is_finite
from secateur.model.cut import CutCheckpoint
from secateur.model.plan import Plan
from secateur.progress import notify, track
from secateur.pruning.reconstruction import Reconstruction, default_step_windows

__all__ = ["Schedule", "reconstruct", "reconstruct_plan"]

_MEASURED = 16  #: windows that errors are measured on, at most
_HELD_OUT = 8  #: of so many windows one is not tuned on

_TUNED = "tuned."  #: prefix of the journal's entries for tuned tensors, by their full names


@dataclass(frozen=True)
class Schedule:
    """Which windows are tuned on in which step.

    Attributes:
        batches: token ids [windows, positions], as they go through a block at once.
        groups: the batches of each step of a pass.
        steps: the group of each step.
        measured: batches that the error is measured on: tuned on, and held out.
    """

    batches: list[Tensor]
    groups: list[list[int]]
    steps: list[int]
    measured: tuple[list[int], list[int]]

    @classmethod
    def of(
        cls, windows: Tensor, steps: int, step_windows: int, *, batch: int, held_out: int, seed: int, skip: int = 0
    ) -> Schedule:
        """Cut windows into batches and steps, in an order that the seed fixes; each pass has an order of its own.

        Args:
            windows: [windows, positions].
            step_windows: windows of a step; all that are tuned on if these are fewer.
            batch: windows of a batch, at most; it only affects rounding.
            held_out: windows that are not tuned on.
            skip: steps of the order that come before the first one.
        """
        generator = torch.Generator().manual_seed(seed)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        count = len(windows) - held_out
        size = min(step_windows, count)
        micro = max(divisor for divisor in range(1, min(batch, size) + 1) if size % divisor == 0)
        batches: list[Tensor] = []
        groups: list[list[int]] = []
        for group in windows[:count].split(size):
            parts = list(group.split(micro))
            groups.append(list(range(len(batches), len(batches) + len(parts))))
            batches += parts
        first = len(batches)
        batches += list(windows[count:].split(micro)) if held_out else []
        order: list[int] = []
        while len(order) < skip + steps:
            order += torch.randperm(len(groups), generator=generator).tolist()
        most = max(1, _MEASURED // micro)
        measured = (list(range(first))[:most], list(range(first, len(batches)))[:most])
        return cls(batches, groups, order[skip : skip + steps], measured)

    @property
    def tokens(self) -> int:
        """Tokens that the steps of one part read; those of the other parts are the same."""
        sizes = [sum(self.batches[number].numel() for number in group) for group in self.groups]
        return sum(sizes[group] for group in self.steps)

    def numbers(self) -> Iterator[Sequence[int]]:
        """The batches of each step."""
        return (self.groups[group] for group in self.steps)


def _held_out_windows(windows: int) -> int:
    """How many calibration windows are not tuned on; none of fewer than eight."""
    return min(_MEASURED, windows // _HELD_OUT)


def reconstruct_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Tensor,
    how: Reconstruction,
    *,
    held_out: int | None = None,
    dense: Checkpoint | None = None,
    channels: Tensor | None = None,
    **execution: Any,
) -> Plan:
    """The plan with tuned weights: the blocks that it leaves are tuned to those of the checkpoint.

    Args:
        windows: token ids [windows, positions].
        held_out: windows that are not tuned on; None for one of eight, sixteen at most.
        dense: the model whose blocks are the targets; None for the checkpoint.
        channels: the hidden channels of ``dense`` that the checkpoint has; None for all.
        execution: how to compute, and where to keep results, as for :func:`reconstruct`.
    """
    dense = dense or checkpoint
    channels = plan.keep_hidden if channels is None else channels[plan.keep_hidden]
    held_out = _held_out_windows(len(windows)) if held_out is None else held_out
    execution |= {"channels": channels if len(channels) < dense.shape.hidden else None, "held_out": held_out}
    tuned, record = reconstruct(dense, CutCheckpoint(checkpoint, plan), windows, how, **execution)
    record["hash"] = token_hash(windows.numpy())
    request = {**plan.request, "reconstruct": identity(how)}
    return dataclasses.replace(plan, tuned=tuned, request=request, summary={**plan.summary, "reconstruction": record})


def reconstruct(
    dense: Checkpoint,
    pruned: Checkpoint,
    windows: Tensor,
    how: Reconstruction,
    *,
    channels: Tensor | None = None,
    step_windows: int | None = None,
    held_out: int = 0,
    seed: int = 0,
    skip: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
    store: StateStore | None = None,
    journal: Journal | None = None,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Tune the blocks of ``pruned`` to those of ``dense``, one after the other.

    Weights are tuned in float32 and rounded to the type that they are stored in. What the masks of ``pruned`` drop
    stays exactly zero. A block whose error does not fall keeps its weights. A killed run resumes behind the last
    finished block of the journal.

    Args:
        windows: token ids [windows, positions], int64.
        channels: the hidden channels of ``dense`` that ``pruned`` has; None for all.
        step_windows: windows of a step; None for 4,096 tokens.
        held_out: windows that are not tuned on; the error on them decides where there are any.
        skip: steps of the seed's order that an earlier reconstruction has taken.
        dtype: of matrix products and states; parameters, moments and norms are float32.
        batch: windows at once; None for what suits the device.

    Returns:
        Tensor name -> tuned values, as views of the journal; and a record as plain values: ``steps``, ``rate``,
        ``tokens``, ``windows``, ``seqlen``, ``held_out_windows`` and ``blocks``, for each block the relative errors
        of its output ``before`` and ``after``, on windows that are tuned on and ``held_out_before``,
        ``held_out_after`` (None without any), and whether it was ``tuned``.
    """
    batch = batch or default_batch(pruned.family, windows.shape[1], device)
    size = step_windows or default_step_windows(windows.shape[1])
    schedule = Schedule.of(windows, how.steps, size, batch=batch, held_out=held_out, seed=seed, skip=skip)
    execution: dict[str, Any] = {"device": device, "dtype": dtype, "store": store}
    walks = BlockWalk(dense, None, **execution), BlockWalk(pruned, None, journal=journal, **execution)
    tuner = _Tuner(*walks, how, schedule, channels)
    if not tuner.journal.complete:
        tuner.run()
        tuner.journal.close()
    errors = [tuner.journal[f"error.{layer}"].tolist() for layer in range(pruned.shape.layers)]
    record = {
        "steps": how.steps,
        "rate": how.rate,
        "tokens": schedule.tokens,
        "windows": len(windows),
        "seqlen": windows.shape[1],
        "held_out_windows": held_out,
        "blocks": [_block_record(*values) for values in errors],
    }
    return tuner.journal.with_prefix(_TUNED), record


def _block_record(before: float, after: float, held_out_before: float, held_out_after: float, tuned: float) -> Any:
    held_out = {"held_out_before": held_out_before, "held_out_after": held_out_after}
    missing = {name: None if math.isnan(value) else value for name, value in held_out.items()}
    return {"before": before, "after": None if math.isnan(after) else after, **missing, "tuned": bool(tuned)}


class _Tuner:
    """Two walks side by side, over the blocks of the dense model and those of the pruned one."""

    def __init__(
        self, dense: BlockWalk, pruned: BlockWalk, how: Reconstruction, schedule: Schedule, channels: Tensor | None
    ) -> None:
        self.dense, self.pruned, self.how, self.schedule = dense, pruned, how, schedule
        self.channels = None if channels is None else channels.to(dense.device)
        self.journal = pruned.journal

    def run(self) -> None:
        """Tune all blocks that the journal lacks."""
        layers, steps = len(self.pruned.layers), self.how.steps
        tuned, finished = self.journal.with_prefix(_TUNED), self.journal.finished_steps
        inputs, states = self.dense.start(self.schedule.batches), self.pruned.start(self.schedule.batches)
        with track("reconstruct", layers * steps) as progress:
            for layer in range(layers):
                note = f"block {layer + 1} of {layers}"
                with self.dense.block(layer) as block:
                    inputs, middle = self._dense_outputs(block, inputs)
                with self.pruned.block(layer, torch.float32) as block:
                    if layer >= finished:
                        advance = functools.partial(progress.advance, note=note)
                        entries = self._tune(block, states, inputs, middle, advance)
                        self.journal.put(layer, entries)
                        self.journal.finish(layer)
                    else:
                        progress.advance(steps, note)
                    del middle
                    self._restore(block, tuned)
                    if layer + 1 < layers:
                        states = block.run(states, consume=True)

    @torch.no_grad()
    def _dense_outputs(self, block: Block, inputs: States) -> tuple[States, States]:
        """The outputs of a dense block, and the stream behind its attention; ``inputs`` are freed on the way."""
        end, walk = ffn_entry(block), self.dense
        outputs, middle = States(), States()
        for number in range(len(inputs)):
            values = run_parts(block, inputs[number], number, [end])
            if not is_finite(values[""]):
                where = f"{walk.checkpoint.directory}: block {block.index}"
                raise UserError(f"{where} has NaN or infinity in its output on this calibration text")
            outputs.append(walk.store.save(values[""]))
            middle.append(walk.store.save(self._project(values[end])) if end else values[""].new_empty(0))
            inputs[number] = values[""].new_empty(0)
        return outputs, middle

    def _project(self, states: Tensor) -> Tensor:
        """The hidden channels of the dense model's states that the pruned model has."""
        states = states[..., : self.dense.checkpoint.shape.hidden]
        return states if self.channels is None else states.index_select(-1, self.channels.to(states.device))

    def _tune(self, block: Block, states: States, outputs: States, middle: States, advance: Any) -> dict[str, Tensor]:
        """Tune a block whose weights are in float32; return journal entries."""
        checkpoint, device, index = self.pruned.checkpoint, self.pruned.device, block.index

        def output_targets(number: int) -> Tensor:
            return self._project(outputs[number]).to(device, torch.float32)

        def errors() -> list[float]:
            return [
                relative_error(block, states, output_targets, numbers) if numbers else math.nan
                for numbers in self.schedule.measured
            ]

        before = errors()
        names = {name: checkpoint.family.block_tensor(index, name) for name in checkpoint.shape.block_tensors(index)}
        masks = {name: checkpoint.masks[full] for name, full in names.items() if full in checkpoint.masks}
        parts = block_parts(block, states[0]) if before[0] > 0 else []
        for part in parts:
            targets = output_targets if not part.end else lambda number: middle[number].to(device, torch.float32)
            options: dict[str, Any] = {"steps": self.how.steps, "rate": self.how.rate}
            options["advance"] = functools.partial(advance, 1 / len(parts))
            tune_part(block, part, states, targets, self.schedule.numbers(), masks, **options)
        if not parts:
            advance(self.how.steps)
        tensors = {names[name]: tensor for part in parts for name, tensor in part.parameters.items()}
        with torch.no_grad():  # as they are written, so that errors are those of the output
            for full, tensor in tensors.items():
                tensor.copy_(tensor.to(checkpoint.dtype_of(full)))
        after = errors() if parts else before
        decisive = 0 if math.isnan(before[1]) else 1
        better = after[decisive] < before[decisive]
        if parts and not better:
            shares = f"{percent(before[decisive])} before, {percent(after[decisive])} after tuning"
            notify(f"block {index}: the error of its output grew ({shares}); it keeps its weights from before")
        values = [before[0], after[0], before[1], after[1], float(better)]
        entries = {f"error.{index}": torch.tensor(values, dtype=torch.float64)}
        stored = {full: tensor.detach().to(checkpoint.dtype_of(full)).cpu() for full, tensor in tensors.items()}
        return entries | ({_TUNED + full: tensor for full, tensor in stored.items()} if better else {})

    def _restore(self, block: Block, tuned: Mapping[str, Tensor]) -> None:
        """Give a block its final weights: the tuned ones, or those that it was read with."""
        checkpoint = self.pruned.checkpoint
        names = checkpoint.shape.block_tensors(block.index)
        full_names = {name: checkpoint.family.block_tensor(block.index, name) for name in names}
        stored = {name: tuned[full] if full in tuned else checkpoint.tensor(full) for name, full in full_names.items()}
        weights = {n: t.to(self.pruned.device, self.pruned.dtype, copy=True) for n, t in stored.items()}
        block.module.load_state_dict(weights, assign=True)
