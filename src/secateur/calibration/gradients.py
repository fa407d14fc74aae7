"""Gradients of the calibration loss, one block in memory at a time.

The states that enter each block are kept from a forward pass; then the blocks are visited from the last to the first,
each run again with its gradient. What is held is one block, its gradients, and the states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.calibration.block_walk import Block, BlockWalk, States
from secateur.calibration.statistics import GradientStatistic, join
from secateur.errors import UserError
from secateur.model.checkpoint import is_finite

__all__ = ["Gradients", "gradients_of"]

Gradients = Mapping[type, Mapping[str, Tensor]]  #: kind of statistic -> name of a tensor -> its value


def gradients_of(
    walk: BlockWalk, kinds: Sequence[type[GradientStatistic]], *, outer: bool = False
) -> Iterator[tuple[Block | None, Gradients]]:
    """Visit the blocks from the last to the first, each with statistics of its tensors' gradients.

    Several processes go this way together, and only the first is shown anything, as by :meth:`BlockWalk.yield_on_main`.

    The loss is the mean over windows of a window's mean next-token loss, and a statistic sees one window at a time: the
    walk must have batches of one.

    Args:
        walk: over the blocks, with batches of one window.
        kinds: of statistics.
        outer: whether a last item, without a block, is for the tensors outside the blocks.
    """
    entering: list[States] = [walk.start()]
    for block in walk.blocks():
        entering.append(block.run(entering[-1]))
    leaving = entering.pop()
    upstream = [walk.store.save(gradient) for gradient in walk.head().gradients(walk.batches, leaving)]
    for block in walk.blocks(backwards=True):
        found = {name: [kind() for kind in kinds] for name, _ in block.module.named_parameters()}
        windows = zip(entering.pop(), upstream, strict=True)
        upstream = [walk.store.save(_through(block, states, behind, found)) for states, behind in windows]
        yield from walk.yield_on_main(block.index, (block, _values(found, kinds, walk.device)))
    if outer:
        values = _values(_outside(walk, leaving, upstream, kinds), kinds, walk.device)
        yield from walk.yield_on_main(len(walk.layers), (None, values))


def _through(block: Block, states: Tensor, behind: Tensor, found: Mapping[str, list[GradientStatistic]]) -> Tensor:
    """Carry a window's gradient back through a block, adding its tensors' to ``found``."""
    states = states.to(block.walk.device).detach().requires_grad_()
    parameters = {name: parameter.requires_grad_() for name, parameter in block.module.named_parameters()}
    with torch.enable_grad():
        out = block.forward(states)
        before, *gradients = torch.autograd.grad(out, [states, *parameters.values()], behind.to(out))
    if not is_finite(before):
        where = f"{block.walk.checkpoint.directory}: block {block.index}"
        raise UserError(f"{where} has a gradient of NaN or infinity on this calibration text")
    for name, gradient in zip(parameters, gradients, strict=True):
        for statistic in found[name]:
            statistic.update(gradient.float())
    return before


def _outside(
    walk: BlockWalk, leaving: States, upstream: States, kinds: Sequence[type[GradientStatistic]]
) -> dict[str, list[GradientStatistic]]:
    """Statistics of the gradients of the tensors outside the blocks; a tied one has both its uses summed.

    Here the head is whole in memory, in float32, and so are the gradients.
    """
    family, tied, device = walk.family, walk.checkpoint.shape.tied, walk.device
    found = {name: [kind() for kind in kinds] for name in walk.checkpoint.outer_tensors()}
    norm, end = walk.norm.requires_grad_(), walk.head()
    head = walk.checkpoint.tensor(family.head).to(device, torch.float32).requires_grad_()
    for ids, last, first in zip(walk.batches, leaving, upstream, strict=True):
        rows = walk.load_embeddings(ids)
        walk.embedding.requires_grad_()
        with torch.enable_grad():
            logits = end.cap_logits(norm(last[0, :-1].to(device)).float() @ head.T)
            loss = nn.functional.cross_entropy(logits, ids[0, 1:].to(device))
            of_norm, of_head = torch.autograd.grad(loss, [norm.get_parameter("weight"), head])
            weight = walk.embedding.get_parameter("weight")
            (of_rows,) = torch.autograd.grad(walk.embedding(rows), weight, first.to(device, weight.dtype))
        table = torch.zeros_like(head).index_copy_(0, ids.unique().to(device), of_rows.float())
        gradients = {
            family.embedding: table + of_head if tied else table,
            family.final_norm: of_norm,
            family.head: of_head,
        }
        for name, statistics in found.items():
            for statistic in statistics:
                statistic.update(gradients[name])
    return found


def _values(
    found: Mapping[str, list[GradientStatistic]], kinds: Sequence[type[GradientStatistic]], device: str
) -> Gradients:
    join(itertools.chain(*found.values()), device)
    return {kind: {name: s[i].value() for name, s in found.items()} for i, kind in enumerate(kinds)}
