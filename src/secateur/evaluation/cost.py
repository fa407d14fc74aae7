"""Cost of running a model: size, KV cache, speed and memory, measured on the present device.

Speeds are those of plain transformers: good for comparing models, not the best of a serving engine. Every speed is the
median over repeats, after a warm-up, with its quartiles. Prefill is one pass over a prompt, up to the first new token;
decode is greedy, one token at a time, with the KV cache. Peak memory is that allocated by torch on a GPU; on a CPU,
that of the process without mapped files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.evaluation.workload import Workload
from secateur.memory import track_resources
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.model.expert_matrices import weight_matrices
from secateur.model.families import Axis
from secateur.model.quantisation import ServedWeights
from secateur.progress import track
from secateur.runtime import environment

__all__ = ["Figure", "measure_cost", "pattern_of", "sparsity"]

DENSE, SEMI_STRUCTURED = "dense", "2:4 kernels"
UNTIMED = "not timed: the speed of such weights depends on the kernels of the server"
NEEDS = "not measured: needs a GPU of compute capability 8.0 or newer"


@dataclass(frozen=True)
class Figure:
    """One figure; ``low`` and ``high`` are the quartiles over repeats."""

    name: str
    value: float
    unit: str
    execution: str = DENSE
    batch: int | None = None
    low: float | None = None
    high: float | None = None
    repeats: int | None = None

    def record(self) -> dict[str, Any]:
        """The fields that are not None, as plain values."""
        return {key: value for key, value in vars(self).items() if value is not None}


def measure_cost(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    workload: Workload | None = None,
    served: ServedWeights | None = None,
) -> dict[str, Any]:
    """Measure the cost of running a model on its device and in its dtype.

    Args:
        model: in evaluation mode.
        workload: sizes of the timed runs, shortened to the model's positions; None for the defaults.
        served: what became of the weights; sizes alone are then given. None for the stored ones.

    Returns:
        ``figures``, each with its unit; the ``workload`` that was run, None if none was; ``device``, ``dtype``,
        ``threads`` and versions; and the gain from ``sparsity``, or the reason why it was not measured.
    """
    workload = (workload or Workload()).within(max_positions(checkpoint.config))
    device = str(model.device)
    figures = _sizes(checkpoint, model, served)
    sparsity, more = {"pattern": None, "note": UNTIMED}, ()
    if served is None:
        rounds = len(workload.batches) * (workload.warm_up + workload.repeats)
        with track("measure the cost", rounds) as progress:
            figures += _speeds(model, workload, DENSE, progress.advance)
        sparsity, more = _sparsity_gain(checkpoint, model, workload)
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "environment": environment(),
        "workload": {**vars(workload), "batches": list(workload.batches)} if served is None else None,
        "figures": [figure.record() for figure in (*figures, *more)],
        "sparsity": sparsity,
    }


def _sizes(checkpoint: Checkpoint, model: PreTrainedModel, served: ServedWeights | None) -> list[Figure]:
    sizes = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}  # tied weights once
    return [
        Figure("parameters", sum(p.numel() for p in model.parameters()), "parameters"),
        Figure("checkpoint on disk", checkpoint.stored_bytes, "bytes"),
        Figure(f"weights in {served.weights}", served.bytes, "bytes")
        if served
        else Figure("weights in memory", sum(sizes.values()), "bytes"),
    ]


def _speeds(
    model: PreTrainedModel, workload: Workload, execution: str, advance: Callable[[], None] | None = None
) -> list[Figure]:
    """Measure prefill, decode, time to the first token, peak memory and KV cache, for each batch size."""
    figures = []
    device = str(model.device)
    for batch in workload.batches:
        ids = _prompt(model, batch, workload.prompt)
        seconds, cache_bytes = [], 0
        with track_resources(device) as use:
            for repeat in range(-workload.warm_up, workload.repeats):
                *times, cache_bytes = _run(model, ids, workload.new)
                if repeat >= 0:
                    seconds.append(times)
                if advance:
                    advance()
        first, rest = np.asarray(seconds).T
        measured = [
            ("prefill", batch * workload.prompt / first, "tokens/s"),
            ("decode", batch * (workload.new - 1) / rest, "tokens/s"),
            ("time to first token", 1e3 * first, "ms"),
        ]
        figures += [_median_figure(name, values, unit, execution, batch) for name, values, unit in measured]
        peak = use.device if device.startswith("cuda") else use.memory
        if peak is not None:
            figures.append(Figure("peak memory", peak, "bytes", execution, batch))
        if batch == workload.batches[0]:
            cached_tokens = batch * (workload.prompt + workload.new - 1)
            figures.append(Figure("KV cache", cache_bytes / cached_tokens, "bytes/token", execution))
    return figures


def _median_figure(name: str, values: np.ndarray, unit: str, execution: str, batch: int) -> Figure:
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Figure(name, median, unit, execution, batch, low, high, len(values))


def _prompt(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.config.vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


@torch.no_grad()
def _run(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[float, float, int]:
    """Prefill ``ids`` [batch, positions] and generate ``new`` tokens.

    Returns:
        Seconds until the first new token, seconds for the other tokens, and the bytes of the KV cache at the end.
    """

    def step(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out: Any = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1), out.past_key_values

    start = _synchronized_time(model)
    token, cache = step(ids, None)
    first = _synchronized_time(model)
    for _ in range(new - 1):
        token, cache = step(token, cache)
    end = _synchronized_time(model)
    cache_bytes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    return first - start, end - first, cache_bytes


def _synchronized_time(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def pattern_of(masks: Mapping[str, Tensor], tensors: Mapping[str, tuple[Axis, ...]] | None = None) -> str | None:
    """``2:4`` if each mask keeps at most two of four weights in a row, else ``unstructured``; None without masks.

    Args:
        tensors: name -> spaces, to find the rows in masks of routed experts.
    """
    if not masks:
        return None
    matrices = (
        matrix
        for name, mask in masks.items()
        for part in (mask if mask.dim() == 3 else (mask,))
        for matrix in (weight_matrices(part, (tensors or {})[name]) if mask.dim() == 3 else (part,))
    )
    fits = all(m.shape[1] % 4 == 0 and int(m.reshape(-1, 4).sum(dim=1).max()) <= 2 for m in matrices)
    return "2:4" if fits else "unstructured"


def sparsity(checkpoint: Checkpoint) -> float:
    """The share of exact zeros among the weights of the block linears."""
    zeros = weights = 0
    layers = checkpoint.shape.layers
    with track("count zeros", layers) as progress:
        for layer in range(layers):
            for linear in checkpoint.shape.linears(layer):
                tensor = checkpoint.tensor(checkpoint.family.block_tensor(layer, linear))
                zeros += int((tensor == 0).sum())
                weights += tensor.numel()
            progress.advance()
    return zeros / weights


def _sparsity_gain(
    checkpoint: Checkpoint, model: PreTrainedModel, workload: Workload
) -> tuple[dict[str, Any], Sequence[Figure]]:
    """Measure the gain from the masks beside a checkpoint.

    Returns:
        Pattern, share of zeros and a note; and the figures, if 2:4 kernels could be timed.
    """
    masks = checkpoint.masks
    pattern = pattern_of(masks, checkpoint.tensors())
    if pattern is None:
        return {"pattern": None, "note": "no masks: the model is dense"}, []
    zeros = 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    answer: dict[str, Any] = {"pattern": pattern, "zeros": zeros}
    if pattern == "unstructured":
        note = "dense kernels multiply the zeros too: neither speed nor memory gain anything from them"
        return {**answer, "note": note}, []
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        return {**answer, "note": NEEDS}, []
    try:
        _use_semi_structured(model, masks)
        with track("measure 2:4 kernels", 0):
            figures = _speeds(model, workload, SEMI_STRUCTURED)
        return {**answer, "note": "with torch.sparse semi-structured kernels"}, figures
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {
            **answer,
            "note": f"not measured: the 2:4 kernels refuse this model: {' '.join(str(error).split())}",
        }, []


def _use_semi_structured(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Convert the masked weights, in place, to the format of torch's 2:4 kernels."""
    from torch.sparse import to_sparse_semi_structured

    for name in masks:
        linear: Any = model.get_submodule(name.removesuffix(".weight"))
        linear.weight = nn.Parameter(to_sparse_semi_structured(linear.weight.detach()), requires_grad=False)
