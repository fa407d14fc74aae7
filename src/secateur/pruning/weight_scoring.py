"""Score and select single weights, block after block: masks, and changed weights, for a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from secateur.calibration.block import Block
from secateur.calibration.block_walk import BlockWalk
from secateur.formatting import plural
from secateur.methods.base import WeightMethod
from secateur.methods.selection import Selector
from secateur.pruning.expert_weights import ExpertPruner
from secateur.pruning.matrix_pruning import check_statistics, prune_matrix
from secateur.pruning.target import Target

__all__ = ["decide_weights"]


def decide_weights(
    method: WeightMethod, walk: BlockWalk, target: Target, zeros_of: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Prune block after block; each block reads the outputs of the pruned blocks before it.

    Args:
        zeros_of: weights to prune in each linear; None for the same share of each.
    """
    family, shape = walk.family, walk.checkpoint.shape
    compare = "linear" if target.allocation == "global" else method.compare
    select = Selector(target.sparsity, compare, target.pattern.group if target.pattern else None)
    needs: Mapping[str, Sequence[type]] = dict.fromkeys(family.sites, method.needs) if method.needs else {}
    masks, weights = walk.journal.with_prefix("mask."), walk.journal.with_prefix("weight.")
    experts = ExpertPruner(method, walk, select) if family.experts else None

    def restore(block: Block) -> None:
        for linear in shape.matrices(block.index):
            name = family.block_tensor(block.index, linear)
            block.set_weight(
                linear, weights[name] if method.updates else block.weight(linear) * masks[name].to(walk.device)
            )
        if experts:
            experts.restore(block)

    for block, stats in walk.observe(needs, visits=experts.visits if experts else None, replay=restore):
        entries = _prune_block(method, block, stats, select, walk.checkpoint.masks, zeros_of)
        walk.journal.put(block.index, entries | (experts.entries(block.index) if experts else {}))
        if experts:
            experts.restore(block)
    zeros = {name: int(count) for name, count in walk.journal.with_prefix("zeros.").items()}
    pruned, total = sum(zeros.values()), shape.block_weights
    names = [
        (family.block_tensor(layer, linear), math.prod(shape.tensor_size(shape.block_tensors(layer)[linear])))
        for layer in range(shape.layers)
        for linear in shape.linears(layer)
    ]
    earlier = sum(mask.numel() - int(mask.count_nonzero()) for mask in walk.checkpoint.masks.values())
    summary = {
        "detail": f"{pruned:,} of {plural(total, 'block weight')} zeroed ({100 * pruned / total:.1f}%)"
        + (f", {earlier:,} of them by the masks of the checkpoint" if earlier else "")
        + (f", pattern {target.pattern}" if target.pattern else ""),
        "sparsity": {name: zeros[name] / size for name, size in names},
    }
    if experts and method.needs:
        summary["routing"] = experts.report()
    return {"masks": masks, "weights": weights, "zeroed": pruned, "summary": summary}


def _prune_block(
    method: WeightMethod,
    block: Block,
    stats: dict[str, dict[type, Tensor]],
    select: Selector,
    masks: Mapping[str, Tensor],
    zeros: Mapping[str, int] | None,
) -> dict[str, Tensor]:
    """Prune a block's linears in place; return journal entries with masks, numbers of zeros, and changed weights.

    Statistics are freed on the way, since some are matrices over all pairs of channels.

    Args:
        masks: of an earlier pruning of the checkpoint; what they drop stays pruned.
        zeros: weights to prune in each linear; None for the same share of each.
    """
    walk, entries = block.walk, dict[str, Tensor]()
    by_site: dict[str, dict[str, str]] = {}
    for linear in walk.checkpoint.shape.matrices(block.index):
        by_site.setdefault(walk.family.site_of(linear), {})[linear] = walk.family.block_tensor(block.index, linear)
    for site, names in by_site.items():
        statistics = stats.pop(site, {})
        check_statistics(statistics, next(iter(names.values())), walk.checkpoint.directory)
        shared = method.prepare(statistics)
        del statistics
        for linear, name in names.items():
            weight = block.weight(linear)
            mask = masks[name].to(weight.device) if name in masks else None
            masked = dataclasses.replace(select, mask=mask)
            if zeros is not None:
                masked = dataclasses.replace(select, zeros=zeros[name], width=weight.shape[1])
            weight, keep = prune_matrix(method, weight, shared, masked, name, walk.checkpoint.directory)
            if method.updates:  # in the stored dtype, so that the next block reads the weights that are written
                weight = entries[f"weight.{name}"] = weight.to(walk.checkpoint.dtype_of(name))
            block.set_weight(linear, weight)
            entries[f"mask.{name}"] = keep
            entries[f"zeros.{name}"] = keep.numel() - keep.count_nonzero()  # a sum of bool copies it to int64
        del shared
    return entries
