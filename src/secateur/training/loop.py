"""The training loop, to be read downward: exact tokens in, a curve of held-out losses out.

The data order is a pure function of the slice, its seed and the step, so the state of a run is its weights, moments
and step. A killed run resumes from its last checkpoint. On a CPU, with equal numbers of threads and processes, it ends
at the same bits as an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from secateur import distributed
from secateur.errors import REQUEUE, DivergenceError, RunError
from secateur.formatting import fixed
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
    """Checkpoints, metrics and progress of a run; none of them changes the result."""

    folder: Path  #: checkpoint folder; training resumes from the newest checkpoint in it
    label: str  #: the run's name in progress, warnings and errors
    origin: Path | None = None  #: a checkpoint of another run, whose weights and moments a new run starts from
    save_every: int = 100  #: steps between checkpoints
    save_minutes: float = 20.0  #: minutes after which one is saved besides
    keep: int = 2  #: checkpoints that stay, the newest
    background: bool = False  #: write checkpoints while training continues
    metrics: Metrics = field(default_factory=lambda: Metrics(None))
    meter: Meter = field(default_factory=Meter)
    stop: StopSignal = field(default_factory=StopSignal)
    resuming: str = "run the same command to resume"  #: advice after a stop signal
    remedy: str = "lower peak_rate"  #: what helps a run whose loss is no longer finite


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
        module: the model with float32 parameters, and the objective to minimise.
        data: the exact tokens, and the recipe; a window's first token is context, so a window of T tokens gives T - 1
            targets, or fewer of chat data.
        masks: parameter name -> bool, True where kept; empty for a dense model.
        measure: computes the held-out loss; returns None without held-out text.
        points: number of measurements after the start, evenly spread over the steps.

    Returns:
        ``curve`` (tokens, loss, training_loss, learning_rate of each point), ``tokens``, ``targets`` and ``steps``. The
        training loss of a step without targets is None.

    Raises:
        RunError: if the loss or the gradient is no longer finite, or a stop signal arrived.
    """
    recipe, steps = data.recipe, data.steps
    measured_steps = {round(steps * (i + 1) / points) for i in range(points)} | {steps}
    model_masks = Masks(module.model, masks)
    objective, parameters = module.objective, module.trainable_parameters()
    objective_groups = objective.groups()
    objective_parameter_ids = {id(parameter) for group in objective_groups for parameter in group["params"]}
    weights = [parameter for parameter in parameters.values() if id(parameter) not in objective_parameter_ids]
    optimizer = make_optimizer(weights, recipe, objective_groups)
    saver = Saver(options.folder, parameters, optimizer, keep=options.keep, background=options.background)
    checkpoint = saver.load()
    if checkpoint is None and options.origin:
        saver.begin(options.origin)
    data.restore(checkpoint.get("data") if checkpoint else None)  # before measuring, which may change the data's state
    state = checkpoint or _initial_state(module, model_masks, measure, options)
    options.metrics.resume(state["step"])
    module.train()
    watchdog = Watchdog(options.label, report=options.metrics.write)
    last_save = time.monotonic()

    def is_stopped() -> bool:
        return options.stop.is_set

    def is_due() -> bool:
        return time.monotonic() - last_save >= 60 * options.save_minutes

    with track(options.label, data.tokens) as progress, watchdog:
        progress.advance(state["tokens"], "resumed" if state["step"] else "")
        for step in range(state["step"], steps):
            rate = learning_rate(recipe, step, steps)
            torch.manual_seed(recipe.seed + step)  # for models with dropout: nothing else draws numbers
            objective.begin(step, steps)
            spans = data.spans(step)
            targets = data.targets(spans)
            losses, (stopping, due) = _accumulate_gradients(module, data, spans, targets, (is_stopped, is_due))
            if recipe.mask == "before-clip":
                model_masks.apply_to_gradients()
            norm = float(full_tensor(clip_grad_norm_(weights, recipe.clip)))
            if recipe.mask == "after-clip":
                model_masks.apply_to_gradients()
            loss = math.fsum(losses) / targets if targets else None  # chat data may have steps without a target
            if not (math.isfinite(loss or 0.0) and math.isfinite(norm)):
                raise _not_finite_error(data, spans, step, losses, norm, saver, options)
            set_rate(optimizer, rate, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model_masks.apply()
            consumed = sum(stop - start for start, stop in spans)
            state["step"] = step + 1
            state["tokens"] += consumed
            state["targets"] += targets
            options.meter.step(consumed, watchdog.step(step + 1, loss))
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, **module.figures()}
            _report_step(options, progress, state, consumed, values, objective.note())
            if step + 1 in measured_steps:
                model_masks.check()
                heldout_loss = measure(module)
                point = {"loss": heldout_loss, "training_loss": loss, "learning_rate": rate, **module.figures()}
                state["curve"].append({"tokens": state["tokens"], **point})
                _report_heldout_loss(options, step + 1, state["tokens"], heldout_loss)
            if stopping or due or (step + 1) % options.save_every == 0 or step + 1 == steps:
                model_masks.check()
                saver.save({**state, "data": data.state()})
                last_save = time.monotonic()
            if stopping and step + 1 < steps:
                saver.finish()
                raise RunError(f"{options.label}: stopped by a signal, saved {saver.last}; {options.resuming}", REQUEUE)
            watchdog.pause()
    saver.finish()
    assert state["tokens"] == data.tokens, "the slice was not consumed to the token"
    return {key: state[key] for key in ("curve", "tokens", "targets")} | {"steps": steps}


