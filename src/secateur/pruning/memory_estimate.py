"""The memory and disk that pruning needs, estimated from shapes before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.calibration.layer_removal import GROUP_BYTES
from secateur.calibration.statistics import GradientStatistic, Gram
from secateur.methods.base import Method, RemovalMethod, WeightMethod
from secateur.model.shapes import Shape
from secateur.training.recipe import Recipe

__all__ = ["MemoryEstimate", "estimate_memory", "estimate_training_memory"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, above what the process holds already; of several processes, what the first one needs."""

    block: int  #: one block's weights, statistics and activations, where it is computed
    coming: int  #: the next block's weights, which a GPU gets meanwhile
    leaving: int  #: what is found in one block, which leaves a GPU meanwhile
    states: int  #: the states between blocks
    kept: int  #: what is found in all blocks, for all outputs, on disk until they are written
    output: int  #: the checkpoint to be written, on disk

    def host(self, device: str, states: str) -> int:
        """Memory on the host, where states lie in ``ram``, on the ``device`` or on ``disk``."""
        return (self.block if device == "cpu" else self.leaving) + (self.states if states == "ram" else 0)

    def device(self, states: str) -> int:
        """Memory on a GPU."""
        return self.block + self.coming + self.leaving + (self.states if states == "device" else 0)

    def disk(self, states: str, processes: int = 1) -> int:
        """Room for files, of all processes together."""
        return self.kept + self.output + (processes * self.states if states == "disk" else 0)


def estimate_memory(
    method: Method,
    shape: Shape,
    windows: int,
    seqlen: int,
    batch: int,
    dtype: torch.dtype,
    stored: int,
    outputs: Sequence[Shape],
) -> MemoryEstimate:
    """Reckon what scoring ``windows`` of ``seqlen`` tokens and cutting will need.

    Args:
        method: how.
        shape: the model, whole.
        windows: of calibration; 0 where the method reads none.
        seqlen: tokens in each.
        batch: windows at once.
        dtype: of the forward pass.
        stored: bytes of the checkpoint.
        outputs: the shapes of the checkpoints to be written.
    """
    sizes = [math.prod(shape.tensor_size(axes)) for axes in shape.block_tensors().values()]
    weights, largest = sum(sizes), max(sizes)
    gradients = [need for need in method.needs if issubclass(need, GradientStatistic)]
    batch = min(1 if gradients else batch, windows)
    states = windows * seqlen * shape.hidden * dtype.itemsize
    # What a block holds at once besides its states: about four times the FFN's width and six times the hidden size.
    activations = batch * seqlen * (4 * shape.ffn + 6 * shape.hidden) * dtype.itemsize
    block = weights * dtype.itemsize + activations + 3 * 4 * largest
    if Gram in method.needs:
        widths = [shape.axis_size(site.space) for site in shape.family.sites.values()]
        block += 4 * (sum(width**2 for width in widths) + 3 * max(widths) ** 2)
    if gradients:
        # On the way back activations make room for gradients; then the method sees float32 weights.
        block += weights * 4 * len(gradients) + max(activations, weights * 4)
        states *= shape.layers + 2
        if any(after.hidden != shape.hidden for after in outputs):
            block = max(block, _outer(shape, len(gradients)))
    if isinstance(method, RemovalMethod):
        states = max(min(states * (shape.layers + 1), GROUP_BYTES), states // max(windows // max(batch, 1), 1))
    kept, output = 0, sum(round(stored * after.total / shape.total) for after in outputs)
    if isinstance(method, WeightMethod):  # masks are in the journal and in the plan, a byte for each weight
        kept = shape.block_weights * (1 + (2 if method.updates else 0))
        output += shape.block_weights * len(outputs)
    leaving = kept // shape.layers
    return MemoryEstimate(block, weights * dtype.itemsize, leaving, states, kept * len(outputs), output)


def estimate_training_memory(
    shape: Shape, outputs: Sequence[Shape], recipe: Recipe, *, trained: bool, dtype: str
) -> tuple[int, int]:
    """Reckon what learning a shape will need, in all processes together.

    Args:
        shape: the model, whole.
        outputs: the shapes of the checkpoints to be written.
        recipe: of the training.
        trained: whether weights are trained along.
        dtype: of what is computed.

    Returns:
        Bytes of memory, and of disk besides a second copy of the model as it is stored.
    """
    held = 16 if trained else 4  # bytes of a float32 weight, with its gradient and its two moments
    tokens = min(recipe.micro_batch * recipe.sequence, recipe.tokens_per_step)
    # What a block keeps for the backward pass: its linears' inputs and what the gates multiply.
    kept = tokens * shape.layers * (6 * shape.ffn + 16 * shape.hidden) * (2 if dtype == "bfloat16" else 4)
    saved = 3 * 12 * shape.total if trained else 0  # two checkpoints of the run, and one that is being written
    return held * shape.total + kept, saved + sum(4 * after.total for after in outputs)


def _outer(shape: Shape, kinds: int) -> int:
    """Bytes for scoring hidden channels by gradients of the embedding and the head, whole and in float32.

    Of each there are the weights and ``kinds`` statistics, and of one of them four products of these.
    """
    matrix = 4 * shape.vocabulary * shape.hidden
    return matrix * ((1 if shape.tied else 2) * (1 + kinds) + 4)
