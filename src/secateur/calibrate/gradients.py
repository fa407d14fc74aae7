"""Gradients of the calibration loss, one block in memory at a time.

The states that enter each block are kept from a forward pass; then the blocks are visited from the last to the first,
each run again with its gradient. What is held is one block, its gradients, and the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.calibrate.engine import Block, BlockWalk, States
from secateur.calibrate.stats import GradientStatistic
from secateur.errors import UserError

__all__ = ["Gradients", "gradients_of"]

Gradients = Mapping[type, Mapping[str, Tensor]]  #: kind of statistic -> name of a tensor -> its value


def gradients_of(
    walk: BlockWalk, kinds: Sequence[type[GradientStatistic]], *, outer: bool = False
) -> Iterator[tuple[Block | None, Gradients]]:
    """Visit the blocks from the last to the first, each with statistics of its tensors' gradients.

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
    head = walk.head()
    upstream = [_loss_gradients(walk, head, *window)[0] for window in zip(walk.batches, leaving, strict=True)]
    del head  # the largest matrix there is
    for block in walk.blocks(backwards=True):
        found = {name: [kind() for kind in kinds] for name, _ in block.module.named_parameters()}
        windows = zip(entering.pop(), upstream, strict=True)
        upstream = [_through(block, states, behind, found) for states, behind in windows]
        yield block, _values(found, kinds)
    if outer:
        yield None, _values(_outside(walk, leaving, upstream, kinds), kinds)


def _through(block: Block, states: Tensor, behind: Tensor, found: Mapping[str, list[GradientStatistic]]) -> Tensor:
    """Carry a window's gradient back through a block, adding its tensors' to ``found``."""
    states = states.detach().requires_grad_()
    parameters = {name: parameter.requires_grad_() for name, parameter in block.module.named_parameters()}
    with torch.enable_grad():
        before, *gradients = torch.autograd.grad(block.forward(states), [states, *parameters.values()], behind)
    if not torch.isfinite(before).all():
        where = f"{block.walk.checkpoint.directory}: block {block.index}"
        raise UserError(f"{where} has a gradient of NaN or infinity on this calibration text")
    for name, gradient in zip(parameters, gradients, strict=True):
        for statistic in found[name]:
            statistic.update(gradient)
    return before


def _loss_gradients(
    walk: BlockWalk, head: Tensor, ids: Tensor, states: Tensor, *, outer: bool = False
) -> tuple[Tensor, ...]:
    """The gradient of a window's loss with respect to the last states and, for ``outer``, the final norm and head."""
    norm, head = walk.norm.requires_grad_(outer), head.requires_grad_(outer)
    states = states.detach().requires_grad_()
    wanted = [states, *norm.parameters(), head] if outer else [states]
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(walk.capped(norm(states)[0, :-1] @ head.T), ids[0, 1:])
        return torch.autograd.grad(loss, wanted)


def _outside(
    walk: BlockWalk, leaving: States, upstream: States, kinds: Sequence[type[GradientStatistic]]
) -> dict[str, list[GradientStatistic]]:
    """Statistics of the gradients of the tensors outside the blocks; a tied one has both its uses summed."""
    family, tied = walk.family, walk.checkpoint.shape.tied
    embed = walk.model.get_submodule(family.embedding.removesuffix(".weight")).requires_grad_()
    found = {name: [kind() for kind in kinds] for name in walk.checkpoint.outer_tensors()}
    head = walk.head()
    for ids, last, first in zip(walk.batches, leaving, upstream, strict=True):
        _, of_norm, of_head = _loss_gradients(walk, head, ids, last, outer=True)
        with torch.enable_grad():
            (table,) = torch.autograd.grad(embed(ids), embed.get_parameter("weight"), first)
        gradients = {
            family.embedding: table + of_head if tied else table,
            family.final_norm: of_norm,
            family.head: of_head,
        }
        for name, statistics in found.items():
            for statistic in statistics:
                statistic.update(gradients[name])
    return found


def _values(found: Mapping[str, list[GradientStatistic]], kinds: Sequence[type[GradientStatistic]]) -> Gradients:
    return {kind: {name: s[i].value() for name, s in found.items()} for i, kind in enumerate(kinds)}
