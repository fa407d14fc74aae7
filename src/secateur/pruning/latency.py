"""Latency as a goal: block timings on this device over a grid of shapes, interpolated, and checked on the result.

A shape's latency is that of the part outside the blocks plus that of each block. Both are timed on models of random
weights with one block of each kind. On a CPU with one thread seconds are those of the process, which other programs do
not lengthen; else those of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur import distributed
from secateur.errors import UserError
from secateur.evaluation.workload import Workload
from secateur.files import read_json, write_json
from secateur.formatting import plural
from secateur.methods.base import LearnedMethod, Method
from secateur.model.checkpoint import Checkpoint
from secateur.model.frontier import frontier
from secateur.model.goal import Goal, Phase
from secateur.model.live import cut_model
from secateur.model.plan import Plan
from secateur.model.shapes import Shape
from secateur.model.solver import steps_of
from secateur.model.surgery import cut_config
from secateur.progress import track
from secateur.pruning.goals import complete_target, goal_spaces
from secateur.pruning.target import Target
from secateur.runtime import pick_dtype

__all__ = ["Timing", "compare_latency", "latency_target", "measure_latency", "save_latency_target"]

_FILE = "latency-target.json"
_REPEATS = 7
_TRIES = 3  #: times that the shape to take is timed itself, and the prediction corrected by it
_CLOSE = 0.02  #: distance between both that needs no correction


@dataclass(frozen=True)
class Timing:
    """What is timed, and on what."""

    phase: Phase
    prompt: int  #: tokens of each sequence before the first new one
    new: int  #: generated tokens
    sequences: int
    device: str
    dtype: str

    @classmethod
    def of_goal(cls, goal: Goal, positions: int | None, device: str) -> Timing:
        """The timing that a goal asks for, within the model's positions."""
        names = {"bf16": "bfloat16", None: "auto"}
        dtype = pick_dtype(names.get(goal.weights, str(goal.weights)), device)
        new = 16 if goal.phase == "decode" else 2
        workload = Workload(goal.context or 512, new, (goal.sequences,)).within(positions)
        dtype_name = str(dtype).removeprefix("torch.")
        return cls(goal.phase, workload.prompt, workload.new, goal.sequences, device, dtype_name)

    @property
    def description(self) -> str:
        """In words: phase, sizes, type, device."""
        threads = f", {plural(torch.get_num_threads(), 'thread')}" if self.device == "cpu" else ""
        return (
            f"{self.phase}, {plural(self.sequences, 'sequence')}, prompt of {plural(self.prompt, 'token')}, "
            f"{self.dtype}, {self.device}{threads}"
        )

    def clock(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        if self.device == "cpu" and torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()

    def prepare(self, model: Any) -> Any:
        """The model on the device, in the type, in evaluation mode."""
        return model.to(device=self.device, dtype=getattr(torch, self.dtype)).eval()

    @torch.no_grad()
    def run(self, model: Any, laps: list[list[float]] | None = None) -> float:
        """Seconds of a prefill, or of a decoded token.

        Args:
            laps: gets one list for each pass, of its blocks' seconds.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (self.sequences, self.prompt), generator=generator)
        tokens, cache, seconds = ids.to(self.device), None, []
        for number in range(1 if self.phase == "prefill" else self.new):
            watched = laps is not None and (number > 0 or self.phase == "prefill")
            handles = _watch(model, self, laps) if watched and laps is not None else []
            start = self.clock()
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds.append(self.clock() - start)
            for handle in handles:
                handle.remove()
            tokens, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
        return seconds[0] if self.phase == "prefill" else median(seconds[1:])


def _watch(model: Any, timing: Timing, laps: list[list[float]]) -> list[Any]:
    """Time the blocks of the next pass."""
    laps.append([])
    starts: list[float] = []

    def enter(*_: Any) -> None:
        starts.append(timing.clock())

    def leave(*_: Any) -> None:
        laps[-1].append(timing.clock() - starts[-1])

    handles: list[Any] = []
    for block in model.get_decoder().layers:
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    return handles


@dataclass(frozen=True)
class _Table:
    """Seconds over a grid of sizes."""

    spaces: tuple[str, ...]  #: all that are cut, but the layers
    knots: tuple[NDArray[np.int64], ...]  #: units of each space
    seconds: NDArray[np.float64]  #: [knots of the first space, ..., 1 + kinds]: outside the blocks, then each kind
    layers: tuple[int, ...]  #: of each kind, in the model

    def of(self, shape: Shape) -> Any:
        """Seconds of a shape; of one with arrays for sizes, an array."""
        parts: list[Any] = [0.0] * self.seconds.shape[-1]
        weights = [
            [np.interp(shape.units(space), knots, row) for row in np.eye(len(knots))]
            for space, knots in zip(self.spaces, self.knots, strict=True)
        ]
        for index in np.ndindex(self.seconds.shape[:-1]):
            share: Any = 1.0
            for each, knot in zip(weights, index, strict=True):
                share = share * each[knot]
            parts = [part + share * value for part, value in zip(parts, self.seconds[index], strict=True)]
        return _total(parts, self.layers, shape)


def latency_target(
    checkpoint: Checkpoint, target: Target, method: Method, name: str, device: str, work: Path | None = None
) -> Target:
    """The target with the sizes that reach its latency; any other target with what suits the model.

    Args:
        work: where an interrupted run has kept its sizes, which serve again; None for a run that begins.

    Raises:
        UserError: as :func:`secateur.pruning.goals.complete_target`, and for a method that trains or several processes.
    """
    shape, goal = checkpoint.shape, target.goal
    if goal is None or goal.kind != "latency" or target.sizes:
        return complete_target(target, shape, method, name)
    if isinstance(method, LearnedMethod):
        raise UserError(f"`latency`: {name} trains towards a shape; name it with `shape`, or pass `params`")
    if distributed.world_size() > 1:
        raise UserError("`latency`: blocks are timed in one process; start it without torchrun")
    target.check(method, name)
    spaces = goal_spaces(target, method)
    timing = Timing.of_goal(goal, shape.positions, device)
    identity = _identity(checkpoint, target, timing)
    if work and (work / _FILE).exists() and (content := read_json(work / _FILE))["identity"] == identity:
        return Target.from_dict(content["reached"])
    table = _time_grid(checkpoint, spaces, target.step, timing)
    whole, correction = float(table.of(shape)), 1.0
    smallest = {space: int(knots[0]) for space, knots in zip(table.spaces, table.knots, strict=True)}

    def share(narrow: Shape) -> Any:
        return correction * table.of(narrow) / whole

    whole_seconds = _seconds(checkpoint, shape, timing)
    for _ in range(_TRIES):
        (first,) = frontier(shape, goal, spaces, step=target.step, several=1, amounts=share, smallest=smallest)
        timed = _total(_seconds(checkpoint, first.shape, timing), table.layers, first.shape)
        timed /= _total(whole_seconds, table.layers, shape)
        if abs(timed / first.amount - 1) <= _CLOSE:
            break
        correction *= timed / first.amount
    return complete_target(target, shape, method, name, amounts=share, smallest=smallest)


def save_latency_target(checkpoint: Checkpoint, target: Target, reached: Target, device: str, work: Path) -> None:
    """Keep the sizes of a latency goal for a resumed run, which another timing could change."""
    if (goal := target.goal) is not None and goal.kind == "latency":
        timing = Timing.of_goal(goal, checkpoint.shape.positions, device)
        identity = _identity(checkpoint, target, timing)
        write_json(work / _FILE, {"identity": identity, "reached": reached.as_dict()})


def _identity(checkpoint: Checkpoint, target: Target, timing: Timing) -> dict[str, Any]:
    """What the sizes that a timing came to depend on."""
    return {"model": checkpoint.digest, "timing": asdict(timing), "target": target.as_dict()}


def _total(seconds: Sequence[Any], layers: Sequence[int], narrow: Shape) -> Any:
    """Seconds of a whole shape, from those outside the blocks and of each kind, of which the model has ``layers``."""
    blocks = sum(part * count for part, count in zip(seconds[1:], layers, strict=True))
    return seconds[0] + blocks * narrow.layers / sum(layers)


def _time_grid(checkpoint: Checkpoint, spaces: Sequence[str], step: int | None, timing: Timing) -> _Table:
    """Time blocks over a grid of the sizes that may be cut."""
    shape = checkpoint.shape
    cut = tuple(space for space in spaces if space != "layers")
    steps = steps_of(shape, cut, step)
    shares = (0.25, 0.5, 0.75, 1.0) if len(cut) <= 2 else (0.25, 0.5, 1.0)
    knots = tuple(_knots(shape, space, steps[space], shares) for space in cut)
    layers = tuple(len(group) for group in _kinds(shape))
    seconds = np.zeros((*map(len, knots), 1 + len(layers)))
    points = list(np.ndindex(seconds.shape[:-1]))
    with track(f"time blocks ({timing.phase})", len(points)) as progress:
        for index in points:
            narrow = shape
            for space, each, at in zip(cut, knots, index, strict=True):
                narrow = narrow.narrowed(space, int(each[at]))
            seconds[index] = _seconds(checkpoint, narrow, timing)
            progress.advance()
    return _Table(cut, knots, seconds, layers)


def _knots(shape: Shape, space: str, step: int, shares: Sequence[float]) -> NDArray[np.int64]:
    """Units of a space that are timed: multiples of its step near these shares, and all."""
    units = shape.units(space)
    least = max(step, shape.least_experts if space == "experts" else 1)
    return np.unique([min(units, max(least, round(units * share / step) * step)) for share in shares[:-1]] + [units])


def _kinds(shape: Shape) -> list[list[int]]:
    """The layers of each kind, by their tensors and windows."""
    windows = shape.windows or (None,) * shape.layers
    groups: dict[Any, list[int]] = {}
    for layer in range(shape.layers):
        groups.setdefault((shape.kind(layer), windows[layer]), []).append(layer)
    return list(groups.values())


def _seconds(checkpoint: Checkpoint, narrow: Shape, timing: Timing) -> list[float]:
    """Seconds outside the blocks, and of a block of each kind, with random weights of these sizes."""
    layers = [group[0] for group in _kinds(checkpoint.shape)]
    before = checkpoint.shape
    after = narrow.narrowed("layers", before.layers).of_layers(layers).openable(where="`latency`")
    fields = {"after": after, "keep_layers": torch.tensor(layers)}
    raw = cut_config(checkpoint, Plan.keeping_all("", "width", {}, before, **fields))
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    model = timing.prepare(AutoModelForCausalLM.from_config(config))
    timing.run(model)
    laps: list[list[float]] = []
    totals = [timing.run(model, laps) for _ in range(_REPEATS)]
    blocks = [median(values) for values in zip(*laps, strict=True)]
    return [max(median(totals) - sum(blocks), 0.0), *blocks]


def measure_latency(checkpoint: Checkpoint, plan: Plan, device: str) -> dict[str, Any]:
    """Time a model against what a plan makes of it, both whole on the device.

    Returns:
        ``reached``, the share of the model's latency that is left, and ``how`` it was measured.
    """
    goal = Goal(**plan.request["goal"])
    timing = Timing.of_goal(goal, checkpoint.shape.positions, device)
    share = compare_latency(checkpoint.load(checkpoint.dtype), cut_model(checkpoint, plan), timing)
    return {
        "reached": share,
        "how": f"predicted {goal.predicted:.3g}x; median of {_REPEATS} alternating runs; {timing.description}",
    }


def compare_latency(model: Any, smaller: Any, timing: Timing) -> float:
    """The latency of a smaller model as a share of another's: medians of alternating runs."""
    models = [timing.prepare(each) for each in (model, smaller)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, _REPEATS):
        for each, times in zip(models, seconds, strict=True):
            value = timing.run(each)
            if number >= 0:
                times.append(value)
    return median(seconds[1]) / median(seconds[0])
