"""Allocate the zeros of a sparse method to linears, before the walk that prunes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur import distributed
from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.statistics import MeanSquare
from secateur.errors import UserError
from secateur.formatting import plural
from secateur.methods.base import WeightMethod
from secateur.methods.selection import Selector
from secateur.progress import notify, track
from secateur.pruning.allocation.alpha import alpha_ratios, hill_exponent
from secateur.pruning.allocation.counts import linears_of, ratios_for_total, round_to_total, uniform_zeros
from secateur.pruning.allocation.evolve import EvolveSettings, evolve_levels
from secateur.pruning.allocation.owl import outlier_share, owl_ratios
from secateur.pruning.allocation.spliced import SplicedModels
from secateur.pruning.allocation.threshold import score_histogram, zeros_below_threshold
from secateur.pruning.matrix_pruning import check_statistics, prune_matrix
from secateur.pruning.target import Target

__all__ = ["allocate_zeros", "ratios_by_layer"]

_LEVELS = 8  #: levels above and below the uniform one
_STEP = 0.04  #: of the mean size of a linear: parameters between two levels


def allocate_zeros(method: WeightMethod, walk: BlockWalk, target: Target) -> dict[str, int]:
    """Linear -> the weights to prune in it; their sum is that of the uniform allocation, or of the layers' own ratios.

    Args:
        walk: over the dense model, with a journal of its own.
    """
    linears = linears_of(walk.checkpoint.shape)
    uniform = {n: uniform_zeros(method, out, width, target.sparsity) for n, (_, out, width) in linears.items()}
    if target.layer_ratios:
        return _by_block(walk, target.layer_ratios, None)
    with walk.journal.async_writes(walk.device):
        zeros = _ALLOCATIONS[target.allocation](method, walk, uniform, target.sparsity)
    walk.journal.close()
    return zeros


def ratios_by_layer(walk: BlockWalk, zeros: Mapping[str, int]) -> list[float]:
    """The share of zeros of each layer's linears."""
    linears, layers = linears_of(walk.checkpoint.shape), range(walk.checkpoint.shape.layers)
    sums = [[0, 0] for _ in layers]
    for name, (layer, out, width) in linears.items():
        sums[layer][0] += zeros[name]
        sums[layer][1] += out * width
    return [pruned / max(1, size) for pruned, size in sums]


def _by_block(walk: BlockWalk, ratios: Sequence[float], total: int | None, by: Any = "shift") -> dict[str, int]:
    """One ratio for all linears of a block, moved so that ``total`` weights go; None leaves the ratios as they are."""
    linears = linears_of(walk.checkpoint.shape)
    sizes = {name: out * width for name, (_, out, width) in linears.items()}
    every = [ratios[layer] for layer, _, _ in linears.values()]
    if total is not None:
        every, clipped = ratios_for_total(every, list(sizes.values()), total, by)
        if clipped:
            notify(f"`allocation`: the ratios of {plural(clipped, 'linear')} are clipped to 0 and 0.99")
    zeros = {name: ratio * sizes[name] for name, ratio in zip(sizes, every, strict=True)}
    return round_to_total(zeros, sizes, round(sum(zeros.values())) if total is None else total)


def _blocks(walk: BlockWalk, needs: Sequence[type]) -> Iterator[tuple[Block, dict[str, Any]]]:
    """The unfinished blocks of the dense model with statistics of their inputs."""
    return walk.observe(dict.fromkeys(walk.family.sites, needs) if needs else {})


