"""The training loop, to be read downward: exact tokens in, a curve of held-out losses out.

The data order is a pure function of the slice, its seed and the step, so the whole state of a run is its weights, its
moments and its step. A run that was killed goes on from its last checkpoint and ends, on a CPU with as many threads, at
the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from secateur.errors import UserError
from secateur.progress import task
from secateur.token_loss import model_loss
from secateur.train.masks import Masks
from secateur.train.optim import Recipe, learning_rate, make_optimizer
from secateur.train.state import load_latest, save_state

__all__ = ["Slice", "train"]


class Tokens(Protocol):
    """A split of a corpus that can be read by token index."""

    def read(self, split: str, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Slice:
    """The tokens ``[start, stop)`` of a corpus's training split."""

    store: Tokens
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.stop - self.start

    def order(self, recipe: Recipe) -> list[int]:
        """The slice's whole windows in the order in which they are read: neighbours in a document end up far apart."""
        generator = torch.Generator().manual_seed(recipe.data_seed)
        return torch.randperm(self.tokens // recipe.sequence, generator=generator).tolist()

    def step(self, step: int, order: list[int], recipe: Recipe) -> list[Tensor]:
        """The windows of one step: [windows, sequence], and, in the last, what is left of the slice as [1, rest]."""
        each = recipe.tokens_per_step // recipe.sequence
        parts = []
        if chosen := order[step * each : (step + 1) * each]:
            starts = [self.start + window * recipe.sequence for window in chosen]
            parts.append(np.stack([self.store.read("train", at, at + recipe.sequence) for at in starts]))
        rest = self.tokens % recipe.sequence
        if rest and step == recipe.steps(self.tokens) - 1:
            parts.append(self.store.read("train", self.stop - rest, self.stop)[None])
        return [torch.from_numpy(part) for part in parts]


def train(
    model: PreTrainedModel,
    data: Slice,
    recipe: Recipe,
    *,
    masks: Mapping[str, Tensor],
    measure: Callable[[PreTrainedModel], float],
    points: int,
    folder: Path,
    label: str,
    save_every: int = 100,
) -> dict[str, Any]:
    """Train ``model`` in place on every token of ``data``, once.

    Args:
        model: float32 parameters.
        data: the exact slice; a window's first token is context, so a window of T tokens gives T - 1 targets.
        recipe: optimiser, schedule and batch.
        masks: parameter name -> bool, True where kept; empty for a dense model.
        measure: gives the held-out loss.
        points: how many times it is measured after the start, evenly spread over the steps.
        folder: where training checkpoints lie; an earlier one found there is gone on from.
        label: what progress is shown as.
        save_every: steps between checkpoints.

    Returns:
        ``curve`` (tokens, loss, training_loss, learning_rate of each point), ``tokens``, ``targets`` and ``steps``.

    Raises:
        UserError: if the loss or the gradient is no longer finite.
    """
    steps = recipe.steps(data.tokens)
    evaluate_after = {round(steps * (i + 1) / points) for i in range(points)} | {steps}
    order = data.order(recipe)
    held = Masks(model, masks)
    optimizer = make_optimizer(model, recipe)
    state = load_latest(folder, model, optimizer)
    if state is None:
        held.apply()
        first = {"tokens": 0, "loss": measure(model), "training_loss": None, "learning_rate": None}
        state = {"step": 0, "tokens": 0, "targets": 0, "curve": [first]}
    model.train()
    with task(label, data.tokens) as progress:
        progress.advance(state["tokens"], "resumed" if state["step"] else "")
        for step in range(state["step"], steps):
            rate = learning_rate(recipe, step, steps)
            windows = data.step(step, order, recipe)
            loss, targets = _accumulate(model, windows, recipe.micro_batch)
            held.apply_to_gradients()
            norm = float(clip_grad_norm_(model.parameters(), recipe.clip))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(f"{label}: loss {loss}, gradient norm {norm} at step {step}; lower recipe.peak_rate")
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            held.apply()
            consumed = sum(w.numel() for w in windows)
            state["step"] = step + 1
            state["tokens"] += consumed
            state["targets"] += targets
            if step + 1 in evaluate_after:
                held.check()
                point = {"loss": measure(model), "training_loss": loss, "learning_rate": rate}
                state["curve"].append({"tokens": state["tokens"], **point})
            if (step + 1) % save_every == 0 or step + 1 == steps:
                save_state(folder, model, optimizer, state)
            progress.advance(consumed, f"loss {loss:.3f}")
    assert state["tokens"] == data.tokens, "the slice was not consumed to the token"
    return {key: state[key] for key in ("curve", "tokens", "targets")} | {"steps": steps}


def _accumulate(model: PreTrainedModel, windows: list[Tensor], micro_batch: int) -> tuple[float, int]:
    """Add up the gradient of a step's mean loss over micro-batches; return that loss and its number of targets."""
    targets = sum(w.shape[0] * (w.shape[1] - 1) for w in windows)
    total = 0.0
    for part in windows:
        for ids in part.split(micro_batch):
            if ids.shape[1] < 2:
                continue  # a lone last token has nothing to predict, but it counts as consumed
            loss = model_loss(model, ids.to(model.device))[0] / targets
            loss.backward()
            total += loss.item()
    return total, targets