def _initial_state(
    module: TrainModule, masks: Masks, measure: Callable[[TrainModule], float | None], options: RunOptions
) -> dict[str, Any]:
    """The state of a run before its first step, with its held-out loss."""
    masks.apply()
    options.metrics.resume(-1)  # before ``measure``, which may write metrics too
    loss = measure(module)
    _report_heldout_loss(options, 0, 0, loss)
    first = {"tokens": 0, "loss": loss, "training_loss": None, "learning_rate": None}
    return {"step": 0, "tokens": 0, "targets": 0, "curve": [first]}


def _accumulate_gradients(
    module: TrainModule, data: Data, spans: list[Span], targets: int, flags: Sequence[Callable[[], bool]]
) -> tuple[list[float], list[bool]]:
    """Add up the gradient of a step's mean loss over processes and micro-batches.

    Args:
        module: the model; its gradients are added to.
        targets: number of tokens that all windows predict together.
        flags: conditions such as a stop signal, which this process asks at the end.

    Returns:
        The loss of each of the step's windows, summed over its tokens, in the order of ``spans``; and for each flag
        whether it is true in any process: all processes must act alike, and their clocks differ.
    """
    index = {span: number for number, span in enumerate(spans)}  # a window read twice has its sum at the last place
    sums = torch.zeros(len(spans) + len(flags), dtype=torch.float64)  # of losses, and of true flags
    pending: list[tuple[Tensor, Tensor]] = []
    groups = micro_batches(spans, data.recipe.micro_batch, rank=distributed.rank(), world=distributed.world_size())
    for group in groups:
        batch = data.batch(group)
        total, each, once = module(batch.ids, batch.positions, batch.targets, batch.teacher)
        loss = total * (distributed.world_size() / max(targets, 1))  # sharding takes the mean over the processes
        (loss if once is None else loss + once / len(groups)).backward()
        pending.append((torch.tensor([index[span] for span in group], dtype=torch.int64), each.sum(dim=1)))
    for places, losses in pending:  # the only point in a step where the host waits for the device
        sums.index_add_(0, places, losses[: len(places)].double().cpu())
    sums[len(spans) :] = torch.tensor([float(flag()) for flag in flags])
    distributed.all_reduce(sums)
    return sums[: len(spans)].tolist(), [count > 0 for count in sums[len(spans) :].tolist()]


def _report_step(
    options: RunOptions,
    progress: ProgressTask,
    state: dict[str, Any],
    consumed: int,
    values: Mapping[str, float | None],
    note: str,
) -> None:
    """Show a finished step and write its metrics."""
    meter = options.meter
    loss = "-" if values["loss"] is None else fixed(values["loss"], 3)
    text = f"loss {loss}  rate {values['learning_rate']:.2g}  norm {values['grad_norm']:.2g}"
    text += f"  {note}" if note else ""
    mfu = "" if meter.utilization is None else f"  MFU {meter.utilization:.0%}"
    progress.advance(consumed, f"{text}  {meter.rate:,.0f} tokens/s{mfu}")
    entry = {"step": state["step"], "tokens": state["tokens"], **values, "tokens_per_second": meter.rate}
    options.metrics.write(entry if meter.utilization is None else {**entry, "mfu": meter.utilization})


def _report_heldout_loss(options: RunOptions, step: int, tokens: int, loss: float | None) -> None:
    if loss is not None:
        options.metrics.write({"step": step, "tokens": tokens, "heldout_loss": loss})


def _not_finite_error(
    data: Data, spans: list[Span], step: int, losses: list[float], norm: float, saver: Saver, options: RunOptions
) -> DivergenceError:
    """An error that names what to do first, the step, the documents of the windows at fault, and the last checkpoint.

    No rate is at fault before the first update.
    """
    saver.finish()
    bad = [span for span, loss in zip(spans, losses, strict=True) if not math.isfinite(loss)] or spans
    names = data.documents(bad)
    options.metrics.write({"step": step + 1, "event": "not finite", "grad_norm": str(norm), "documents": names})
    limit = 3 if saver.last else len(names)  # without a checkpoint the metrics file is removed, so list all
    documents = "; ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    last = f"the last good checkpoint is {saver.last}" if saver.last else "there is no checkpoint yet"
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
    figures = f"loss {total:g}, gradient norm {norm:g} at step {step + 1}"
    if step == 0:
        advice = "the weights or the text are at fault, since no update was made: see `secateur inspect`"
        return DivergenceError(f"{options.label}: {figures} in {documents}; {last}; {advice}")
    advice = f"{options.remedy}, in a new directory"
    return DivergenceError(f"{options.label}: {advice}: {figures}; {last}; the step's documents: {documents}")
