"""The training loop, to be read downward: exact tokens in, a curve of held-out losses out.

The data order is a pure function of the slice, its seed and the step, so the whole state of a run is its weights, its
moments and its step. A run that was killed goes on from its last checkpoint and ends, on a CPU with as many threads and
processes, at the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from secateur import distributed
from secateur.errors import REQUEUE, RunError
from secateur.progress import ProgressTask, track
from secateur.training.batches import Data, Span, micro_batches
from secateur.training.checkpoints import Saver
from secateur.training.masks import Masks
from secateur.training.metrics import Metrics
from secateur.training.parallel import TrainModule, full_tensor
from secateur.training.recipe import learning_rate, make_optimizer, set_rate
from secateur.training.throughput import Meter
from secateur.training.watchdog import StopSignal, Watchdog

__all__ = ["RunOptions", "train_loop"]


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides training."""

    folder: Path  #: where checkpoints lie; an earlier one found there is gone on from
    label: str  #: what progress is shown as
    origin: Path | None = None  #: the checkpoint of another run, whose weights and moments a new run begins with
    save_every: int = 100  #: steps between checkpoints
    keep: int = 2  #: checkpoints that stay
    background: bool = False  #: checkpoints are written while the run goes on
    metrics: Metrics = field(default_factory=lambda: Metrics(None))
    meter: Meter = field(default_factory=Meter)
    stop: StopSignal = field(default_factory=StopSignal)


