"""What a method reads and what scoring with it costs: known before a model is opened."""

from __future__ import annotations

from secateur.calibration.statistics import GradientStatistic
from secateur.methods.base import ExpertMethod, LearnedMethod, Method, RemovalMethod, WeightMethod, WidthMethod
from secateur.model.shapes import Shape
from secateur.pruning.allocation.evolve import EvolveSettings
from secateur.pruning.target import Allocation, Propagate

__all__ = ["allocation_flops", "reads_text", "reconstruction_flops", "scoring_flops", "task_of"]


def scoring_flops(
    shape: Shape,
    after: Shape,
    method: Method,
    tokens: int,
    context: int,
    *,
    propagate: Propagate = "unpruned",
    allocation: Allocation = "uniform",
) -> float:
    """FLOPs of scoring: forward passes over the calibration tokens, in whole models' worth.

    A width method takes one pass, or two where each block runs before and after its own pruning, as it does for sparse
    methods, and for methods that remove experts with ``propagate`` pruned. Where scores are of gradients, a backward
    pass counts as two more, and one again for the second forward pass that it needs. Removals take one pass and, for
    each candidate, the blocks behind it. Learning is training: a backward pass counts as two more, or as one where the
    weights stay as they are. Of allocations of zeros, ``owl`` and ``global`` take one pass more, and ``evolve`` two,
    and those of the candidates.
    """
    if not method.calibrated:
        return 0.0
    passes = 1.0
    if isinstance(method, LearnedMethod):
        passes += 2.0 if method.rate > 0 else 1.0
    elif isinstance(method, RemovalMethod):
        count = shape.layers - after.layers
        length, rounds = (count, 1) if method.contiguous else (1, count if method.greedy else 1)
        passes += sum(sum(range(shape.layers - length + 1 - n)) - n for n in range(rounds)) / shape.layers
        passes += rounds - 1
    elif any(issubclass(kind, GradientStatistic) for kind in method.needs):
        passes += 3.0
    elif (
        isinstance(method, WeightMethod)
        or (isinstance(method, WidthMethod) and method.sequential)
        or (isinstance(method, ExpertMethod) and propagate == "pruned")
    ):
        passes += 1.0 - 1 / shape.layers  # nothing sees what the last block puts out
    return passes * tokens * shape.forward_flops(context) + allocation_flops(shape, method, tokens, context, allocation)


def allocation_flops(shape: Shape, method: Method, tokens: int, context: int, allocation: Allocation) -> float:
    """FLOPs of allocating the zeros of a sparse method: forward passes of the dense model and of candidates."""
    if not isinstance(method, WeightMethod) or not method.calibrated or allocation in ("uniform", "alpha"):
        return 0.0
    passes = 1.0
    if allocation == "evolve":
        windows = tokens // context
        passes += 1.0 + EvolveSettings().evaluations(windows) / max(1, windows)
    return passes * tokens * shape.forward_flops(context)


def reconstruction_flops(before: Shape, after: Shape, tokens: int, windows: int, context: int) -> float:
    """FLOPs of tuning the blocks of a pruned model to those of the dense one.

    With A and F, the FLOPs of a token forwards through attention and FFN of a pruned block (one layer after the other,
    without the head), a step of attention costs 3 A for each token; a step of the FFN runs attention as well, without
    a backward pass: A + 3 F. A block in one part costs 3 (A + F). Each token of the windows goes once through
    every dense block, and once more through every tuned one. Measuring the errors is left out.

    Args:
        tokens: that the steps of one part read.
        windows: tokens of all windows.
        context: tokens in a window.
    """
    dense, block = before.block_flops(context), after.block_flops(context)
    in_two_parts = "ffn_input" in after.family.sites
    attention = block - after.ffn_flops if in_two_parts else 0.0
    return tokens * (3.0 * block + attention) + windows * (dense + block)


def reads_text(method: Method) -> bool:
    """Whether the method scores on calibration text, and not on weights alone or by a task."""
    return method.calibrated and not task_of(method)


def task_of(method: Method) -> str:
    """The task that the method goes by; empty for none."""
    return method.task if isinstance(method, RemovalMethod) else ""
