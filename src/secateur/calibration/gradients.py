"""Gradients of the calibration loss, one block in memory at a time.

A forward pass stores the states that enter each block. Then each block, from the last to the first, runs again with
gradients. Memory holds one block, its gradients, and the states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.calibration.block import Block, States
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.statistics import GradientStatistic, join
from secateur.errors import UserError
from secateur.model.checkpoint import is_finite

__all__ = ["Gradients", "gradients_of"]

Gradients = Mapping[type, Mapping[str, Tensor]]  #: kind of statistic -> name of a tensor -> its value


def gradients_of(
    walk: BlockWalk, kinds: Sequence[type[GradientStatistic]], *, outer: bool = False
) -> Iterator[tuple[Block | None, Gradients]]:
    """Visit the blocks from the last to the first, each with statistics of its tensors' gradients.

    Only the main process yields, as in :meth:`BlockWalk.yield_on_main`. The loss is the mean over windows of each
    window's mean next-token loss, and a statistic takes one window at a time.

    Args:
        walk: the walk over the blocks, with batches of one window.
        outer: whether to yield a last item, with None for the block, for the tensors outside the blocks.
    """
    entering: list[States] = [walk.start()]
    for block in walk.blocks():
        entering.append(block.run(entering[-1]))
    leaving = entering.pop()
    upstream = [walk.store.save(gradient) for gradient in walk.head().gradients(walk.batches, leaving)]
    for block in walk.blocks(backwards=True):
        statistics = {name: [kind() for kind in kinds] for name, _ in block.module.named_parameters()}
        windows = zip(entering.pop(), upstream, strict=True)
        upstream = [walk.store.save(_backward(block, states, gradient, statistics)) for states, gradient in windows]
        yield from walk.yield_on_main(block.index, (block, _values(statistics, kinds, walk.device)))
    if outer:
        values = _values(_outer_statistics(walk, leaving, upstream, kinds), kinds, walk.device)
        yield from walk.yield_on_main(len(walk.layers), (None, values))


def _backward(
    block: Block, states: Tensor, upstream: Tensor, statistics: Mapping[str, list[GradientStatistic]]
) -> Tensor:
    """Carry a window's gradient back through a block and update the statistics of the block's tensors."""
    states = states.to(block.walk.device).detach().requires_grad_()
    parameters = {name: parameter.requires_grad_() for name, parameter in block.module.named_parameters()}
    with torch.enable_grad():
        out = block.forward(states)
        inputs = [states, *parameters.values()]  # a bias that only chooses experts has no gradient: zeros
        downstream, *gradients = torch.autograd.grad(out, inputs, upstream.to(out), materialize_grads=True)
    if not is_finite(downstream):
        where = f"{block.walk.checkpoint.directory}: block {block.index}"
        raise UserError(f"{where} has NaN or infinity in its gradient on this calibration text")
    for name, gradient in zip(parameters, gradients, strict=True):
        for statistic in statistics[name]:
            statistic.update(gradient.float())
    return downstream


def _outer_statistics(
    walk: BlockWalk, leaving: States, upstream: States, kinds: Sequence[type[GradientStatistic]]
) -> dict[str, list[GradientStatistic]]:
    """Statistics of the gradients of the tensors outside the blocks; a tied tensor sums both its uses.

    The whole head and its gradients are in memory, in float32.
    """
    family, shape, device = walk.family, walk.checkpoint.shape, walk.device
    outer = {name: [kind() for kind in kinds] for name in walk.checkpoint.outer_tensors()}
    lm_head = walk.head()
    ends = {name: walk.model.get_parameter(name).requires_grad_() for name in family.final_norm_tensors}
    for name in filter(None, (family.head, shape.head_bias)):
        ends[name] = walk.checkpoint.tensor(name).to(device, torch.float32).requires_grad_()
    head = ends[family.head]
    bias = ends[shape.head_bias] if shape.head_bias else None
    for ids, last, first in zip(walk.batches, leaving, upstream, strict=True):
        rows = walk.load_embeddings(ids)
        walk.embedding.requires_grad_()
        with torch.enable_grad():
            rows_of_head = head if bias is None else torch.cat([head, bias[:, None]], 1)
            logits = lm_head.cap_logits(lm_head.inputs(last[0, :-1].to(device)) @ rows_of_head.T)
            loss = nn.functional.cross_entropy(logits, ids[0, 1:].to(device))
            gradients = dict(zip(ends, torch.autograd.grad(loss, list(ends.values())), strict=True))
            weight = walk.embedding.get_parameter("weight")
            with walk.without_blocks() as decoder:  # which may multiply the embedding by a factor
                embedded = decoder(input_ids=rows, use_cache=False).last_hidden_state
            (row_gradient,) = torch.autograd.grad(embedded, weight, first.to(device, weight.dtype))
        table = torch.zeros_like(head).index_copy_(0, ids.unique().to(device), row_gradient.float())
        gradients[family.embedding] = table + gradients[family.head] if shape.tied else table
        for name, statistics in outer.items():
            for statistic in statistics:
                statistic.update(gradients[name])
    return outer


def _values(
    statistics: Mapping[str, list[GradientStatistic]], kinds: Sequence[type[GradientStatistic]], device: str
) -> Gradients:
    join(itertools.chain(*statistics.values()), device)
    return {kind: {name: s[i].value() for name, s in statistics.items()} for i, kind in enumerate(kinds)}