def train_loop(
    module: TrainModule,
    data: Data,
    *,
    masks: Mapping[str, Tensor],
    measure: Callable[[TrainModule], float | None],
    points: int,
    options: RunOptions,
) -> dict[str, Any]:
    """Train in place on every token of ``data``, once; all processes together.

    Args:
        module: float32 parameters; what its objective gives is minimised.
        data: the exact tokens, and the recipe; a window's first token is context, so a window of T tokens gives T - 1
            targets.
        masks: parameter name -> bool, True where kept; empty for a dense model.
        measure: gives the held-out loss; None where there is nothing to measure it on.
        points: how many times it is measured after the start, evenly spread over the steps.
        options: checkpoints, metrics, progress.

    Returns:
        ``curve`` (tokens, loss, training_loss, learning_rate of each point), ``tokens``, ``targets`` and ``steps``.

    Raises:
        RunError: if the loss or the gradient is no longer finite, or the run was told to stop.
    """
    recipe, steps = data.recipe, data.steps
    evaluate_after = {round(steps * (i + 1) / points) for i in range(points)} | {steps}
    held = Masks(module.model, masks)
    objective, learned = module.objective, module.trainable_parameters()
    own = objective.groups()
    theirs = {id(parameter) for group in own for parameter in group["params"]}
    weights = [parameter for parameter in learned.values() if id(parameter) not in theirs]
    optimizer = make_optimizer(weights, recipe, own)
    saver = Saver(options.folder, learned, optimizer, keep=options.keep, background=options.background)
    found = saver.load()
    if found is None and options.origin:
        saver.begin(options.origin)
    data.restore(found.get("data") if found else None)  # before anything is measured: data may follow what is found
    state = found or _begin(module, held, measure, options)
    options.metrics.resume(state["step"])
    module.train()
    watch = Watchdog(options.label, report=options.metrics.write)
    with track(options.label, data.tokens) as progress, watch:
        progress.advance(state["tokens"], "resumed" if state["step"] else "")
        for step in range(state["step"], steps):
            rate = learning_rate(recipe, step, steps)
            torch.manual_seed(recipe.seed + step)  # for models with dropout: nothing else draws numbers
            objective.begin(step, steps)
            spans = data.spans(step)
            targets = sum(b - a - 1 for a, b in spans)
            losses, stop = _gradients(module, data, spans, targets, options.stop)
            held.apply_to_gradients()
            norm = float(full_tensor(clip_grad_norm_(weights, recipe.clip)))
            loss = math.fsum(losses) / max(targets, 1)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _not_finite(data, spans, step, losses, norm, saver, options)
            set_rate(optimizer, rate, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            held.apply()
            consumed = sum(b - a for a, b in spans)
            state["step"] = step + 1
            state["tokens"] += consumed
            state["targets"] += targets
            options.meter.step(consumed, watch.step(step + 1, loss))
            shown = {"loss": loss, "learning_rate": rate, "grad_norm": norm, **objective.figures()}
            _tell(options, progress, state, consumed, shown, objective.note())
            if step + 1 in evaluate_after:
                held.check()
                measured = measure(module)
                point = {"loss": measured, "training_loss": loss, "learning_rate": rate, **objective.figures()}
                state["curve"].append({"tokens": state["tokens"], **point})
                _tell_held_out(options, step + 1, state["tokens"], measured)
            if stop or (step + 1) % options.save_every == 0 or step + 1 == steps:
                held.check()
                saver.save({**state, "data": data.state()})
            if stop and step + 1 < steps:
                saver.finish()
                raise RunError(f"{options.label}: told to stop, saved {saver.last}; the same command goes on", REQUEUE)
            watch.pause()
    saver.finish()
    assert state["tokens"] == data.tokens, "the slice was not consumed to the token"
    return {key: state[key] for key in ("curve", "tokens", "targets")} | {"steps": steps}


def _begin(
    module: TrainModule, held: Masks, measure: Callable[[TrainModule], float | None], options: RunOptions
) -> dict[str, Any]:
    """The state of a run before its first step."""
    held.apply()
    options.metrics.resume(-1)  # before anything is written down, by what measures too
    loss = measure(module)
    _tell_held_out(options, 0, 0, loss)
    first = {"tokens": 0, "loss": loss, "training_loss": None, "learning_rate": None}
    return {"step": 0, "tokens": 0, "targets": 0, "curve": [first]}


def _gradients(
    module: TrainModule, data: Data, spans: list[Span], targets: int, stop: StopSignal
) -> tuple[list[float], bool]:
    """Add up the gradient of a step's mean loss over processes and micro-batches.

    Args:
        module: whose gradients.
        data: where the windows are read.
        spans: the step's windows.
        targets: tokens that they predict, all together.
        stop: whether this process was told to stop.

    Returns:
        The loss of each of the step's windows, summed over its tokens, in the order of ``spans``; and whether any
        process was told to stop.
    """
    place = {span: number for number, span in enumerate(spans)}  # a window that is read twice has its sum at the last
    found = torch.zeros(len(spans) + 1, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    groups = micro_batches(spans, data.recipe.micro_batch, rank=distributed.rank(), world=distributed.world_size())
    for group in groups:
        batch = data.batch(group)
        total, each, once = module(batch.ids, batch.positions, batch.targets)
        loss = total * (distributed.world_size() / max(targets, 1))  # sharding takes the mean over the processes
        (loss if once is None else loss + once / len(groups)).backward()
        seen.append((torch.tensor([place[span] for span in group], dtype=torch.int64), each.sum(dim=1)))
    for places, sums in seen:  # the one place in a step where the host waits for the device
        found.index_add_(0, places, sums[: len(places)].double().cpu())
    found[-1] = float(stop.is_set)
    distributed.all_reduce(found)
    return found[:-1].tolist(), bool(found[-1])


def _tell(
    options: RunOptions,
    progress: ProgressTask,
    state: dict[str, Any],
    consumed: int,
    values: Mapping[str, float],
    note: str,
) -> None:
    """Show and write down a finished step."""
    meter = options.meter
    said = f"loss {values['loss']:.3f}  rate {values['learning_rate']:.2g}  norm {values['grad_norm']:.2g}"
    said += f"  {note}" if note else ""
    shares = "" if meter.utilization is None else f"  MFU {meter.utilization:.0%}"
    progress.advance(consumed, f"{said}  {meter.rate:,.0f} tokens/s{shares}")
    entry = {"step": state["step"], "tokens": state["tokens"], **values, "tokens_per_second": meter.rate}
    options.metrics.write(entry if meter.utilization is None else {**entry, "mfu": meter.utilization})


def _tell_held_out(options: RunOptions, step: int, tokens: int, loss: float | None) -> None:
    if loss is not None:
        options.metrics.write({"step": step, "tokens": tokens, "heldout_loss": loss})


def _not_finite(
    data: Data, spans: list[Span], step: int, losses: list[float], norm: float, saver: Saver, options: RunOptions
) -> RunError:
    """Say where a run broke: the step, the documents of the windows at fault, and what to go on from."""
    saver.finish()
    bad = [span for span, loss in zip(spans, losses, strict=True) if not math.isfinite(loss)] or spans
    names = data.documents(bad)
    options.metrics.write({"step": step + 1, "event": "not finite", "grad_norm": str(norm), "documents": names})
    most = 3 if saver.last else len(names)  # without a checkpoint the metrics do not stay
    shown = "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    last = f"the last good checkpoint is {saver.last}" if saver.last else "there is no checkpoint yet"
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
    return RunError(
        f"{options.label}: loss {total:g}, gradient norm {norm:g} at step {step + 1} in {shown}; {last}; "
        "lower peak_rate, or leave those documents out, in a new directory"
    )
