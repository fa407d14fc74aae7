"""Tune one part of a block after the other, so that its output matches that of another block.

Attention, with the norm before it, is one part and the FFN another; a block whose attention and FFN stand side by side
is one part (arXiv:2510.14444: a part needs a nonlinearity). A part's output is the residual stream behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.calibration.block import Block, States
from secateur.calibration.hooks import StopForward

__all__ = ["BlockPart", "block_parts", "ffn_entry", "relative_error", "run_parts", "tune_part", "tuning_rate"]

_WARMUP = 0.1  #: share of the steps

Targets = Callable[[int], Tensor]  #: number of a batch -> the output to match [windows, positions, channels], float32


@dataclass(frozen=True)
class BlockPart:
    """A part of a block.

    Attributes:
        end: name of the module that reads the part's output; empty for the output of the block.
        parameters: its own, by their names within the block.
    """

    end: str
    parameters: Mapping[str, nn.Parameter]


def ffn_entry(block: Block) -> str:
    """The first module that reads the residual stream behind attention; empty where attention and FFN read the same."""
    site = block.walk.family.sites.get("ffn_input")
    return site.module if site and site.module in dict(block.module.named_modules()) else ""


def block_parts(block: Block, states: Tensor, number: int = 0) -> list[BlockPart]:
    """The parts of a block: attention, then the FFN; or the whole block where both read the same states.

    Which parameters come before the FFN is observed on one batch of states.
    """
    end = ffn_entry(block)
    parameters = {n: p for n, p in block.module.named_parameters() if p.is_floating_point()}
    if not end:
        return [BlockPart("", parameters)]
    before: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, module in block.module.named_modules():
            if name and name != end:
                hook = module.register_forward_pre_hook(lambda _module, _arguments, name=name: before.add(name))
                hooks.callback(hook.remove)
        with torch.no_grad():
            run_parts(block, states, number, [end], stop=True)
    first = {n: p for n, p in parameters.items() if n.rpartition(".")[0] in before}
    rest = {n: p for n, p in parameters.items() if n not in first}
    return [part for part in (BlockPart(end, first), BlockPart("", rest)) if part.parameters]


def run_parts(
    block: Block, states: Tensor, number: int, ends: Sequence[str], *, stop: bool = False
) -> dict[str, Tensor]:
    """Run a block on a batch of states and return what enters the modules ``ends``, and under "" its output.

    Args:
        number: of the batch.
        stop: whether to stop at the first module of ``ends``, without an output.
    """
    values: dict[str, Tensor] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values[name] = arguments[0]
            if stop:
                raise StopForward

        return hook

    with contextlib.ExitStack() as hooks, contextlib.suppress(StopForward):
        for name in filter(None, ends):
            hooks.callback(block.module.get_submodule(name).register_forward_pre_hook(observe(name)).remove)
        values[""] = block.forward(states, number)
    return values


def _output(block: Block, states: States, number: int, end: str) -> Tensor:
    """The output of a part on one batch, in float32; in a narrower walk matrices are multiplied in its type."""
    walk = block.walk
    with torch.autocast(torch.device(walk.device).type, walk.dtype, enabled=walk.dtype != torch.float32):
        values = run_parts(block, states[number].to(walk.device, torch.float32), number, [end], stop=bool(end))
    return values[end][..., : walk.checkpoint.shape.hidden].float()


@torch.no_grad()
def relative_error(block: Block, states: States, targets: Targets, numbers: Sequence[int]) -> float:
    """Squared distance of the block's outputs from their targets over the targets' squares, on some batches."""
    distance = square = torch.zeros((), dtype=torch.float64, device=block.walk.device)
    for number in numbers:
        target = targets(number)
        difference = _output(block, states, number, "") - target
        distance = distance + difference.square().sum(dtype=torch.float64)
        square = square + target.square().sum(dtype=torch.float64)
    return float(distance / square) if square > 0 else float(distance)


def tuning_rate(peak: float, step: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up over a tenth of the steps, then linearly towards zero."""
    warm = max(1, round(_WARMUP * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))


def _root_mean_square(weights: Tensor, mask: Tensor | None) -> float:
    """The root mean square of the weights that a mask keeps."""
    count = weights.numel() if mask is None else int(mask.count_nonzero())
    return float((weights.double().square().sum() / max(count, 1)).sqrt())


def tune_part(
    block: Block,
    part: BlockPart,
    states: States,
    targets: Targets,
    groups: Iterator[Sequence[int]],
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    rate: float,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Tune a part's parameters with AdamW to the mean squared distance of its output from the targets.

    The weights of the block must be in float32; other parameters than the part's stay as they are.

    Args:
        states: inputs of the block, batch by batch.
        groups: the batches of each step.
        masks: parameter name -> bool, False for weights that stay zero.
        rate: peak learning rate, as a share of the root mean square of a tensor's weights (:func:`_root_mean_square`),
            so that one rate serves models of all widths. A tensor of zeros stays zero.
        advance: called after each step.
    """
    groups_of_parameters = [
        {"params": [parameter], "scale": _root_mean_square(parameter.detach(), masks.get(name))}
        for name, parameter in part.parameters.items()
    ]
    optimizer = torch.optim.AdamW(groups_of_parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    drops = [(p, ~masks[n].to(p.device)) for n, p in part.parameters.items() if n in masks]
    block.module.requires_grad_(False)
    for parameter in part.parameters.values():
        parameter.requires_grad_(True)
    for step in range(steps):
        numbers = next(groups)
        elements = sum(targets(number).numel() for number in numbers)
        with torch.enable_grad():
            for number in numbers:
                difference = _output(block, states, number, part.end) - targets(number)
                (difference.square().sum() / elements).backward()
        for parameter, drop in drops:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(drop, 0)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * tuning_rate(rate, step, steps)
        optimizer.step()
        for parameter, drop in drops:
            parameter.data.masked_fill_(drop, 0)
        optimizer.zero_grad()
        advance()
    block.module.requires_grad_(False)