def _linears(block: Block, stats: Mapping[str, Any], prepare: Any = None) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, weight and statistics, prepared once for each site, of every linear of a block."""
    walk, shared = block.walk, {}
    for linear in walk.checkpoint.shape.matrices(block.index):
        site, name = walk.family.site_of(linear), walk.family.block_tensor(block.index, linear)
        if site not in shared:
            check_statistics(stats.get(site, {}), name, walk.checkpoint.directory)
            shared[site] = prepare(stats.get(site, {})) if prepare else stats.get(site, {})
        yield name, block.weight(linear), shared[site]


def _owl(method: WeightMethod, walk: BlockWalk, uniform: Mapping[str, int], ratio: float) -> dict[str, int]:
    for block, stats in _blocks(walk, (MeanSquare,)):
        scores = [weight.abs() * inputs[MeanSquare].sqrt() for _, weight, inputs in _linears(block, stats)]
        walk.journal.put(block.index, {f"outliers.{block.index}": _scalar(outlier_share(scores))})
    return _by_block(walk, owl_ratios(_values(walk, "outliers."), ratio), sum(uniform.values()))


def _alpha(method: WeightMethod, walk: BlockWalk, uniform: Mapping[str, int], ratio: float) -> dict[str, int]:
    for block, _ in _blocks(walk, ()):
        exponents = [hill_exponent(weight) for _, weight, _ in _linears(block, {})]
        walk.journal.put(block.index, {f"alpha.{block.index}": _scalar(sum(exponents) / len(exponents))})
    return _by_block(walk, alpha_ratios(_values(walk, "alpha.")), sum(uniform.values()), "factor")


def _global(method: WeightMethod, walk: BlockWalk, uniform: Mapping[str, int], ratio: float) -> dict[str, int]:
    for block, stats in _blocks(walk, method.needs):
        entries = {}
        for name, weight, shared in _linears(block, stats, method.prepare):
            scores = method.score(weight, shared)
            if not bool((scores >= 0).all()):
                raise UserError(
                    "`allocation` global: compares scores of all linears, and this method has negative ones"
                )
            entries[f"histogram.{name}"] = score_histogram(scores)
        walk.journal.put(block.index, entries)
    return zeros_below_threshold(dict(walk.journal.with_prefix("histogram.")), sum(uniform.values()))


def _evolve(method: WeightMethod, walk: BlockWalk, uniform: Mapping[str, int], ratio: float) -> dict[str, int]:
    if distributed.world_size() > 1:
        raise UserError("`allocation` evolve: searches in one process; start it without torchrun")
    linears = linears_of(walk.checkpoint.shape)
    sizes = {name: out * width for name, (_, out, width) in linears.items()}
    step = max(1, round(_STEP * sum(sizes.values()) / len(sizes)))
    low = {n: -min(_LEVELS, uniform[n] // step) for n in sizes}
    high = {n: min(_LEVELS, max(0, int(0.99 * sizes[n]) - uniform[n]) // step) for n in sizes}
    layers = len(walk.layers)
    for block, stats in _blocks(walk, method.needs):
        entries = {}
        for name, weight, shared in _linears(block, stats, method.prepare):
            for level in range(low[name], high[name] + 1):
                select = Selector(0, method.compare, zeros=uniform[name] + level * step, width=weight.shape[1])
                pruned, keep = prune_matrix(method, weight, shared, select, name, walk.checkpoint.directory)
                entries[f"level.{name}.{level}"] = pruned if method.updates else keep
        walk.journal.put(block.index, entries)
    if (result := walk.journal.get("levels")) is None:
        settings, names = EvolveSettings(), list(sizes)
        models = SplicedModels(walk, walk.journal, method.updates, names)
        with track("search the allocation", settings.generations) as progress:
            levels = evolve_levels(
                tuple(low.values()),
                tuple(high.values()),
                len(models.windows),
                models.divergences,
                settings,
                lambda: progress.advance(1),
            )
        result = torch.tensor(levels)
        walk.journal.put(layers, {"levels": result})
    return {name: uniform[name] + level * step for name, level in zip(sizes, result.tolist(), strict=True)}


_ALLOCATIONS = {"owl": _owl, "alpha": _alpha, "global": _global, "evolve": _evolve}


def _values(walk: BlockWalk, prefix: str) -> list[float]:
    return [float(walk.journal[f"{prefix}{layer}"]) for layer in range(len(walk.layers))]


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
