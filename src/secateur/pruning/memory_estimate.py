"""The memory and disk that pruning needs, estimated from shapes before it starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.calibration.layer_removal import GROUP_BYTES
from secateur.calibration.statistics import GradientStatistic, Gram
from secateur.methods.base import Method, RemovalMethod, WeightMethod
from secateur.model.shapes import Shape
from secateur.training.recipe import Recipe

__all__ = ["MemoryEstimate", "estimate_memory", "estimate_training_memory", "with_reconstruction"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that pruning needs above the process's present memory; of several processes, for the first one."""

    block: int  #: one block's weights, statistics and activations, where it is computed
    coming: int  #: the next block's weights, prefetched to a GPU
    leaving: int  #: results of one block, on their way from a GPU to disk
    states: int  #: the states between blocks
    journal: int  #: results of all blocks for all outputs, on disk until the outputs are written
    output: int  #: the checkpoints to write, on disk

    def host(self, device: str, states: str) -> int:
        """Memory on the host; ``states`` is ``ram``, ``device`` or ``disk``."""
        return (self.block if device == "cpu" else self.leaving) + (self.states if states == "ram" else 0)

    def device(self, states: str) -> int:
        """Memory on a GPU."""
        return self.block + self.coming + self.leaving + (self.states if states == "device" else 0)

    def disk(self, states: str, processes: int = 1) -> int:
        """Disk space of all processes together."""
        return self.journal + self.output + (processes * self.states if states == "disk" else 0)


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
    """Estimate the needs of scoring ``windows`` of ``seqlen`` tokens and cutting.

    Args:
        windows: calibration windows; 0 where the method reads no text.
    """
    blocks = [_resident_sizes(shape, layer) for layer in range(shape.layers if shape.kinds else 1)]
    weights, largest = max(map(sum, blocks)), max(map(max, blocks))
    gradients = [need for need in method.needs if issubclass(need, GradientStatistic)]
    batch = min(1 if gradients else batch, windows)
    states = windows * seqlen * shape.hidden * dtype.itemsize
    # What a block holds at once besides its states: about four times the FFN's width and six times the hidden size.
    ffn = (shape.ffn if shape.layers_with("ffn") else 0) + dict(shape.fixed).get("shared_ffn", 0)
    activations = batch * seqlen * (4 * ffn + 6 * shape.hidden) * dtype.itemsize
    block = weights * dtype.itemsize + activations + 3 * 4 * largest
    if shape.experts:
        block += _expert_bytes(shape, batch * seqlen, dtype)
    if Gram in method.needs:
        widths = [shape.axis_size(site.space) for site in shape.family.sites.values()]
        block += 4 * (sum(width**2 for width in widths) + 3 * max(widths) ** 2)
    if gradients:
        # On the way back activations make room for gradients; then the method sees float32 weights.
        block += weights * 4 * len(gradients) + max(activations, weights * 4)
        states *= shape.layers + 2
        if any(after.hidden != shape.hidden for after in outputs):
            block = max(block, _outer_bytes(shape, len(gradients)))
    if isinstance(method, RemovalMethod):
        states = max(min(states * (shape.layers + 1), GROUP_BYTES), states // max(windows // max(batch, 1), 1))
    journal, output = 0, sum(round(stored * after.total / shape.total) for after in outputs)
    if isinstance(method, WeightMethod):  # masks are in the journal and in the plan, a byte for each weight
        journal = shape.block_weights * (1 + (2 if method.updates else 0))
        output += shape.block_weights * len(outputs)
    if shape.experts and (isinstance(method, WeightMethod) or any(a.expert_ffn != shape.expert_ffn for a in outputs)):
        states *= 2  # what enters the experts of one block is kept for as long as they are visited
        block += journal // shape.layers
    leaving = journal // shape.layers
    return MemoryEstimate(block, weights * dtype.itemsize, leaving, states, journal * len(outputs), output)


def with_reconstruction(
    needs: MemoryEstimate,
    shape: Shape,
    outputs: Sequence[Shape],
    windows: int,
    seqlen: int,
    batch: int,
    dtype: torch.dtype,
) -> MemoryEstimate:
    """The needs of scoring and cutting, and those of tuning the blocks behind it (:func:`reconstruct`).

    A block is in memory in float32, with the gradients and two moments of its attention or its FFN. Three sets of
    states are between blocks: what enters the pruned block, and what leaves the dense one and its attention.
    """
    weights, tuned = max(_part_sizes(after) for after in outputs)
    tokens = min(batch, windows) * seqlen
    activations = tokens * (6 * shape.ffn + 16 * shape.hidden) * 4  # kept for the backward pass
    block = 4 * weights + 12 * tuned + activations
    states = 3 * windows * seqlen * shape.hidden * dtype.itemsize
    journal = sum(after.layers * _part_sizes(after)[0] * 4 for after in outputs)
    return dataclasses.replace(
        needs,
        block=max(needs.block, block),
        states=max(needs.states, states),
        journal=needs.journal + journal,
    )


def _part_sizes(shape: Shape) -> tuple[int, int]:
    """Parameters of the largest block, and of the larger one of its two parts, attention and FFN."""
    sizes = []
    for layer in range(shape.layers if shape.kinds else 1):
        total, ffn = sum(_resident_sizes(shape, layer)), shape.ffn_weights(layer)
        sizes.append((total, max(ffn, total - ffn)))
    return max(sizes)


def _resident_sizes(shape: Shape, layer: int) -> list[int]:
    """Parameters of each tensor that is in memory while a block is: all but those of its routed experts."""
    tensors = shape.block_tensors(layer).items()
    return [math.prod(shape.tensor_size(axes)) for name, axes in tensors if not shape.is_routed(name)]


def _expert_bytes(shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    """Bytes for the one routed expert that is in memory, and for its activations if all tokens were routed to it.

    Its weights are there as they are stored, in parts and as a whole, and in the type of the walk.
    """
    weights = 3 * shape.hidden * shape.expert_ffn
    activations = tokens * (4 * shape.expert_ffn + 4 * shape.hidden)
    return weights * (2 * 4 + dtype.itemsize) + activations * dtype.itemsize


def estimate_training_memory(
    shape: Shape, outputs: Sequence[Shape], recipe: Recipe, *, trained: bool, dtype: str
) -> tuple[int, int]:
    """Estimate the needs of learning a shape, of all processes together.

    Returns:
        Bytes of memory, and bytes of disk besides a second copy of the stored model.
    """
    weight_bytes = 16 if trained else 4  # bytes of a float32 weight, with its gradient and its two moments
    tokens = min(recipe.micro_batch * recipe.sequence, recipe.tokens_per_step)
    # What a block keeps for the backward pass: its linears' inputs and what the gates multiply.
    activations = tokens * shape.layers * (6 * shape.ffn + 16 * shape.hidden) * (2 if dtype == "bfloat16" else 4)
    saved = 3 * 12 * shape.total if trained else 0  # two checkpoints of the run, and one that is being written
    return weight_bytes * shape.total + activations, saved + sum(4 * after.total for after in outputs)


def _outer_bytes(shape: Shape, kinds: int) -> int:
    """Bytes for scoring hidden channels by gradients of the embedding and the head, whole and in float32.

    Of each there are the weights and ``kinds`` statistics, and of one of them four products of these.
    """
    matrix = 4 * shape.vocabulary * shape.hidden
    return matrix * ((1 if shape.tied else 2) * (1 + kinds) + 4)
